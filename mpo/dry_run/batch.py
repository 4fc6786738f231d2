"""The sizes of a micro-batch that memory depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class BatchShape:
    """A collated micro-batch.

    ``tokens``: computed by the language model (for padded rows, padding included). ``keys``: over all segments of packed rows, the
    keys that their queries attend to; equal to ``tokens`` where no prompt is shared. ``masks``: queries times keys of the segments
    that need a mask, see `Segments.masks`. ``scored``: positions that meet the LM head. ``pixels``: values of the image tensors.
    """

    tokens: int
    keys: int
    masks: int
    scored: int
    tiles: int
    pixels: int
    packed: bool
    shared: bool

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> BatchShape:
        """Measure what `PairCollator` made."""
        tokens = batch["input_ids"].numel()
        segments = batch.get("segments")
        lengths = () if segments is None else segments.lengths
        pixels = batch.get("pixel_values")
        return cls(
            tokens=tokens,
            keys=sum(keys for _, keys in lengths) if lengths else tokens,
            masks=sum(queries * keys for queries, keys in lengths if queries not in (1, keys)),
            scored=batch["shift_labels"].numel(),
            tiles=0 if pixels is None else len(pixels),
            pixels=0 if pixels is None else pixels.numel(),
            packed=segments is not None,
            shared=segments is not None and segments.key_index is not None,
        )
