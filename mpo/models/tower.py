"""Run a frozen vision tower once per image: the reference reuses the output of the policy's forward pass."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def find_tower(model: nn.Module) -> nn.Module | None:
    """The vision tower of a vision-language model, wrapped or not; None if there is none."""
    return next((module for name, module in model.named_modules() if name.split(".")[-1] == "vision_tower"), None)


class SharedTower:
    """Record the output of one model's tower and replay it in place of another's.

    Args:
        policy: the model whose tower runs; it must be frozen and deterministic (see `can_share`).
        reference: the model whose tower does not run; may be the same model with its adapters disabled.
    """

    def __init__(self, policy: nn.Module, reference: nn.Module) -> None:
        self._output: Any = None
        self._playing = False
        for tower in {id(t): t for t in (find_tower(policy), find_tower(reference)) if t is not None}.values():
            self._wrap(tower)

    def _wrap(self, tower: nn.Module) -> None:
        forward = getattr(tower.forward, "unshared", tower.forward)  # undo the sharing of an earlier trainer

        def once(*args: Any, **kwargs: Any) -> Any:
            if self._playing:
                assert self._output is not None, "the policy's forward pass comes first"
                return self._output
            with torch.no_grad():  # a hook that makes inputs require gradients would keep activations
                self._output = forward(*args, **kwargs)
            return self._output

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
