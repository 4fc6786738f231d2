"""Dataclasses of tensors that accelerate, the Trainer and data loaders move like a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self

import torch
from torch import Tensor


class Movable:
    """Base of a dataclass whose tensors, also nested ones and those in dictionaries, move together."""

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Self:
        """A copy on a device; accelerate and the Trainer call this."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """A copy in pinned memory; data loaders call this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> Self:
        own: Any = self
        values = {part.name: getattr(self, part.name) for part in fields(own)}
        changed = {name: _changed(value, change) for name, value in values.items()}
        moved: Self = own if all(changed[name] is value for name, value in values.items()) else replace(own, **changed)
        return moved  # itself, with what it has computed (`Segments.masks`), if it is there already


def _changed(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, Tensor | Movable):
        return change(value)
    return {name: _changed(each, change) for name, each in value.items()} if isinstance(value, dict) else value
