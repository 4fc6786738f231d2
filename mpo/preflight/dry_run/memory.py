"""Estimate the peak memory of a training step on one rank: permanent memory, and the largest sum of temporary memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mpo.models.packable import find_text_model
from mpo.models.parts import base_model
from mpo.models.tower import find_tower, tower_layers
from mpo.preflight.dry_run.activations import Activations, PartMemory, activations
from mpo.preflight.dry_run.batch import BatchShape
from mpo.preflight.dry_run.parts import titles
from mpo.preflight.dry_run.precision import Precision
from mpo.preflight.dry_run.sharding import KINDS, Sharding
from mpo.preflight.dry_run.state import optimiser_bytes, trained_bytes, weight_bytes

CUDA_CONTEXT = 700 * 2**20
"""CUDA context, kernels and cuBLAS workspaces, approximately, on recent NVIDIA GPUs; PyTorch does not count them."""
FRAGMENTATION = 0.05
"""Fraction of temporary memory that the caching allocator holds in addition: an allowance, not a formula."""


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
    sums of the latter at each point of the step that can be the peak. ``margin``: allocator and driver. ``unknown``: parts without
    a formula.
    """

    fixed: list[Component]
    passing: list[Component]
    moments: dict[str, int]
    margin: list[Component] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def peak_moment(self) -> str:
        """The point of the step with the highest memory."""
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
    batch: BatchShape,
    args: Any,
    *,
    gpu: bool,
    sharding: Sharding | None = None,
    four_bits: bool = False,
    with_adapters: bool = False,
) -> MemoryEstimate:
    """Estimate the peak memory of the second or a later training step, when the optimizer state exists.

    Args:
        model: the policy; parameters may be on the meta device, in the dtype of the run, trained where ``requires_grad``.
        batch: the most expensive micro-batch.
        args: the run's `MPOConfig`.
        gpu: whether the run uses GPUs.
        sharding: sharding of the run; None: one process.
        four_bits: QLoRA.
        with_adapters: the policy has adapters; the reference is the policy without them.

    Returns:
        the estimate. A step consists of the policy's forward pass, the reference's forward pass while the policy's activations
        are kept, the backward pass, which frees activations and allocates gradients part by part, and the optimizer's step.
    """
    sharding = sharding or Sharding()
    precision = Precision.of(model, args, gpu=gpu)
    found = activations(model, batch, precision, checkpointing=args.gradient_checkpointing, liger=args.use_liger_kernel)
    raised = sharding.raises_weights(precision.autocast) and not four_bits
    weights, weights_why = _weights(model, sharding, precision, four_bits, raised)
    gradients = _gradients(model, sharding, raised)
    state, state_why = optimiser_bytes(model, args.optim, sharding, raised=raised)
    paged = "paged" in args.optim and gpu
    reference, reference_why = _reference(model, args, sharding, with_adapters)
    accumulates = args.gradient_accumulation_steps > 1
    fixed = [
        Component("weights", weights, weights_why),
        Component("reference model", reference, reference_why),
        Component("optimiser state", 0 if paged else int(state * sharding.share("optimiser")), _paged(state, state_why, paged)),
        Component("the batch", 4 * batch.pixels + 40 * batch.tokens, "images in float32, token ids and positions"),
    ]
    if accumulates:
        fixed.append(Component("gradients", gradients, "accumulated over the micro-batches of a step"))
    if sharding.kind == "ddp":
        fixed.append(Component("DDP's buckets", trained_bytes(model), "a second copy of the gradients, for communication"))
    gathered = _gathered(model, sharding, precision)
    if gathered:
        fixed.append(Component("gathered weights", gathered, "layers while they are used; embeddings and head throughout"))
    kept = Component("activations", found.kept(), _activations_why(batch, args))
    # Sharded weights are gathered in half precision, so autocast makes no copies.
    unsharded = "weights" not in KINDS[sharding.kind]
    copies = _autocast_copies(model, precision, args.gradient_checkpointing) if unsharded else {}
    head = found.parts["LM head"]
    passing = [kept, Component("logits", head.backward, f"LM head on {batch.labelled:,} labelled positions, backward")]
    if copies:
        passing.append(Component("casts of weights", sum(copies.values()), "half-precision copies of weights made by autocast"))
    if not accumulates:
        passing.append(Component("gradients", gradients, "allocated by the backward pass"))
    share = 0.0 if accumulates else sharding.share("gradients")
    moments = _moments(model, found, copies, share, reference > 0 or _reference_runs(args, with_adapters), args)
    step = sum(component.size for component in fixed) + max(moments.values())
    margin = []
    if gpu:
        margin = [
            Component("allocator", int(FRAGMENTATION * max(moments.values())), f"{FRAGMENTATION:.0%} of temporary memory"),
            Component("CUDA", CUDA_CONTEXT, "context and libraries"),
        ]
    assert step > 0
    return MemoryEstimate(fixed, passing, moments, margin, found.unknown)


def _moments(
    model: nn.Module, found: Activations, copies: dict[str, int], share: float, reference: bool, args: Any
) -> dict[str, int]:
    """Temporary memory at each point of the step that can be the peak."""
    none = PartMemory()
    vision, language, head = (found.parts.get(part, none) for part in ("vision tower", "language model", "LM head"))
    early = sum(found.parts.get(part, none).kept for part in ("vision tower", "projector"))
    everything = found.kept()
    # With checkpointing, copies of trained weights live until the forward pass ends; the backward pass copies one layer at a time.
    cast = sum(copies.values())
    cast_backward = 0 if args.gradient_checkpointing else cast
    cast_vision = 0 if args.gradient_checkpointing else copies.get("vision tower", 0) + copies.get("projector", 0)

    def gradients(*parts: str) -> int:
        return int(share * sum(trained_bytes(model, part) for part in parts))

    forwards = max(head.forward, *(part.forward for part in found.parts.values())) if reference else head.forward
    after = gradients("LM head", "language model", "adapters")
    late = _embedding_gradient(model)
    return {
        "vision tower, forward": vision.forward,
        "end of the forward pass": everything + cast + forwards,
        "LM head, backward": everything + cast_backward + head.backward,
        "language model, backward begins": everything + cast_backward + gradients("LM head") + language.backward,
        "vision tower, backward begins": early + cast_vision + after - (late if share else 0) + vision.backward,
        "end of the backward pass": after + gradients("vision tower", "projector") + (0 if share else late),
    }


def _weights(model: nn.Module, sharding: Sharding, precision: Precision, four_bits: bool, raised: bool) -> tuple[int, str]:
    total = weight_bytes(model, four_bits=four_bits)
    why = "language model in 4 bits (NF4)" if four_bits else f"{8 * precision.stream} bits per weight"
    if sharding.is_deepspeed:
        return int(sum(2 * p.numel() for p in model.parameters()) * sharding.share("weights")), "16 bits per weight (DeepSpeed)"
    if raised:
        more = sum(p.numel() * (4 - p.element_size()) for p in model.parameters() if p.requires_grad)
        return int((total + more) * sharding.share("weights")), "trained weights in float32 (accelerate casts them under FSDP2)"
    return int(total * sharding.share("weights")), why


def _gradients(model: nn.Module, sharding: Sharding, raised: bool) -> int:
    size = trained_bytes(model)
    if sharding.is_deepspeed:
        size = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    elif raised:
        size = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return int(size * sharding.share("gradients"))


def _reference_runs(args: Any, with_adapters: bool) -> bool:
    return bool(args.mixture().needs_reference and (args.reference == "live" or with_adapters))


def _reference(model: nn.Module, args: Any, sharding: Sharding, with_adapters: bool) -> tuple[int, str]:
    if not args.mixture().needs_reference:
        return 0, "not needed by the losses"
    if with_adapters:
        return 0, "the policy with its adapters disabled"
    if args.reference == "cached":
        return 0, "cached log-probs; the reference model is in memory only before training"
    size = sum(p.numel() * (2 if sharding.is_deepspeed else p.element_size()) for p in model.parameters())
    return int(size * sharding.share("reference")), "a frozen copy of the initial model"


def _gathered(model: nn.Module, sharding: Sharding, precision: Precision) -> int:
    """Bytes of gathered weights under sharding: the current layer, the next one, and all weights outside of layers.

    FSDP2 wraps every layer; weights outside of layers (embeddings, head, projector) belong to the root, which stays gathered.
    DeepSpeed gathers up to ``stage3_max_live_parameters``, 1e9 by default.
    """
    if "weights" not in KINDS[sharding.kind]:
        return 0
    if sharding.is_deepspeed:
        return precision.compute * min(10**9, sum(p.numel() for p in model.parameters()))
    base = base_model(model)
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in _layers(base)]
    root = sum(p.numel() for p in base.parameters()) - sum(blocks)
    return precision.compute * (2 * max(blocks) + root) + 4 * max(blocks)  # and a layer's gradients before they are reduced


def _layers(base: Any) -> list[Any]:
    text: Any = find_text_model(base)
    return [*text.layers, *tower_layers(base)]


def _autocast_copies(model: nn.Module, precision: Precision, checkpointing: bool) -> dict[str, int]:
    """Bytes of half-precision copies of float32 matrices, by part.

    Autocast keeps copies of trained weights until the forward pass ends. Autograd keeps copies of all weights that a gradient flows
    through until the backward pass, unless checkpointing recomputes them. The LM head and a completely frozen vision tower keep
    none.
    """
    if not precision.casts:
        return {}
    tower = find_tower(model)
    frozen = tower is not None and not any(p.requires_grad for p in tower.parameters())
    copies: dict[str, int] = {}
    part_of = titles(model)
    for name, module in model.named_modules():
        part = part_of(name)
        if not isinstance(module, nn.Linear) or part == "LM head" or (frozen and part == "vision tower"):
            continue
        if module.weight.requires_grad or not checkpointing:
            copies[part] = copies.get(part, 0) + module.weight.numel() * precision.compute
    return copies


def _embedding_gradient(model: nn.Module) -> int:
    """Bytes of the gradient of the input embeddings, computed last; a separate tensor even if tied to the head."""
    weight = base_model(model).get_input_embeddings().weight
    return weight.numel() * weight.element_size() if weight.requires_grad else 0


def _activations_why(batch: BatchShape, args: Any) -> str:
    how = "inputs of layers only (gradient checkpointing)" if args.gradient_checkpointing else "all layers"
    return f"{batch.tokens:,} tokens, {batch.tiles} tiles, {how}"


def _paged(state: int, why: str, paged: bool) -> str:
    return f"{why}: {state / 2**30:.2f} GiB, can be moved to CPU memory (paged)" if paged else why
