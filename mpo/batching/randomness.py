"""Disable the randomness of a forward pass: temporarily (evaluation mode) or permanently (dropout probabilities)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

Site = tuple[nn.Module, str, float]
"""A module, the attribute that holds a probability, and its value."""


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in evaluation mode inside the context (no dropout, NEFTune noise or drop path); then restore.

    The model may be wrapped, sharded or have adapters.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with trainable_in_4_bits(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def trainable_in_4_bits(model: nn.Module) -> Iterator[None]:
    """Keep bitsandbytes from packing layers for inference in evaluation mode, which on a CPU cannot be undone."""
    layers: list[Any] = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    try:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


@contextlib.contextmanager
def without_dropout(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Set all dropout probabilities of a model to 0 inside the context; then restore them and the random states.

    (Not `model.eval()`, which would also disable gradient checkpointing.)
    """
    before = dropout_sites(model)
    devices = [] if device.type in ("cpu", "mps") else [device]  # the CPU's state is always restored
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            for module, name, _ in before:
                setattr(module, name, 0.0)
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


def disable_dropout(model: nn.Module) -> None:
    """Set dropout probabilities to 0, except those of adapters, which are settings of the adapter.

    This includes probabilities that a module stores as a number and passes to a function, such as ``attention_dropout``.
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
    """The dropout probabilities of a model: ``p`` of dropout layers, and numbers of other modules named after dropout."""
    sites = []
    for module in model.modules():
        named = ["p"] if isinstance(module, _DropoutNd) else [name for name in vars(module) if "dropout" in name]
        sites += [(module, name, value) for name in named if isinstance(value := getattr(module, name), float)]
    return sites
