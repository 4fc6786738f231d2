"""What makes a forward pass random, switched off: for a while (evaluation mode), or for good (dropout probabilities)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

Site = tuple[nn.Module, str, float]
"""A module, the attribute that holds a probability, and its value."""


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it every module of `model` is in evaluation mode: no dropout, NEFTune noise or drop path. Then each is as before.

    Layers of bitsandbytes, which are never random, are in training mode: on a CPU they would be packed for inference, for good.

    Args:
        model: may be wrapped, sharded or have adapters.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in modes:
        if type(module).__module__.startswith("bitsandbytes"):
            module.training = True
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def disable_dropout(model: nn.Module) -> None:
    """Set dropout probabilities to 0, except those of adapters, which were asked for with the adapter.

    This includes probabilities that a module holds as a number and passes to a function, such as ``attention_dropout``.
    """
    spared = {
        id(inner)
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, child in layer.named_children()
        if name != "base_layer"
        for inner in child.modules()
    }
    for module, name, _ in dropout_sites(model):
        if id(module) not in spared and not isinstance(module, BaseTunerLayer):
            setattr(module, name, 0.0)


def dropout_sites(model: nn.Module) -> list[Site]:
    """Where a model holds dropout probabilities: ``p`` of dropout layers, and numbers of other modules named after dropout."""
    sites = []
    for module in model.modules():
        named = ["p"] if isinstance(module, _DropoutNd) else [name for name in vars(module) if "dropout" in name]
        sites += [(module, name, value) for name in named if isinstance(value := getattr(module, name), float)]
    return sites
