"""Estimate the activations of a micro-batch by part of the model, with and without gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mpo.models.family import INTERNVL, known_family
from mpo.models.packable import find_text_model
from mpo.models.parts import base_model
from mpo.models.tower import find_tower
from mpo.preflight.dry_run import language, vision
from mpo.preflight.dry_run.batch import BatchShape
from mpo.preflight.dry_run.head import head_kept, head_working
from mpo.preflight.dry_run.kept import is_trained, rms_norm
from mpo.preflight.dry_run.precision import Precision


@dataclass(frozen=True)
class PartMemory:
    """Bytes of one part of the model.

    ``kept``: activations kept for the backward pass. ``forward``, ``backward``: temporary memory in a forward pass without
    gradients (the reference's) and in the backward pass.
    """

    kept: int = 0
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Activations:
    """Memory of a micro-batch by part, in the order of the forward pass; ``unknown`` names the parts without a formula."""

    parts: dict[str, PartMemory]
    unknown: list[str] = field(default_factory=list)

    def kept(self) -> int:
        """Bytes kept at the end of the forward pass."""
        return sum(part.kept for part in self.parts.values())


def activations(
    model: Any, batch: BatchShape, precision: Precision, *, checkpointing: bool = False, liger: bool = False
) -> Activations:
    """Estimate a policy's activations.

    A layer keeps activations if the layer itself or any earlier one is trained. With gradient checkpointing (arXiv 1604.06174)
    each layer keeps only its input; the backward pass recomputes the activations of one layer at a time. A completely frozen vision
    tower keeps nothing (`mpo.models.tower.SharedTower`).

    Args:
        model: the policy, wrapped or not; parameters may be on the meta device.
        batch: the micro-batch.
        precision: precision of the run.
        checkpointing: gradient checkpointing of all layers.
        liger: use Liger's kernels in the language model.
    """
    base = base_model(model)
    text: Any = find_text_model(base)
    assert text is not None
    parts: dict[str, PartMemory] = {}
    unknown: list[str] = []
    flows = is_trained(text.get_input_embeddings())
    width = text.get_input_embeddings().embedding_dim
    tower: Any = find_tower(base)
    if tower is not None and batch.tiles:
        in_tower = is_trained(tower)
        family = known_family(base.config)
        if family is INTERNVL:
            parts["vision tower"] = _tower(tower, batch, precision, checkpointing)
        elif in_tower:
            unknown.append(type(tower).__name__)
        bridge = next((module for name, module in base.named_modules() if name.endswith(family.projector)), None)
        flows = flows or in_tower or (bridge is not None and is_trained(bridge))
        if bridge is not None and hasattr(bridge, "linear_1"):
            kept = 0
            if in_tower or is_trained(bridge):
                kept = vision.projector(bridge, batch.tiles * base.config.image_seq_length, precision)
            parts["projector"] = PartMemory(kept, kept, kept)

    def layer_kept(layer: Any) -> int:
        return language.decoder_layer(layer, batch, precision, liger=liger)

    try:
        # One byte per token for the image mask, eight for the token ids that the embedding keeps.
        shared = language.rotary(text.config, batch, precision) + 9 * batch.tokens
        stack = _stack(list(text.layers), layer_kept, batch.tokens * width * precision.stream, checkpointing, flows)
        forward, backward = language.working(text.layers[0], batch, precision)
        last = rms_norm(text.norm, batch.tokens, width, precision.stream, fused=liger)
        parts["language model"] = PartMemory(shared + stack.kept + last, forward, backward + stack.backward)
    except AttributeError as error:
        unknown.append(f"{type(text.layers[0]).__name__} ({error})")
    head = base.get_output_embeddings()
    forward, backward = head_working(batch, head.weight.shape[0], width, precision, trained=head.weight.requires_grad)
    parts["LM head"] = PartMemory(head_kept(batch, width, precision), forward, backward)
    return Activations(parts, unknown)


def _tower(tower: Any, batch: BatchShape, precision: Precision, checkpointing: bool) -> PartMemory:
    layers = list(tower.encoder.layer)
    patches = tower.embeddings.patch_embeddings.num_patches + 1
    width = layers[0].lambda_1.numel()
    forward, backward = vision.working(layers[0], patches, batch.tiles, precision)
    if not is_trained(tower):
        return PartMemory(0, forward, 0)
    stack = _stack(
        layers,
        lambda layer: vision.vision_layer(layer, patches, batch.tiles, precision),
        patches * batch.tiles * width * precision.stream,
        checkpointing,
        is_trained(tower.embeddings),
    )
    pixels = batch.pixels * precision.compute if precision.compute < 4 and is_trained(tower.embeddings) else 0
    return PartMemory(stack.kept + pixels, forward, backward + stack.backward)


def _stack(layers: list[Any], kept: Callable[[Any], int], input_: int, checkpointing: bool, flows: bool) -> PartMemory:
    """Memory of a stack of layers; with checkpointing, ``backward`` holds the recomputed activations of its largest layer."""
    if checkpointing:
        return PartMemory(len(layers) * input_, 0, max(map(kept, layers)))
    total = 0
    for layer in layers:
        flows = flows or is_trained(layer)
        total += kept(layer) if flows else 0
    return PartMemory(total, 0, 0)
