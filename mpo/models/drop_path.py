"""Stochastic depth (arXiv 1603.09382) for the vision tower: in the official recipes, but not in transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpo.models.tower import find_tower


class DropPath:
    """Drop the output of a layer's attention or MLP branch for random tiles, in training mode.

    Kept outputs are divided by the keep probability. The rate grows linearly with depth, from 0 in the first layer to `rate` in the
    last, as in the official InternVisionEncoder. It adds nothing to a checkpoint.

    Args:
        model: a model with an InternViT.
        rate: drop probability of the last layer; 0.1 (300M tower) or 0.4 (6B) in most official recipes.

    Raises:
        ValueError: for a model without such a vision tower, or with a frozen one.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        tower: Any = find_tower(model)
        layers = getattr(getattr(tower, "encoder", None), "layer", None)
        if not layers or not hasattr(layers[0], "lambda_1"):
            raise ValueError(f"vision_drop_path={rate} needs InternVL's vision tower; {type(model).__name__} has none.")
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError(
                f"vision_drop_path={rate} has no effect: the vision tower is frozen. Leave it out, or train the tower."
            )
        self.remove_from(model)
        self._on = True
        hooks = tower.drop_path_hooks = []
        for layer, probability in zip(layers, torch.linspace(0, rate, len(layers)).tolist(), strict=True):
            if probability > 0:
                hooks += [branch.register_forward_hook(self._dropping(probability)) for branch in (layer.attention, layer.mlp)]

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Remove the hooks of any `DropPath` from a model."""
        for hook in vars(find_tower(model) or model).pop("drop_path_hooks", ()):
            hook.remove()

    def _dropping(self, probability: float) -> Any:
        def drop(module: nn.Module, args: Any, output: Any) -> Any:
            if not (module.training and self._on):
                return output
            branch: Tensor = output[0] if isinstance(output, tuple) else output
            kept = torch.empty(len(branch), *[1] * (branch.dim() - 1), dtype=branch.dtype, device=branch.device)
            branch = branch * kept.bernoulli_(1 - probability).div_(1 - probability)
            return (branch, *output[1:]) if isinstance(output, tuple) else branch

        return drop

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Disable dropping, for reference passes through a model with adapters."""
        self._on = False
        try:
            yield
        finally:
            self._on = True
