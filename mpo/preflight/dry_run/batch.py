"""The sizes of a micro-batch that determine its memory."""

from __future__ import annotations

from dataclasses import dataclass

from mpo.batching.batch import Batch


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a collated micro-batch.

    ``tokens``: tokens of all rows, with the padding of padded rows. ``keys``: keys that the queries attend to, summed over the
    segments of packed rows; equal to ``tokens`` if no prompt is shared. ``masks``: queries times keys of the segments that need a
    mask, see `Segments.masks`. ``labelled``: positions whose logits are computed. ``pixels``: elements of the image
    tensors.
    """

    tokens: int
    keys: int
    masks: int
    labelled: int
    tiles: int
    pixels: int
    packed: bool
    shared: bool

    @classmethod
    def of(cls, batch: Batch) -> BatchShape:
        """Measure a batch."""
        tokens = batch["input_ids"].numel()
        segments = batch.model_inputs.get("segments")
        lengths = () if segments is None else segments.lengths
        pixels = batch.model_inputs.get("pixel_values")
        return cls(
            tokens=tokens,
            keys=sum(keys for _, keys in lengths) if lengths else tokens,
            masks=sum(queries * keys for queries, keys in lengths if queries not in (1, keys)),
            labelled=batch.shift_labels.numel(),
            tiles=0 if pixels is None else len(pixels),
            pixels=0 if pixels is None else pixels.numel(),
            packed=segments is not None,
            shared=segments is not None and segments.key_index is not None,
        )
