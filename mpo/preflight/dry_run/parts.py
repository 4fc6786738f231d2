"""Count the parameters of each part of a model, and those that are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mpo.models.family import INTERNVL, family_of

TITLES = {"vision": "vision tower", "projector": "projector", "language": "language model", "head": "LM head"}
PARTS = (*TITLES.values(), "adapters")


@dataclass
class Count:
    """Number of parameters of a part: all, and trained ones."""

    total: int = 0
    trainable: int = 0


def titles(model: nn.Module) -> Callable[[str], str]:
    """Return a function from the name of a parameter or module of `model` to the title of its part; adapters are a separate part.

    Raises:
        ValueError: for a vision-language model of an unknown family.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    family = INTERNVL if base is None else family_of(base.config, "dry_run=true")
    return lambda name: "adapters" if "lora_" in name else TITLES[family.part_of(name)]


def count_parameters(model: nn.Module) -> dict[str, Count]:
    """Count parameters by part. Weights shared by head and input embeddings count once, for the language model.

    Args:
        model: a model; may be on the meta device.
    """
    counts = {part: Count() for part in PARTS}
    part_of = titles(model)
    for name, parameter in model.named_parameters():
        count = counts[part_of(name)]
        count.total += parameter.numel()
        count.trainable += parameter.numel() if parameter.requires_grad else 0
    return counts
