"""Count the parameters of each part of a model, and those that are trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mpo.models import parts

TITLES = {"vision": "vision tower", "projector": "projector", "language": "language model", "head": "LM head"}
PARTS = (*TITLES.values(), "adapters")


@dataclass
class Count:
    """Number of parameters of a part: all, and trained ones."""

    total: int = 0
    trainable: int = 0


def part_of(name: str) -> str:
    """Return the title of a parameter's part; adapters are a separate part.

    >>> part_of("model.vision_tower.embeddings.cls_token"), part_of("lm_head.weight")
    ('vision tower', 'LM head')
    >>> part_of("base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.default.weight")
    'adapters'
    """
    return "adapters" if "lora_" in name else TITLES[parts.part_of(name)]


def count_parameters(model: nn.Module) -> dict[str, Count]:
    """Count parameters by part. Weights shared by head and input embeddings count once, for the language model.

    Args:
        model: a model; may be on the meta device.
    """
    counts = {part: Count() for part in PARTS}
    for name, parameter in model.named_parameters():
        count = counts[part_of(name)]
        count.total += parameter.numel()
        count.trainable += parameter.numel() if parameter.requires_grad else 0
    return counts
