"""How many parameters each part of a model has, and how many are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mpo.models import parts

TITLES = {"vision": "vision tower", "projector": "projector", "language": "language model", "head": "LM head"}
PARTS = (*TITLES.values(), "adapters")


@dataclass
class Count:
    """Numbers of a part: all, and those that are trained."""

    total: int = 0
    trainable: int = 0


def part_of(name: str) -> str:
    """The part of a parameter as it is shown; adapters are a part of their own.

    >>> part_of("model.vision_tower.embeddings.cls_token"), part_of("lm_head.weight")
    ('vision tower', 'LM head')
    >>> part_of("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")
    'adapters'
    """
    return "adapters" if "lora_" in name else TITLES[parts.part_of(name)]


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
