"""Run a low-precision model in float32 without storing it in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


@contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Run every module with temporary float32 copies of its weights.

    The logits are those of ``model.float()``; the extra memory is that of one layer.
    """
    narrow: dict[nn.Module, list[Tensor]] = {}

    def widen(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        narrow[module] = [parameter.data for parameter in _own(module)]
        for parameter in _own(module):
            parameter.data = _wide(parameter.data)
        return tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}

    def restore(module: nn.Module, args: Any, output: Any) -> None:
        for parameter, data in zip(_own(module), narrow.pop(module), strict=True):
            parameter.data = data

    owners = [module for module in model.modules() if next(iter(_own(module)), None) is not None]
    hooks = [module.register_forward_pre_hook(widen, with_kwargs=True) for module in owners]
    hooks += [module.register_forward_hook(restore, always_call=True) for module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _own(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a module's own forward uses; an adapter layer also reads those of its base layer."""
    return list(module.parameters(recurse=isinstance(module, BaseTunerLayer)))


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
