"""Estimate the peak memory of a training step on one rank: permanent memory, and the largest sum of temporary memory.

Weights, optimizer state and sharding are computed from the sizes of the parameters; temporary memory is that of a step on the meta
device (`mpo.preflight.trace`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpo.models.packable import find_text_model
from mpo.models.parts import base_model
from mpo.models.tower import find_tower
from mpo.preflight.structure import titles
from mpo.preflight.trace import CASTS, StepMemory, fields_of, trace_step

CUDA_CONTEXT = 700 * 2**20
"""CUDA context, kernels and cuBLAS workspaces, approximately, on recent NVIDIA GPUs; PyTorch does not count them."""
FRAGMENTATION = 0.05
"""Fraction of temporary memory that the caching allocator holds in addition: an allowance, not a formula."""
FOUR_BITS = 0.5 + (1 + 4 / 256) / 64
"""Bytes per weight in NF4 with double quantization (QLoRA, arXiv 2305.14314, section 3): 4 bits, a one-byte scale per 64
weights, and a float32 scale per 256 of those."""
SMALL = 4096
"""bitsandbytes keeps the state of tensors with fewer elements in 32 bits (`min_8bit_size`)."""
KINDS = {
    "one process": (),
    "ddp": (),
    "fsdp2": ("weights", "gradients", "optimiser", "reference"),
    "zero1": ("optimiser",),
    "zero2": ("gradients", "optimiser"),
    "zero3": ("weights", "gradients", "optimiser", "reference"),
}
"""What each strategy shards. ZeRO: arXiv 1910.02054, section 5; FSDP: arXiv 2304.11277. The reference model is sharded with the
policy under FSDP2, and by TRL under ZeRO-3."""


@dataclass(frozen=True)
class Sharding:
    """The sharding of a run over ``world_size`` ranks; ``kind`` is a key of `KINDS`."""

    kind: str = "one process"
    world_size: int = 1

    @classmethod
    def of(cls, trainer: Mapping[str, Any], ranks: int = 1) -> Sharding:
        """Derive the sharding from a job's trainer settings.

        Args:
            trainer: ``deepspeed`` (a mapping or a file) and ``fsdp``, as in `MPOConfig`.
            ranks: number of ranks.
        """
        deepspeed = trainer.get("deepspeed")
        if deepspeed:
            settings = deepspeed if isinstance(deepspeed, Mapping) else json.loads(Path(deepspeed).read_text())
            stage = int(settings.get("zero_optimization", {}).get("stage", 0))
            return cls(f"zero{stage}" if stage else "ddp", ranks)
        if trainer.get("fsdp"):
            return cls("fsdp2", ranks)
        return cls("ddp" if ranks > 1 else "one process", ranks)

    def share(self, what: str) -> float:
        """Return the fraction of `what` that one rank holds: 1, or 1 / ``world_size`` if it is sharded."""
        return 1 / self.world_size if what in KINDS[self.kind] else 1.0

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed holds the weights in half precision, and float32 master weights with the optimizer."""
        return self.kind.startswith("zero")

    def raises_weights(self, autocast: bool) -> bool:
        """Whether accelerate casts trained weights to float32, as `fsdp2_prepare_model` does under mixed precision."""
        return self.kind == "fsdp2" and autocast

    def __str__(self) -> str:
        names = {"ddp": "DDP", "fsdp2": "FSDP2", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}
        return self.kind if self.world_size == 1 else f"{names.get(self.kind, self.kind)}, {self.world_size} ranks"


@dataclass(frozen=True)
class Component:
    """A line of the estimate: bytes on one rank, and their explanation."""

    name: str
    size: int
    why: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank.

    ``fixed``: components allocated during the whole step. ``passing``: components allocated during a part of it. ``moments``:
    the largest sums of the latter in each phase of the step. ``margin``: allocator and driver. ``unknown``: why temporary memory
    is not included.
    """

    fixed: list[Component]
    passing: list[Component]
    moments: dict[str, int]
    margin: list[Component] = field(default_factory=list)
    unknown: str | None = None

    @property
    def peak_moment(self) -> str:
        """The phase of the step with the highest memory."""
        return max(self.moments, key=lambda moment: self.moments[moment])

    @property
    def step(self) -> int:
        """Peak of a training step without the margin."""
        return sum(component.size for component in self.fixed) + self.moments[self.peak_moment]

    @property
    def total(self) -> int:
        """Peak with the margin."""
        return self.step + sum(component.size for component in self.margin)


def estimate_memory(
    model: nn.Module,
    batch: Any,
    args: Any,
    *,
    gpu: bool,
    sharding: Sharding | None = None,
    four_bits: bool = False,
    with_adapters: bool = False,
) -> MemoryEstimate:
    """Estimate the peak memory of the second or a later training step, when the optimizer state exists.

    Args:
        model: the policy on the meta device, in the dtype of the run, trained where ``requires_grad``.
        batch: the most expensive micro-batch, as `PairCollator` returns it.
        args: the run's `MPOConfig`.
        gpu: whether the run uses GPUs.
        sharding: sharding of the run; None: one process.
        four_bits: QLoRA.
        with_adapters: the policy has adapters; the reference is the policy without them.
    """
    sharding = sharding or Sharding()
    autocast = bool(args.bf16 or args.fp16)
    compute = 2 if autocast else model.get_input_embeddings().weight.element_size()
    raised = sharding.raises_weights(autocast) and not four_bits

    def gradient(weight: Tensor) -> float:
        size = 2 if sharding.is_deepspeed else 4 if raised else weight.element_size()
        return weight.numel() * size * sharding.share("gradients")

    gradients = int(sum(gradient(weight) for weight in model.parameters() if weight.requires_grad))
    weights, weights_why = _weights(model, sharding, four_bits, raised)
    state, state_why = optimiser_bytes(model, args.optim, sharding, raised=raised)
    paged = "paged" in args.optim and gpu
    reference, reference_why = _reference(model, args, sharding, with_adapters)
    accumulates = args.gradient_accumulation_steps > 1
    tensors = [value for value in fields_of(batch).values() if isinstance(value, Tensor)]
    fixed = [
        Component("weights", weights, weights_why),
        Component("reference model", reference, reference_why),
        Component("optimiser state", 0 if paged else int(state * sharding.share("optimiser")), _paged(state, state_why, paged)),
        Component("the batch", sum(tensor.nbytes for tensor in tensors), "images, token ids and positions"),
    ]
    if accumulates:
        fixed.append(Component("gradients", gradients, "accumulated over the micro-batches of a step"))
    if sharding.kind == "ddp":
        fixed.append(Component("DDP's buckets", trained_bytes(model), "a second copy of the gradients, for communication"))
    if gathered := _gathered(model, sharding, compute):
        fixed.append(Component("gathered weights", gathered, "layers while they are used; embeddings and head throughout"))
    if four_bits:
        largest = max(weight.numel() for weight in model.parameters() if weight.dim() == 2 and not weight.requires_grad)
        fixed.append(Component("dequantized weights", 2 * largest, "one matrix at a time, in 16 bits"))
    # Weights are in half precision during a step when they are sharded or in 4 bits, so autocast makes no copies of them.
    half = autocast and (four_bits or sharding.is_deepspeed or "weights" in KINDS[sharding.kind])
    unknown = None
    try:
        step = trace_step(
            model,
            batch,
            args,
            titles(model),
            gpu=gpu,
            reference=args.mixture().needs_reference and (args.reference == "live" or with_adapters),
            gradients=lambda weight: 0.0 if accumulates else gradient(weight),
            dtype=(torch.bfloat16 if args.bf16 else torch.float16) if half else None,
        )
    except Exception as error:  # of any kind: the model's own code meets tensors without values
        unknown = f"{type(base_model(model)).__name__} reads values of tensors in its forward pass ({error})".split("\n")[0]
        step = StepMemory({}, {"end of the backward pass": 0 if accumulates else gradients})
    how = "with gradient checkpointing" if args.gradient_checkpointing else "without gradient checkpointing"
    passing = [
        Component(f"activations, {part}", size, f"kept for the backward pass, {how}")
        for part, size in step.kept.items()
        if size and part != CASTS
    ]
    if cast := step.kept.get(CASTS):
        passing.append(Component(CASTS, cast, "half-precision copies of weights made by autocast"))
    if not accumulates:
        passing.append(Component("gradients", gradients, "allocated by the backward pass"))
    margin = []
    if gpu:
        margin = [
            Component("allocator", int(FRAGMENTATION * max(step.phases.values())), f"{FRAGMENTATION:.0%} of temporary memory"),
            Component("CUDA", CUDA_CONTEXT, "context and libraries"),
        ]
    return MemoryEstimate(fixed, passing, step.phases, margin, unknown)


def _weights(model: nn.Module, sharding: Sharding, four_bits: bool, raised: bool) -> tuple[int, str]:
    total = weight_bytes(model, four_bits=four_bits)
    bits = 8 * model.get_input_embeddings().weight.element_size()
    why = "language model in 4 bits (NF4)" if four_bits else f"{bits} bits per weight"
    if sharding.is_deepspeed:
        return int(sum(2 * p.numel() for p in model.parameters()) * sharding.share("weights")), "16 bits per weight (DeepSpeed)"
    if raised:
        more = sum(p.numel() * (4 - p.element_size()) for p in model.parameters() if p.requires_grad)
        return int((total + more) * sharding.share("weights")), "trained weights in float32 (accelerate casts them under FSDP2)"
    return int(total * sharding.share("weights")), why


def _reference(model: nn.Module, args: Any, sharding: Sharding, with_adapters: bool) -> tuple[int, str]:
    if not args.mixture().needs_reference:
        return 0, "not needed by the losses"
    if with_adapters:
        return 0, "the policy with its adapters disabled"
    if args.reference == "cached":
        return 0, "cached log-probs; the reference model is in memory only before training"
    size = sum(p.numel() * (2 if sharding.is_deepspeed else p.element_size()) for p in model.parameters())
    return int(size * sharding.share("reference")), "a frozen copy of the initial model"


def _gathered(model: nn.Module, sharding: Sharding, compute: int) -> int:
    """Bytes of gathered weights under sharding: the current layer, the next one, and all weights outside of layers.

    FSDP2 wraps every layer; weights outside of layers (embeddings, head, projector) belong to the root, which stays gathered.
    DeepSpeed gathers up to ``stage3_max_live_parameters``, 1e9 by default.
    """
    if "weights" not in KINDS[sharding.kind]:
        return 0
    if sharding.is_deepspeed:
        return compute * min(10**9, sum(p.numel() for p in model.parameters()))
    base = base_model(model)
    tower: Any = find_tower(base)
    text: Any = find_text_model(base)
    layers = [*text.layers, *(getattr(getattr(tower, "encoder", None), "layer", []))]
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    root = sum(p.numel() for p in base.parameters()) - sum(blocks)
    return compute * (2 * max(blocks) + root) + 4 * max(blocks)  # and a layer's gradients before they are reduced


def _paged(state: int, why: str, paged: bool) -> str:
    return f"{why}: {state / 2**30:.2f} GiB, can be moved to CPU memory (paged)" if paged else why


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
