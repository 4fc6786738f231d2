"""The keys of the official config.json that are read: their types, and the official code's defaults.

Every key is one of four kinds:

* It has no default here: it is required, because a default would give another model, or none.
* It has one: the official code's (InternVLChatConfig, InternVisionConfig, InternLM2Config, InternLM3Config). Other keys of language
  models are passed to transformers' config class, which is the official one of Llama and Qwen.
* It is in `IGNORED`, or a key of the top level or of vision_config that is not listed: it does not affect the logits.
* A value that is not supported (V2PE, biases of InternLM3, unmerged LoRA, ...) is refused.

null is allowed only where the official code gives it a meaning.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OTHERS = "attn_implementation auto_map model_type name_or_path output_attentions torch_dtype use_cache"
IGNORED = {field.name for field in fields(PreTrainedConfig)} | set(OTHERS.split())
"""Keys of llm_config that are not passed to transformers, besides those that start with an underscore."""


def _merged(rank: int) -> int:
    if rank:
        raise ValueError("LoRA adapters in the weights are not merged. Merge them with the official tools/merge_lora.py")
    return rank


def _known_rope(rope: dict[str, Any]) -> dict[str, Any]:
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if kind != "default" and (kind not in (*ROPE_INIT_FUNCTIONS,) or (type(factor) not in (int, float) and kind != "longrope")):
        raise ValueError(f"expected a type among default, {', '.join(ROPE_INIT_FUNCTIONS)}, and a number as its factor")
    if rope.get("type", kind) != kind:
        raise ValueError(f"expected one type; got type={rope['type']!r} and rope_type={kind!r}")
    return rope


Size = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Activation = Annotated[str, Field(pattern=f"^({'|'.join(ACT2FN)})$")]
Rank = Annotated[int, Field(ge=0), AfterValidator(_merged)]
Rope = Annotated[dict[str, Any], AfterValidator(_known_rope)]
DType = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    BeforeValidator(lambda name: name.removeprefix("torch.") if isinstance(name, str) else name),
]


class _Keys(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class Vision(_Keys):
    """``vision_config``; the defaults are the 6B tower's."""

    hidden_size: Size = 3200
    intermediate_size: Size = 12_800
    num_hidden_layers: Size = 48
    num_attention_heads: Size = 25
    num_channels: Literal[3] = 3
    image_size: Size = 224
    patch_size: Size = 14
    hidden_act: Activation = "gelu"
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    layer_norm_eps: Positive = 1e-6
    qkv_bias: bool = False
    qk_normalization: bool = True
    dropout: Share = 0.0
    attention_dropout: Share = 0.0
    initializer_range: Positive = 0.02
    initializer_factor: float = 0.1

    @model_validator(mode="after")
    def _divisible(self) -> "Vision":
        size, heads = self.hidden_size, self.num_attention_heads
        if size % heads:
            raise ValueError(f"expected hidden_size={size} to be a multiple of num_attention_heads={heads}")
        return self


class Language(_Keys):
    """``llm_config``: Llama, Qwen2, Qwen2.5, Qwen3."""

    architectures: list[str] | None = None
    model_type: str | None = None
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size
    num_key_value_heads: Size | None  # null: as many as query heads
    head_dim: Size | None = None  # null: hidden_size / num_attention_heads
    hidden_act: Activation = "silu"
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10_000.0
    rope_scaling: Rope | None = None
    rope_parameters: None = None  # transformers' name of both, which the official code does not read
    max_position_embeddings: Size | None = None  # null is refused by transformers
    tie_word_embeddings: bool = False
    quantization_config: None = None  # a quantised checkpoint is refused
    torch_dtype: DType = None
    dtype: DType = None

    @property
    def text(self) -> dict[str, Any]:
        """The keys that decide the model, for transformers' config class."""
        given = {name: value for name, value in self.model_dump(exclude=IGNORED).items() if not name.startswith("_")}
        return {name: value for name, value in given.items() if value is not None or name in self.model_fields_set}


class InternLM2(Language):
    """InternLM2; V2PE's positions are not supported."""

    bias: bool = True
    max_position_embeddings: Size = 2048
    rope_pos_id_version: Literal["default"] = "default"

    @model_validator(mode="after")
    def _known_scaling(self) -> "InternLM2":
        if self.rope_scaling and self.rope_scaling.get("type") not in ("linear", "dynamic"):  # it does not read rope_type
            raise ValueError(f"expected rope_scaling to have the type linear or dynamic; got rope_scaling={self.rope_scaling}")
        return self


class InternLM3(Language):
    """InternLM3; transformers' Llama has none of its biases."""

    bias: Literal[False] = False
    qkv_bias: Literal[False] = False
    max_position_embeddings: Size = 32_768


class Experts(Language):
    """Qwen3's mixtures of experts."""

    num_experts: Size
    num_experts_per_tok: Size
    moe_intermediate_size: Size
    norm_topk_prob: bool = False
    decoder_sparse_step: Size = 1

    @model_validator(mode="after")
    def _enough(self) -> "Experts":
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is above num_experts={self.num_experts}")
        return self


L = TypeVar("L", bound=Language)


class Chat(_Keys, Generic[L]):
    """The top level of config.json."""

    llm_config: L
    vision_config: Vision
    ps_version: Literal["v2"]  # the official default, v1, transposes tiles
    template: str
    select_layer: int = -1
    downsample_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    force_image_size: Annotated[int, Field(ge=0)] | None = None  # null or 0: vision_config.image_size
    dynamic_image_size: bool = False
    min_dynamic_patch: Size = 1
    max_dynamic_patch: Size = 6
    use_thumbnail: bool = False
    pad2square: Literal[False] = False
    quantization_config: None = None
    use_backbone_lora: Rank = 0
    use_llm_lora: Rank = 0
    torch_dtype: DType = None
    dtype: DType = None

    @model_validator(mode="after")
    def _fitting(self) -> "Chat[L]":
        vision, layers = self.vision_config, self.vision_config.num_hidden_layers
        if self.force_image_size not in (None, 0, vision.image_size):
            default = f"vision_config.image_size={vision.image_size} (224 when left out)"
            raise ValueError(f"expected force_image_size to be {default}; got {self.force_image_size}")
        patches = (vision.image_size // vision.patch_size) ** 2
        if not 1 <= self.tokens_per_tile == patches * self.downsample_ratio**2:
            raise ValueError(
                f"image_size / patch_size is {patches**0.5:g}, which downsample_ratio={self.downsample_ratio} does not fit"
            )
        if not 1 <= abs(self.select_layer) <= layers:
            raise ValueError(f"expected select_layer to be one of {layers} layers; got {self.select_layer}")
        if self.min_dynamic_patch > self.max_dynamic_patch:
            raise ValueError(f"min_dynamic_patch={self.min_dynamic_patch} is above max_dynamic_patch={self.max_dynamic_patch}")
        return self

    @property
    def tokens_per_tile(self) -> int:
        """The number of image tokens of one tile."""
        return int((self.vision_config.image_size // self.vision_config.patch_size) ** 2 * self.downsample_ratio**2)


TEXT_MODELS: dict[str, tuple[str, str, type[Language]]] = {
    "internlm2": ("InternLM2ForCausalLM", "llama", InternLM2),
    "internlm3": ("InternLM3ForCausalLM", "llama", InternLM3),
    "llama": ("LlamaForCausalLM", "llama", Language),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", Language),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", Language),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe", Experts),
}
"""Official ``llm_config.model_type`` -> its class, transformers' text model, the schema of its keys."""


def parse(official: Mapping[str, Any], where: str) -> "Chat[Any]":
    """Check the keys of an official config.json, and fill in the official code's defaults.

    Raises ValueError naming the file, `where`, and the key that is missing, has another type, or a value that is not supported.
    """
    llm = official.get("llm_config")
    kind = text_model(llm, where) if isinstance(llm, Mapping) else "llama"
    try:
        checked: Chat[Any] = Chat[TEXT_MODELS[kind][2]].model_validate(dict(official))  # type: ignore[misc]
        return checked
    except ValidationError as error:
        found = "; ".join(_described(one) for one in error.errors())
        raise ValueError(f"{where}: {found}. Copy the file from the original checkpoint, or correct it.") from None


def text_model(llm: Mapping[str, Any] | Language, where: str = "config.json") -> str:
    """The language model of an official ``llm_config``: a key of `TEXT_MODELS`; another one is a ValueError."""
    given = llm.model_dump() if isinstance(llm, Language) else llm
    classes, kind = given.get("architectures") or [], given.get("model_type")
    names = classes[:1] if isinstance(classes, list) else [classes]  # the official code reads the first one
    found = next((name for name, (cls, *_) in TEXT_MODELS.items() if cls in names or (not names and name == kind)), None)
    if found is None:
        raise ValueError(
            f"{where}: the language model (llm_config.architectures) is {' or '.join(map(str, names or [kind]))}, which "
            "transformers does not support in InternVL. Use one with InternLM2, Llama, Qwen2, Qwen2.5 or Qwen3 (dense or MoE): "
            "InternVL2, 2.5, 3 and 3.5, except InternVL2-4B (Phi-3) and InternVL3.5-GPT-OSS."
        )
    return found


def _described(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    reason = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{key} is missing"
    return f"{key}={error['input']!r}: {reason}" if key and not isinstance(error["input"], dict) else f"{key} {reason}".strip()
