"""The vision tower: find it, share a frozen one's output between policy and reference, and train one with stochastic depth."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpo.models.family import FAMILIES, family_of, known_family
from mpo.models.parts import base_model


def find_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower of a model of a known family, wrapped or not; None if there is none."""
    tower = known_family(base_model(model).config).vision
    return next((module for name, module in model.named_modules() if tower and name.split(".")[-1] == tower), None)


def tower_layers(model: nn.Module) -> list[Any]:
    """The layers of a model's vision tower, the first one first; empty if there is none."""
    tower, layers = find_tower(model), known_family(base_model(model).config).layers
    stacks = [] if tower is None else [module for name, module in tower.named_modules() if f".{name}".endswith(f".{layers}")]
    return list(stacks[0]) if stacks else []  # type: ignore[call-overload]


class SharedTower:
    """Record the output of the policy's tower and replay it in place of the reference's, so that it runs once per image.

    The policy's must be frozen and deterministic (`can_share`). Both may be the same model, with its adapters disabled.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        self._output: Any = None
        self._playing = False
        for tower in {id(t): t for t in (find_tower(policy), find_tower(reference)) if t is not None}.values():
            self._wrap(tower)

    def _wrap(self, tower: nn.Module) -> None:
        forward = getattr(tower.forward, "unshared", tower.forward)  # undo the sharing of an earlier trainer

        def once(*args: Any, **kwargs: Any) -> Any:
            if not self._playing:
                with torch.no_grad():  # a hook that makes inputs require gradients would keep activations
                    self._output = forward(*args, **kwargs)
            assert self._output is not None, "the policy's forward pass comes first"
            return copy.copy(self._output)  # Qwen's models change its fields

        once.unshared = forward  # type: ignore[attr-defined]
        tower.forward = once  # type: ignore[method-assign]  # FSDP and ZeRO need modules and hooks unchanged

    @contextlib.contextmanager
    def playing(self, *, keep: bool = False) -> Iterator[None]:
        """Replay the last recorded output; on exit it is dropped, unless `keep`."""
        self._playing = True
        try:
            yield
        finally:
            self._playing = False
            self._output = self._output if keep else None


def can_share(model: nn.Module) -> bool:
    """Whether a model has a vision tower that is frozen and deterministic."""
    tower = find_tower(model)
    if tower is None or any(parameter.requires_grad for parameter in tower.parameters()):
        return False
    return not any(
        getattr(module, "attention_dropout", 0) or (isinstance(module, nn.Dropout) and module.p) for module in tower.modules()
    )


class DropPath:
    """Stochastic depth (arXiv 1603.09382): drop the output of a layer's attention or MLP for random tiles, in training mode.

    Kept outputs are divided by the keep probability. The rate grows linearly with depth, from 0 in the first layer to `rate` in
    the last (0.1 for the 300M tower, 0.4 for the 6B, in most official recipes), as in the official InternVisionEncoder;
    transformers has none. It adds nothing to a checkpoint. The model's tower is trained, with branches of one output row per tile
    in its layers (`mpo.models.family`).
    """

    def __init__(self, model: nn.Module, rate: float) -> None:
        tower, layers = find_tower(model), tower_layers(model)
        branches = family_of(base_model(model).config, f"vision_drop_path={rate}").branches
        if tower is None or not branches:
            known = ", ".join(name for family in FAMILIES if family.branches for name in family.types)
            kind = base_model(model).config.model_type
            raise ValueError(f"vision_drop_path={rate} needs a vision tower of {known}; the model is a {kind!r}. Leave it out.")
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            raise ValueError(f"vision_drop_path={rate} has no effect: the vision tower is frozen. Leave it out.")
        self.remove_from(model)
        self._on = True
        hooks = vars(tower)["drop_path_hooks"] = []
        for layer, probability in zip(layers, torch.linspace(0, rate, len(layers)).tolist(), strict=True):
            if probability > 0:
                hooks += [getattr(layer, name).register_forward_hook(self._dropping(probability)) for name in branches]

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
