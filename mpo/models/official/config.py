"""Convert config.json of the official format to transformers' config, and back."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, InternVLConfig, InternVLVisionConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mpo.models.official.names import TensorNames
from mpo.models.official.schema import IGNORED, TEXT_MODELS, Chat, Vision, text_model

VISION_NAMES = {
    "use_qk_norm": "qk_normalization",
    "attention_bias": "qkv_bias",
    "projection_dropout": "dropout",
    "layer_scale_init_value": "initializer_factor",
}
"""Settings of the tower with another name: transformers' name -> official name."""
VISION_SIZES = ("image_size", "patch_size")
OF_TRAINING = {"initializer_range", "layer_scale_init_value", "output_router_logits", "router_aux_loss_coef", "pretraining_tp"}
OF_TOKENS = {"vocab_size", "image_token_id", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"}
IN_OTHERS = {"text_config", "vision_config", "max_window_layers"}
NOT_COMPARED = {*IGNORED, *OF_TRAINING, *OF_TOKENS, *IN_OTHERS}
"""Keys of transformers' config that do not affect the logits of a model with given weights, or that are compared elsewhere."""


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an InternVLChatModel."""
    classes = config.get("architectures")
    return config.get("model_type") == "internvl_chat" or (isinstance(classes, list) and "InternVLChatModel" in classes)


def tensor_names(official: Chat[Any]) -> TensorNames:
    """The table of names for an official checkpoint."""
    llm = official.llm_config
    heads = llm.num_attention_heads
    return TensorNames(internlm2=text_model(llm) == "internlm2", heads=heads, key_value_heads=llm.num_key_value_heads or heads)


def transformers_config(
    official: Chat[Any], *, image_token_id: int, eos_token_id: int | None = None, where: str = "config.json"
) -> InternVLConfig:
    """The transformers config of an official checkpoint.

    `image_token_id` is that of ``<IMG_CONTEXT>``, `eos_token_id` that of the token that ends a turn, by default as in the language
    model's config. The error of a value that transformers refuses names the file, `where`.
    """
    llm, vision, kind = official.llm_config, official.vision_config, text_model(official.llm_config)
    text_class = CONFIG_MAPPING[TEXT_MODELS[kind][1]]
    tied = llm.tie_word_embeddings and kind.startswith("qwen3")  # older ones are saved and trained untied
    known = {field.name for field in fields(text_class)}
    text = {name: value for name, value in llm.text.items() if value is not None or name in known}
    text |= {"architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_class.model_type]], "tie_word_embeddings": tied}
    if kind in ("internlm2", "internlm3"):
        text |= {"attention_bias": text.pop("bias"), "mlp_bias": False}
    if eos_token_id is not None:
        text["eos_token_id"] = eos_token_id
    try:
        text_config = text_class(**text)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: llm_config does not describe a {text_class.model_type} of transformers: {reason}.") from error
    shared = Vision.model_fields.keys() - VISION_NAMES.values() - set(VISION_SIZES)
    return InternVLConfig(
        text_config=text_config,
        vision_config=InternVLVisionConfig(
            **{name: getattr(vision, name) for name in shared},
            **{ours: getattr(vision, name) for ours, name in VISION_NAMES.items()},
            **{name: [getattr(vision, name)] * 2 for name in VISION_SIZES},
        ),
        image_token_id=image_token_id,
        image_seq_length=official.tokens_per_tile,
        downsample_ratio=official.downsample_ratio,
        vision_feature_layer=official.select_layer,
        tie_word_embeddings=tied,
        dtype=official.dtype or official.torch_dtype or llm.dtype or llm.torch_dtype,
    )


def differences(config: InternVLConfig, other: InternVLConfig) -> list[str]:
    """The settings of two models that give other logits with the same weights; vocabularies may differ.

    >>> differences(InternVLConfig(), InternVLConfig(downsample_ratio=0.25))
    ['downsample_ratio=0.25, expected 0.5']
    """
    return [
        f"{prefix}{name}={given!r}, expected {expected!r}"
        for prefix in ("", "text_config.", "vision_config.")
        for name, given, expected in _compared(*(getattr(one, prefix[:-1]) if prefix else one for one in (other, config)))
        if given != expected
    ]


def _compared(given: Any, expected: Any) -> Iterator[tuple[str, Any, Any]]:
    yield "model_type", given.model_type, expected.model_type
    if type(given) is type(expected):
        for name in sorted({field.name for field in fields(expected)} - NOT_COMPARED):
            yield name, *(_comparable(getattr(one, name)) for one in (given, expected))


def _comparable(value: Any) -> Any:
    if isinstance(value, Mapping):  # rope_parameters, with an earlier name of rope_type
        return {name: inner for name, inner in value.items() if name != "type"}
    return list(value) if isinstance(value, tuple) else value


def official_config(config: InternVLConfig) -> dict[str, Any]:
    """Create an official config.json like InternVL2.5's, for a model that was not converted from the official format."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    cls, kind, schema = TEXT_MODELS.get(text.model_type, (None, None, None))
    if schema is None or kind != text.model_type:
        supported = ", ".join(sorted({ours for _, ours, _ in TEXT_MODELS.values()}))
        raise ValueError(f"The official format does not support the language model {text.model_type}; it supports {supported}.")
    rope = dict(text.rope_parameters)
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    llm = {**text.to_dict(), **{name: getattr(text, name) for name in schema.model_fields if hasattr(text, name)}}
    del llm["rope_parameters"]
    llm |= {
        "architectures": [cls],
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
            "AutoModel": "modeling_internvl_chat.InternVLChatModel",
            "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
        },
        "model_type": "internvl_chat",
        "downsample_ratio": config.downsample_ratio,
        "dynamic_image_size": True,
        "force_image_size": vision.image_size[0],
        "llm_config": llm,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": config.vision_feature_layer,
        "template": "internvl2_5",
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
        "use_thumbnail": True,
        "vision_config": {
            **{name: getattr(vision, name) for name in Vision.model_fields if hasattr(vision, name)},
            **{name: getattr(vision, ours) for ours, name in VISION_NAMES.items()},
            **{name: getattr(vision, name)[0] for name in VISION_SIZES},
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": 0.0,
            "use_flash_attn": True,
        },
    }
