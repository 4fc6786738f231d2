"""Which part of a model a parameter belongs to, and how many of each there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

PARTS = ("vision tower", "projector", "language model", "LM head", "adapters")


@dataclass
class Count:
    """Numbers of a part: all, and those that are trained."""

    total: int = 0
    trainable: int = 0


def base_model(model: nn.Module) -> Any:
    """The transformers model inside adapters."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def part_of(name: str) -> str:
    """The part of a parameter, by its name.

    >>> part_of("model.vision_tower.embeddings.cls_token"), part_of("lm_head.weight")
    ('vision tower', 'LM head')
    >>> part_of("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")
    'adapters'
    """
    if "lora_" in name:
        return "adapters"
    if "vision_tower" in name:
        return "vision tower"
    if "multi_modal_projector" in name:
        return "projector"
    return "LM head" if "lm_head" in name else "language model"


def count_parameters(model: nn.Module) -> dict[str, Count]:
    """Count parameters by part; a head that is the input embeddings too counts once, with the language model.

    Args:
        model: may be on the meta device.
    """
    counts = {part: Count() for part in PARTS}
    for name, parameter in model.named_parameters():
        count = counts[part_of(name)]
        count.total += parameter.numel()
        count.trainable += parameter.numel() if parameter.requires_grad else 0
    return counts
