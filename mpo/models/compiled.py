"""`torch_compile`: the layers of language model and vision tower are compiled, each kind once, for rows of any length.

A model compiled as a whole would be compiled anew for nearly every batch: packed rows differ in more than their length.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mpo.models.tower import find_tower
from mpo.packing.fits import find_text_model


def compile_layers(model: nn.Module, *, backend: str | None = None, mode: str | None = None) -> None:
    """Compile the layers of a model in place; weights, names and hooks stay as they are.

    Args:
        model: may have adapters, or be in pieces.
        backend: of `torch.compile`; None: its default.
        mode: likewise.

    Raises:
        ValueError: for a model without a stack of layers.
    """
    layers = [layer for stack in _stacks(model) for layer in stack]
    if not layers:
        raise ValueError(f"torch_compile compiles a model layer by layer, and {type(model).__name__} has no layers known here.")
    options: dict[str, Any] = {"dynamic": True, **({"backend": backend} if backend else {}), **({"mode": mode} if mode else {})}
    for layer in layers:
        layer.compile(**options)


def _stacks(model: nn.Module) -> list[nn.ModuleList]:
    text, tower = find_text_model(model), find_tower(model)
    found = [getattr(text, "layers", None), getattr(getattr(tower, "encoder", None), "layer", None)]
    return [stack for stack in found if isinstance(stack, nn.ModuleList)]
