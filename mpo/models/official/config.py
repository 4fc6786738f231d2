"""Convert config.json of the official format to transformers' config, and back."""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, InternVLConfig, InternVLVisionConfig

from mpo.models.official.names import TensorNames

TEXT_MODELS = {
    "internlm2": ("InternLM2ForCausalLM", "llama"),
    "internlm3": ("InternLM3ForCausalLM", "llama"),
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "qwen3_moe"),
}
"""Official ``llm_config.model_type`` -> its class, transformers' text model."""

# Defaults of InternVisionConfig for keys missing from config.json: the 6B tower's.
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 12_800,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "hidden_act": "gelu",
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "num_channels": 3,
}
VISION_NAMES: dict[str, tuple[str, Any]] = {
    "use_qk_norm": ("qk_normalization", True),
    "attention_bias": ("qkv_bias", False),
    "projection_dropout": ("dropout", 0.0),
    "layer_scale_init_value": ("initializer_factor", 0.1),
}
"""Settings of the tower with another name: transformers' name -> official name, its default."""


def is_official(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an InternVLChatModel."""
    return config.get("model_type") == "internvl_chat" or "InternVLChatModel" in (config.get("architectures") or [])


def text_model(official: Mapping[str, Any]) -> str:
    """The language model of an official checkpoint: a key of `TEXT_MODELS`.

    Raises:
        ValueError: for a language model that is not supported, naming those that are.
    """
    llm = official["llm_config"]
    classes = llm.get("architectures") or []
    found = next((name for name, (cls, _) in TEXT_MODELS.items() if cls in classes), llm.get("model_type"))
    if found not in TEXT_MODELS:
        raise ValueError(
            f"The language model of this checkpoint is {' or '.join(classes or [str(found)])}, which transformers "
            "does not support in InternVL. Use one with InternLM2, Llama, Qwen2, Qwen2.5 or Qwen3 (dense or MoE): InternVL2, 2.5, "
            "3 and 3.5, except InternVL2-4B (Phi-3) and InternVL3.5-GPT-OSS."
        )
    if found == "internlm3" and (llm.get("bias") or llm.get("qkv_bias")):
        raise ValueError("This InternLM3 has biases (bias or qkv_bias), which transformers' Llama does not have.")
    return str(found)


def tensor_names(official: Mapping[str, Any]) -> TensorNames:
    """The table of names for an official checkpoint."""
    llm = official["llm_config"]
    heads = llm.get("num_attention_heads", 1)
    return TensorNames(
        internlm2=text_model(official) == "internlm2", heads=heads, key_value_heads=llm.get("num_key_value_heads") or heads
    )


def transformers_config(official: Mapping[str, Any], *, image_token_id: int, eos_token_id: int | None = None) -> InternVLConfig:
    """The transformers config of an official checkpoint.

    Args:
        official: its config.json.
        image_token_id: id of ``<IMG_CONTEXT>``.
        eos_token_id: id of the token that ends a turn; by default that of the language model's config.

    Raises:
        ValueError: for a language model or a pixel shuffle that transformers does not support.
    """
    version = official.get("ps_version", "v1")
    if version != "v2":
        raise ValueError(f"Expected ps_version='v2', as in InternVL2 and later; got ps_version={version!r}.")
    llm = copy.deepcopy(official["llm_config"])  # transformers' config classes modify their arguments
    vision = {**VISION_DEFAULTS, **official["vision_config"]}
    kind = text_model(official)
    text_class = CONFIG_MAPPING[TEXT_MODELS[kind][1]]
    taken = {*inspect.signature(text_class.__init__).parameters, "rope_theta", "rope_scaling"}
    tied = bool(llm.get("tie_word_embeddings")) and kind.startswith("qwen3")  # older ones are saved and trained untied
    text = {name: value for name, value in llm.items() if name in taken and value is not None and name not in ("self", "dtype")}
    text |= {"tie_word_embeddings": tied, "use_cache": True}
    if kind in ("internlm2", "internlm3"):
        text |= {"attention_bias": bool(llm.get("bias")), "mlp_bias": False}
    if eos_token_id is not None:
        text["eos_token_id"] = eos_token_id
    size, patch = official.get("force_image_size") or vision["image_size"], vision["patch_size"]
    ratio = official.get("downsample_ratio", 0.5)
    return InternVLConfig(
        text_config=text_class(**text),
        vision_config=InternVLVisionConfig(
            **{name: vision[name] for name in VISION_DEFAULTS},
            **{ours: vision.get(name, default) for ours, (name, default) in VISION_NAMES.items()},
            image_size=[size, size],
            patch_size=[patch, patch],
        ),
        image_token_id=image_token_id,
        image_seq_length=int((size // patch) ** 2 * ratio**2),
        downsample_ratio=ratio,
        vision_feature_layer=official.get("select_layer", -1),
        tie_word_embeddings=tied,
        dtype=official.get("dtype") or official.get("torch_dtype") or llm.get("dtype") or llm.get("torch_dtype"),
    )


def official_config(config: InternVLConfig) -> dict[str, Any]:
    """Create an official config.json like InternVL2.5's, for a model that was not converted from the official format."""
    vision: Any = config.vision_config
    text: Any = config.text_config
    cls, kind = TEXT_MODELS.get(text.model_type, (None, None))
    if kind != text.model_type:
        supported = ", ".join(sorted({ours for _, ours in TEXT_MODELS.values()}))
        raise ValueError(f"The official format does not support the language model {text.model_type}; it supports {supported}.")
    rope = dict(text.rope_parameters)
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "type")}
    llm = {name: value for name, value in text.to_dict().items() if name != "rope_parameters"}
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
            **{name: getattr(vision, name) for name in VISION_DEFAULTS},
            **{name: getattr(vision, ours) for ours, (name, _) in VISION_NAMES.items()},
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "drop_path_rate": 0.0,
            "image_size": vision.image_size[0],
            "patch_size": vision.patch_size[0],
            "use_flash_attn": True,
        },
    }
