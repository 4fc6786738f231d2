"""Memory of the LM head: it computes logits of labelled positions only, in tiles (TRL's fused head)."""

from __future__ import annotations

from mpo.preflight.dry_run.batch import BatchShape
from mpo.preflight.dry_run.precision import Precision

CHUNK = 32_768
"""Vocabulary entries of a tile of TRL's fused head (`trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE`, TRL 1.16)."""
ROWS = 4_096
"""Positions of a tile (`trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE`)."""


def head_kept(batch: BatchShape, width: int, precision: Precision) -> int:
    """Bytes kept for the backward pass: the hidden state and a few numbers of each labelled position."""
    return batch.labelled * (precision.stream * width + 2 * 8 + 2 * 4 + 2)


def head_working(batch: BatchShape, vocabulary: int, width: int, precision: Precision, *, trained: bool) -> tuple[int, int]:
    """Temporary bytes of the head in the forward and in the backward pass.

    Both passes hold a tile of logits of min(labelled, 4096) x min(vocabulary, 32768) in the compute dtype and the tile's weights
    cast to that dtype. The backward pass also accumulates the gradients of the hidden states and, if trained, of the whole head in
    float32. Triton reduces a tile in place. Without Triton, PyTorch operators hold additional float32 tiles: in the forward pass
    the logits, their exponentials and the product of both (3); in the backward pass the logits twice, log-probs, probs, the
    gradient, the difference that multiplies it, its product, and one byte for the target's index (7.25).

    Args:
        batch: the micro-batch.
        vocabulary: number of rows of the head.
        width: hidden size.
        precision: precision of the run.
        trained: whether the head is trained.
    """
    columns = min(vocabulary, CHUNK)
    cells = min(batch.labelled, ROWS) * columns
    tile = cells * precision.compute
    cast = columns * width * precision.compute if precision.casts else 0
    forward, backward = (0.0, 0.0) if precision.gpu else (3.0, 7.25)
    if not precision.gpu and precision.compute == 2:  # both factors of the gradient's product are cast to float32
        backward += 1
        cast += columns * width * 4
    summed = 4 * batch.labelled * width + (4 * vocabulary * width if trained else 0)
    return int(tile + cast + 4 * forward * cells), int(tile + cast + summed + 4 * backward * cells)
