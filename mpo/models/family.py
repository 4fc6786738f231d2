"""Model families: all that the library knows of a kind of model by name. A new family is one entry of `FAMILIES`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

PARTS = ("vision", "fuser", "projector", "language", "head")
_LANGUAGE = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """The parts of a family's models, by transformers' module names."""

    types: tuple[str, ...]  # values of ``config.model_type``
    vision: str  # module of the vision tower; empty for text models
    layers: str  # modules of the tower's layers, inside of it
    projector: tuple[str, ...]  # modules between the tower and the language model
    linear: Mapping[str, tuple[str, ...]]  # the linear layers that LoRA adapts in tower and projector
    fuser: tuple[str, ...] = ()  # modules that fuse layers of the tower before the projector
    loose: tuple[str, ...] = ()  # parameters that belong to the projector but are not in its modules
    towers: tuple[str, ...] = ()  # values of ``config.vision_config.model_type``; empty: the family has one kind of tower
    language: str = "language_model"  # module of the language model, if there is a tower
    # the residual branches of the tower's layers, whose outputs have one row per image or tile; empty if they do not
    branches: tuple[str, ...] = ()
    processor: str = ""  # transformers' class of its processor, where the next two are to be known before there is a model
    one_size: bool = False  # whether all images, or their tiles, have the same size in pixels when they are encoded
    tiled: bool = False  # whether the tower's output has one row per tile, in the order of its input
    shares_prompt: bool = False  # whether the cache of a prompt with images can be repeated and continued by `generate`
    router_loss: bool = True  # whether transformers returns the router logits of its mixtures of experts
    projector_in_tower: bool = False  # whether the projector's modules stand inside of the tower, and its layers deeper in them

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, by its name; an adapter belongs to the part it adapts.

        >>> INTERNVL.part_of("model.vision_tower.embeddings.cls_token"), QWEN_VL.part_of("model.visual.merger.norm.weight")
        ('vision', 'projector')
        >>> INTERNVL.part_of("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")
        'language'
        """
        words = name.split(".")
        if any(word in words for word in self.fuser):
            return "fuser"
        if any(word in words for word in (*self.projector, *self.loose)):
            return "projector"
        if self.vision and self.vision in words:
            return "vision"
        return "head" if "lm_head" in words else "language"

    def vision_depth(self, name: str) -> int | None:
        """The index of the vision tower's layer that a parameter belongs to; None for its embeddings and other parts.

        >>> INTERNVL.vision_depth("model.vision_tower.encoder.layer.11.lambda_1"), QWEN_VL.vision_depth("model.visual.pos_embed")
        (11, None)
        """
        found = re.search(rf"{self.vision}\..*?{re.escape(self.layers)}\.(\d+)\.", f"{name}.") if self.vision else None
        return int(found[1]) if found else None

    def depth(self, model: Any) -> int:
        """The number of layers of a model's vision tower, from the names of its parameters; 0 without one."""
        depths = (self.vision_depth(name) for name, _ in model.named_parameters())
        return 1 + max((depth for depth in depths if depth is not None), default=-1)

    def projections(self) -> str:
        """A regular expression of every projection outside the vision tower: the default target of adapters."""
        outside = rf"(?!.*{self.vision})" if self.vision else ""
        return rf"^{outside}.*\.({'|'.join(_LANGUAGE)})$"

    def adapted_layers(self, choices: Mapping[str, Any]) -> str:
        """A regular expression over module names that matches the layers to adapt: those of parts with the choice ``"lora"``.

        >>> bool(re.fullmatch(INTERNVL.adapted_layers({"vision": "lora"}), "model.vision_tower.encoder.layer.0.mlp.fc1"))
        True

        Raises ValueError when no part is adapted.
        """
        linear = {**self.linear, "language": _LANGUAGE}
        chosen = [part for part in linear if choices.get(part, "freeze") == "lora"]
        if not chosen:
            raise ValueError("train_parts adapts no part. Set one to lora, or use peft=none.")
        projector = "|".join(self.projector)
        without, deeper = (rf"(?!(?:{projector})\.)", r"(?:.*\.)?") if self.projector_in_tower else ("", "")
        where = {
            "vision": rf".*{self.vision}\.{without}.*\.",
            "projector": rf".*(?:{projector})\.{deeper}",
            "language": rf".*{self.language}\..*\." if self.vision else r".*\.",
        }
        patterns = [f"{where[part]}(?:{'|'.join(linear[part])})" for part in chosen]
        return f"^(?:{'|'.join(patterns)})$"

    def not_quantized(self) -> list[str]:
        """Regular expressions of the modules that QLoRA leaves in their dtype: all but the language model's layers."""
        outside = () if self.projector_in_tower else self.projector
        return [*(f".*{name}" for name in (self.vision, *self.fuser, *outside) if name), "lm_head"]


INTERNVL = Family(
    types=("internvl",),
    vision="vision_tower",
    layers="encoder.layer",
    projector=("multi_modal_projector",),
    linear={  # those of tower and language model as in the official InternVL code
        "vision": ("q_proj", "k_proj", "v_proj", "projection_layer", "fc1", "fc2"),
        "projector": ("linear_1", "linear_2"),
    },
    branches=("attention", "mlp"),
    processor="InternVLProcessor",
    one_size=True,
    tiled=True,
    shares_prompt=True,
    router_loss=False,  # transformers 5.17 to 5.24
)
LLAVA = Family(
    types=("llava",),
    vision="vision_tower",
    layers="encoder.layers",
    projector=("multi_modal_projector",),
    towers=("clip_vision_model", "siglip_vision_model"),
    linear={"vision": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), "projector": ("linear_1", "linear_2")},
    branches=("self_attn", "mlp"),
    processor="LlavaProcessor",
    one_size=True,
)
INTERNVL_FUSER = replace(INTERNVL, types=("internvl_mmfuser",), fuser=("fuser",))
LLAVA_FUSER = replace(LLAVA, types=("llava_mmfuser",), fuser=("fuser",))
LLAVA_NEXT = replace(LLAVA, types=("llava_next", "llava_onevision"), processor="", one_size=False, loose=("image_newline",))
QWEN_VL = Family(
    types=("qwen2_vl", "qwen2_5_vl"),
    vision="visual",
    layers="blocks",
    projector=("merger",),
    projector_in_tower=True,
    linear={"vision": ("qkv", r"attn\.proj", "fc1", "fc2", "gate_proj", "up_proj", "down_proj"), "projector": (r"mlp\.[02]",)},
)
QWEN3_VL = Family(
    types=("qwen3_vl",),
    vision="visual",
    layers="blocks",
    projector=("merger", "deepstack_merger_list"),
    projector_in_tower=True,
    linear={"vision": ("qkv", r"attn\.proj", "linear_fc1", "linear_fc2"), "projector": ("linear_fc1", "linear_fc2")},
)
TEXT = Family(types=(), vision="", layers="", projector=(), linear={})
"""Any model without images: language and head."""
UNKNOWN = Family(types=(), vision="", layers="", projector=(), linear={})
DEFAULT = INTERNVL
"""The family by which settings are checked before a model's own is known."""
FAMILIES = (INTERNVL, INTERNVL_FUSER, LLAVA, LLAVA_FUSER, LLAVA_NEXT, QWEN_VL, QWEN3_VL)
_NOT_TEXT = re.compile(r"vision|visual|image|img|vit_|vq|audio|speech|mm_", re.IGNORECASE)
"""In the keys of a config: the model has more than text."""


def takes_images(config: Any) -> bool:
    """Whether a model has a vision tower, by transformers' config; of any family."""
    return hasattr(config, "vision_config")


def family_of_processor(processing_class: Any) -> Family:
    """The family of a processor's models, with or without a fuser; `UNKNOWN` for a tokenizer and any other processor."""
    names = {cls.__name__ for cls in type(processing_class).__mro__ if cls.__module__.startswith("transformers.")}
    return next((family for family in FAMILIES if family.processor in names), UNKNOWN)


def known_family(config: Any) -> Family:
    """The family of a model; `UNKNOWN` for a vision-language model of another one, for uses that can do without it."""
    found = next((family for family in FAMILIES if config.model_type in family.types), None)
    if found is not None:
        return found if not found.towers or _tower_type(config) in found.towers else UNKNOWN
    parts = {name for name, value in config.to_dict().items() if isinstance(value, dict) and "model_type" in value}
    return UNKNOWN if parts - {"attn_config", "ffn_config"} or any(map(_NOT_TEXT.search, config.to_dict())) else TEXT


def family_of(config: Any, why: str) -> Family:
    """The family of a model, where it matters: for the setting `why`, which the error names.

    Raises ValueError for a vision-language model of an unknown family, whose parts would be mistaken for others.
    """
    family = known_family(config)
    if family is not UNKNOWN:
        return family
    known = ", ".join(name for family in FAMILIES for name in family.types)
    kind = repr(config.model_type) + (f" with a vision tower {tower!r}" if (tower := _tower_type(config)) else "")
    raise ValueError(
        f"{why} needs to know the parts of the model, and those of model_type {kind} are not known (known: {known}, with the "
        "towers of the original checkpoints, and text models). Leave it out, or add the family to mpo/models/family.py."
    )


def _tower_type(config: Any) -> str:
    return str(getattr(getattr(config, "vision_config", None), "model_type", ""))
