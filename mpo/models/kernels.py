"""`torch_compile`: compile the layers of language model and vision tower, each class once, for rows of any length.

A model compiled as a whole would be recompiled for nearly every batch: packed rows differ in more than their length.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from mpo.models.packable import find_text_model
from mpo.models.tower import tower_layers


def compile_layers(model: nn.Module, *, backend: str | None = None, mode: str | None = None) -> None:
    """Compile the layers of a model in place; weights, names and hooks stay as they are.

    Args:
        model: may have adapters or be sharded.
        backend: passed to `torch.compile`; None for its default.
        mode: passed to `torch.compile`; None for its default.

    Raises:
        ValueError: for a model without a known stack of layers.
    """
    stack = getattr(find_text_model(model), "layers", None)
    layers = [*(stack if isinstance(stack, nn.ModuleList) else []), *tower_layers(model)]
    if not layers:
        raise ValueError(
            f"torch_compile compiles a model layer by layer; no known layers found in {type(model).__name__}. Leave torch_compile "
            "out."
        )
    options: dict[str, Any] = {"dynamic": True, **({"backend": backend} if backend else {}), **({"mode": mode} if mode else {})}
    for layer in layers:
        layer.compile(**options)
