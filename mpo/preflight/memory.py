"""Estimate the peak memory of a training step on one rank: permanent memory, and the largest sum of temporary memory.

Weights, optimizer state and sharding are computed from the sizes of the parameters; temporary memory is that of a step on the meta
device (`mpo.preflight.trace`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mpo.models.parts import base_model
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
    "one process": ("one process", ()),
    "ddp": ("DDP", ()),
    "fsdp2": ("FSDP2", ("weights", "gradients", "optimiser", "reference")),
    "zero1": ("ZeRO-1", ("optimiser",)),
    "zero2": ("ZeRO-2", ("gradients", "optimiser")),
    "zero3": ("ZeRO-3", ("weights", "gradients", "optimiser", "reference")),
}
"""Name of each strategy, and what it shards. ZeRO: arXiv 1910.02054, section 5; FSDP: arXiv 2304.11277. The reference model is
sharded with the policy under FSDP2, and by TRL under ZeRO-3."""


@dataclass(frozen=True)
class Sharding:
    """The sharding of a run over ``world_size`` ranks; ``kind`` is a key of `KINDS`."""

    kind: str = "one process"
    world_size: int = 1

    @classmethod
    def of(cls, trainer: Mapping[str, Any], ranks: int = 1) -> Self:
        """Derive the sharding of `ranks` ranks from trainer settings: ``deepspeed`` (a mapping or a file) and ``fsdp``."""
        if deepspeed := trainer.get("deepspeed"):
            settings = deepspeed if isinstance(deepspeed, Mapping) else json.loads(Path(deepspeed).read_text())
            stage = int(settings.get("zero_optimization", {}).get("stage", 0))
            return cls(f"zero{stage}" if stage else "ddp", ranks)
        return cls("fsdp2" if trainer.get("fsdp") else "ddp" if ranks > 1 else "one process", ranks)

    def shards(self, what: str) -> bool:
        """Whether each rank holds a part of `what`."""
        return what in KINDS[self.kind][1]

    def share(self, what: str) -> float:
        """Return the fraction of `what` that one rank holds: 1, or 1 / ``world_size`` if it is sharded."""
        return 1 / self.world_size if self.shards(what) else 1.0

    @property
    def is_deepspeed(self) -> bool:
        """Whether DeepSpeed holds the weights in half precision, and float32 master weights with the optimizer."""
        return self.kind.startswith("zero")

    def __str__(self) -> str:
        return self.kind if self.world_size == 1 else f"{KINDS[self.kind][0]}, {self.world_size} ranks"


ONE_PROCESS = Sharding()


class Component(NamedTuple):
    """A line of the estimate: bytes on one rank, and their explanation."""

    name: str
    size: int
    why: str


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    fixed: list[Component]  # allocated during the whole step
    passing: list[Component]  # allocated during a part of it
    moments: dict[str, int]  # the largest sums of the latter in each phase of the step
    margin: list[Component]  # allocator and driver
    unknown: str | None = None  # why temporary memory is not included

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
    sharding: Sharding = ONE_PROCESS,
    four_bits: bool = False,
    with_adapters: bool = False,
) -> MemoryEstimate:
    """Estimate the peak memory of the second or a later training step, when the optimizer state exists.

    `model` is the policy on the meta device, in the dtype of the run, trained where ``requires_grad``; `batch` the most expensive
    micro-batch. `with_adapters`: the reference is the policy without its adapters.
    """
    raised = sharding.kind == "fsdp2" and bool(args.bf16 or args.fp16) and not four_bits  # as `fsdp2_prepare_model` does
    accumulates = args.gradient_accumulation_steps > 1

    def gradient(weight: Tensor) -> float:
        size = 2 if sharding.is_deepspeed else 4 if raised else weight.element_size()
        return weight.numel() * size * sharding.share("gradients")

    gradients = int(sum(gradient(weight) for weight in model.parameters() if weight.requires_grad))
    fixed = _permanent(model, batch, args, gpu, sharding, four_bits, with_adapters, raised)
    if accumulates:
        fixed.insert(4, Component("gradients", gradients, "accumulated over the micro-batches of a step"))
    # Weights are in half precision during a step when they are sharded or in 4 bits, so autocast makes no copies of them.
    half = (four_bits or sharding.is_deepspeed or sharding.shards("weights")) and (args.bf16 or args.fp16)
    unknown = None
    try:
        step = trace_step(
            model,
            batch,
            args,
            titles(model),
            gpu=gpu,
            reference=args.needs_reference and (args.reference == "live" or with_adapters),
            gradients=lambda weight: 0.0 if accumulates else gradient(weight),
            dtype=(torch.bfloat16 if args.bf16 else torch.float16) if half else None,
        )
    except Exception as error:  # of any kind: the model's own code meets tensors without values
        unknown = f"{type(base_model(model)).__name__} reads values of tensors in its forward pass ({error})".split("\n")[0]
        step = StepMemory({}, {"end of the backward pass": 0 if accumulates else gradients})
    kept = f"kept for the backward pass, {'with' if args.gradient_checkpointing else 'without'} gradient checkpointing"
    passing = [Component(f"activations, {part}", size, kept) for part, size in step.kept.items() if size and part != CASTS]
    if cast := step.kept.get(CASTS):
        passing.append(Component(CASTS, cast, "half-precision copies of weights made by autocast"))
    if not accumulates:
        passing.append(Component("gradients", gradients, "allocated by the backward pass"))
    margin = [
        Component("allocator", int(FRAGMENTATION * max(step.phases.values())), f"{FRAGMENTATION:.0%} of temporary memory"),
        Component("CUDA", CUDA_CONTEXT, "context and libraries"),
    ]
    return MemoryEstimate(fixed, passing, step.phases, margin if gpu else [], unknown)


def _permanent(
    model: Any, batch: Any, args: Any, gpu: bool, sharding: Sharding, four_bits: bool, with_adapters: bool, raised: bool
) -> list[Component]:
    """What exists during the whole step: weights, reference, optimizer state, batch, and buffers of the strategy."""
    bits = 8 * model.get_input_embeddings().weight.element_size()
    weights, weights_why = weight_bytes(model, four_bits=four_bits), f"{bits} bits per weight"
    if sharding.is_deepspeed:
        weights, weights_why = 2 * _numbers(model), "16 bits per weight (DeepSpeed)"
    elif raised:
        weights += sum(p.numel() * (4 - p.element_size()) for p in model.parameters() if p.requires_grad)
        weights_why = "trained weights in float32 (accelerate casts them under FSDP2)"
    elif four_bits:
        weights_why = "language model in 4 bits (NF4)"
    reference = 0
    if not args.needs_reference:
        reference_why = "not needed by the losses"
    elif with_adapters:
        reference_why = "the policy with its adapters disabled"
    elif args.reference == "cached":
        reference_why = "cached log-probs; the reference model is in memory only before training"
    else:
        reference = sum(p.numel() * (2 if sharding.is_deepspeed else p.element_size()) for p in model.parameters())
        reference_why = "a frozen copy of the initial model"
    state, state_why = optimiser_bytes(model, args.optim, sharding, raised=raised)
    if "paged" in args.optim and gpu:
        state, state_why = 0, f"{state_why}: {state / 2**30:.2f} GiB, can be moved to CPU memory (paged)"
    tensors = [value for value in fields_of(batch).values() if isinstance(value, Tensor)]
    found = [
        Component("weights", int(weights * sharding.share("weights")), weights_why),
        Component("reference model", int(reference * sharding.share("reference")), reference_why),
        Component("optimiser state", int(state * sharding.share("optimiser")), state_why),
        Component("the batch", sum(tensor.nbytes for tensor in tensors), "images, token ids and positions"),
    ]
    if sharding.kind == "ddp":
        found.append(Component("DDP's buckets", trained_bytes(model), "a second copy of the gradients, for communication"))
    if sharding.shards("weights"):
        gathered = _gathered(model, sharding, 2 if args.bf16 or args.fp16 else bits // 8)
        found.append(Component("gathered weights", gathered, "layers while they are used; embeddings and head throughout"))
    if four_bits:
        largest = max(weight.numel() for weight in model.parameters() if weight.dim() == 2 and not weight.requires_grad)
        found.append(Component("dequantized weights", 2 * largest, "one matrix at a time, in 16 bits"))
    return found


def _gathered(model: nn.Module, sharding: Sharding, compute: int) -> int:
    """Bytes of gathered weights under sharding: the current layer, the next one, and all weights outside of layers.

    FSDP2 wraps every layer; weights outside of layers (embeddings, head, projector) belong to the root, which stays gathered.
    DeepSpeed gathers up to ``stage3_max_live_parameters``, 1e9 by default.
    """
    if sharding.is_deepspeed:
        return compute * min(10**9, _numbers(model))
    base = base_model(model)
    layers = [_numbers(module) for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    largest = max(layers, default=0)
    return compute * (2 * largest + _numbers(base) - sum(layers)) + 4 * largest  # and a layer's gradients before they are reduced


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(model: nn.Module, *, four_bits: bool) -> int:
    """Bytes of the weights as loaded; shared ones count once. `four_bits`: the language model's linear layers are in NF4."""
    part_of, modules = titles(model), model.named_modules() if four_bits else ()
    linears = ((name, module) for name, module in modules if isinstance(module, nn.Linear))
    quantised = {id(module.weight) for name, module in linears if part_of(name) == "language model"}
    weights = sum(p.numel() * (FOUR_BITS if id(p) in quantised else p.element_size()) for p in model.parameters())
    return int(weights) + sum(buffer.nbytes for buffer in model.buffers())


def trained_bytes(model: nn.Module) -> int:
    """Bytes of trained weights, which is also the size of their gradients."""
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


def optimiser_bytes(model: nn.Module, optim: str, sharding: Sharding, *, raised: bool = False) -> tuple[int, str]:
    """Bytes of the optimizer state over all ranks, and an explanation.

    AdamW holds two moments per weight in the weight's dtype (arXiv 1711.05101; `torch.optim.AdamW`). 8-bit AdamW (arXiv 2110.02861)
    holds one byte per moment and a float32 scale per 256 of them, except for embeddings and small tensors. DeepSpeed adds float32
    master weights and holds moments in float32. `raised`: trained weights are cast to float32 after loading (FSDP2 in accelerate).
    """
    owners = {p: module for module in model.modules() for p in module.parameters(recurse=False) if p.requires_grad}
    if sharding.is_deepspeed:
        size, why = 12.0 * sum(p.numel() for p in owners), "float32 master weights and two moments, 12 bytes per weight"
    elif "8bit" in optim and not optim.startswith(("adamw_torch", "galore", "apollo")):  # bitsandbytes
        count = 1 if "lion" in optim else 2 if "adamw" in optim else 3
        wide = {p for p, module in owners.items() if p.numel() < SMALL or isinstance(module, nn.Embedding)}
        size = sum(count * p.numel() * (4 if p in wide else 1 + 4 / 256) for p in owners)
        why = f"{count} moments in 8 bits, those of embeddings in 32"
    elif optim in ("adamw_torch", "adamw_torch_fused", "adamw_anyprecision"):
        size, why = sum(2 * p.numel() * (4 if raised else p.element_size()) for p in owners), "two moments in the weights' dtype"
    elif optim == "adafactor":
        rows = (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() > 1 else p.numel() for p in owners)
        size, why = 4 * sum(rows), "one row and one column per matrix"
    elif optim == "sgd":
        size, why = 0, "SGD has no state"
    elif "lion" in optim:
        size, why = sum(4 * p.numel() for p in owners), "one moment in float32"
    else:
        known = optim == "paged_adamw_32bit"
        why = "two moments in float32" if known else f"no formula for optim={optim}: estimated as two moments in float32"
        size = sum(8 * p.numel() for p in owners)
    return int(size), why
