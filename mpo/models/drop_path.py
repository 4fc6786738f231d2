"""Stochastic depth (arXiv 1603.09382) for the vision tower, which the official recipes have and transformers does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpo.models.tower import find_tower


class DropPath:
    """Leaves out, tile by tile and at random, what a layer's attention or MLP adds, while the model is in training mode.

    What stays is divided by the share that stays. The rate grows linearly with depth, from 0 in the first layer to `rate` in the
    last, as in the official InternVisionEncoder. Nothing of it is in a checkpoint.

    Args:
        model: with an InternViT.
        rate: of the last layer; 0.1 (300M tower) or 0.4 (6B) in most official recipes.

    Raises:
        ValueError: for a model without a vision tower of this kind, or one that is frozen.
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        tower: Any = find_tower(model)
        layers = getattr(getattr(tower, "encoder", None), "layer", None)
        if not layers or not hasattr(layers[0], "lambda_1"):
            raise ValueError(f"vision_drop_path={rate} needs InternVL's vision tower; {type(model).__name__} has none.")
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError(f"vision_drop_path={rate} is for a vision tower that is trained; this one is frozen. Leave it out.")
        self.remove_from(model)
        self._on = True
        hooks = tower.drop_path_hooks = []
        for layer, share in zip(layers, torch.linspace(0, rate, len(layers)).tolist(), strict=True):
            if share > 0:
                hooks += [branch.register_forward_hook(self._dropping(share)) for branch in (layer.attention, layer.mlp)]

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Take it off a model again, also that of an earlier trainer."""
        for hook in vars(find_tower(model) or model).pop("drop_path_hooks", ()):
            hook.remove()

    def _dropping(self, share: float) -> Any:
        def drop(module: nn.Module, args: Any, output: Any) -> Any:
            if not (module.training and self._on):
                return output
            branch: Tensor = output[0] if isinstance(output, tuple) else output
            kept = torch.empty(len(branch), *[1] * (branch.dim() - 1), dtype=branch.dtype, device=branch.device)
            branch = branch * kept.bernoulli_(1 - share).div_(1 - share)
            return (branch, *output[1:]) if isinstance(output, tuple) else branch

        return drop

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within it nothing is left out: the reference of a model with adapters is the model itself."""
        self._on = False
        try:
            yield
        finally:
            self._on = True
