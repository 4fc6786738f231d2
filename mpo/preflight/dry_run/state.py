"""Bytes of weights, gradients and optimizer state."""

from __future__ import annotations

from typing import Any

from torch import nn

from mpo.preflight.dry_run.parts import titles
from mpo.preflight.dry_run.sharding import Sharding

FOUR_BITS = 0.5 + (1 + 4 / 256) / 64
"""Bytes per weight in NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3): 4 bits, a one-byte scale per 64
weights, and a float32 scale per 256 of those."""
SMALL = 4096
"""bitsandbytes keeps the state of tensors with fewer elements in 32 bits (`min_8bit_size`)."""


def weight_bytes(model: nn.Module, *, four_bits: bool) -> int:
    """Bytes of the weights as they are loaded; shared parameters count once.

    Args:
        model: the policy; parameters may be on the meta device, in the dtype of the run.
        four_bits: whether the linear layers of the language model are in NF4.
    """
    quantised = _matrices_of_language_model(model) if four_bits else set()
    total = 0.0
    for parameter in model.parameters():
        total += parameter.numel() * (FOUR_BITS if id(parameter) in quantised else parameter.element_size())
    return int(total) + sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())


def trained_bytes(model: nn.Module, part: str | None = None) -> int:
    """Bytes of trained weights, which is also the size of their gradients; of one part, or of all."""
    part_of = titles(model) if part is not None else None
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (part_of is None or part_of(name) == part)
    )


def optimiser_bytes(model: nn.Module, optim: str, sharding: Sharding, *, raised: bool = False) -> tuple[int, str]:
    """Bytes of the optimizer state over all ranks, and an explanation.

    AdamW holds two moments per weight in the weight's dtype (arXiv 1711.05101; `torch.optim.AdamW`). 8-bit AdamW (arXiv 2110.02861)
    holds one byte per moment and a float32 scale per 256 of them, except for embeddings and small tensors. DeepSpeed adds float32
    master weights and holds moments in float32.

    Args:
        model: the policy.
        optim: ``MPOConfig.optim``.
        sharding: sharding of the run.
        raised: trained weights are cast to float32 after loading (`raises_weights`).
    """
    trained = [(module, p) for module in model.modules() for p in module.parameters(recurse=False) if p.requires_grad]
    trained = list({id(p): (module, p) for module, p in trained}.values())
    if sharding.is_deepspeed:
        return 12 * sum(p.numel() for _, p in trained), "float32 master weights and two moments, 12 bytes per weight"
    if "8bit" in optim and not optim.startswith(("adamw_torch", "galore", "apollo")):  # bitsandbytes
        count = 1 if "lion" in optim else 2 if "adamw" in optim else 3
        total = 0.0
        for module, p in trained:
            wide = p.numel() < SMALL or isinstance(module, nn.Embedding)
            total += count * p.numel() * (4 if wide else 1 + 4 / 256)
        return int(total), f"{count} moments in 8 bits, those of embeddings in 32"
    if optim in ("adamw_torch", "adamw_torch_fused", "adamw_anyprecision"):
        return sum(2 * p.numel() * (4 if raised else p.element_size()) for _, p in trained), "two moments in the weights' dtype"
    if optim == "paged_adamw_32bit":
        return sum(8 * p.numel() for _, p in trained), "two moments in float32"
    if optim == "adafactor":
        numbers = sum(p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel() for _, p in trained)
        return 4 * numbers, "one row and one column per matrix"
    if optim == "sgd":
        return 0, "SGD has no state"
    if "lion" in optim:
        return sum(4 * p.numel() for _, p in trained), "one moment in float32"
    return sum(8 * p.numel() for _, p in trained), f"no formula for optim={optim}: estimated as two moments in float32"


def _matrices_of_language_model(model: nn.Module) -> set[int]:
    named: Any = model.named_modules()
    part_of = titles(model)
    return {id(module.weight) for name, module in named if isinstance(module, nn.Linear) and part_of(name) == "language model"}
