"""What the LM head needs: only answer positions meet it, and TRL's fused head never holds all their logits."""

from __future__ import annotations

from mpo.dry_run.batch import BatchShape
from mpo.dry_run.precision import Precision

CHUNK = 32_768
"""Vocabulary entries of a tile of TRL's fused head (`trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE`, TRL 1.16)."""
ROWS = 4_096
"""Positions of a tile (`trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE`)."""


def head_kept(batch: BatchShape, width: int, precision: Precision) -> int:
    """Bytes kept between the passes: the hidden states of the scored positions, and a few numbers each."""
    return batch.scored * (precision.stream * width + 2 * 8 + 2 * 4 + 2)


def head_working(batch: BatchShape, vocabulary: int, width: int, precision: Precision, *, trained: bool) -> tuple[int, int]:
    """Bytes that the head needs at once and gives back: in a forward and in a backward pass.

    A tile of logits of min(scored, 4096) x min(vocabulary, 32768) in the compute dtype, the head's weights of the tile cast to
    that, and backward the gradients of the hidden states and (if trained) of the whole head, summed up in float32. Triton folds a
    tile in place. Without it, PyTorch operators hold float32 tiles beside it: the logits, their exponentials and the product of
    both forward (3), and backward the logits twice, log-probs, probs, the gradient, the difference that multiplies it and its
    product, and a byte for the target's place (7.25).

    Args:
        batch: the micro-batch.
        vocabulary: rows of the head.
        width: of a hidden state.
        precision: of the run.
        trained: whether the head is.
    """
    columns = min(vocabulary, CHUNK)
    cells = min(batch.scored, ROWS) * columns
    tile = cells * precision.compute
    cast = columns * width * precision.compute if precision.casts else 0
    forward, backward = (0.0, 0.0) if precision.gpu else (3.0, 7.25)
    if not precision.gpu and precision.compute == 2:  # both factors of the gradient's product are made float32
        backward += 1
        cast += columns * width * 4
    summed = 4 * batch.scored * width + (4 * vocabulary * width if trained else 0)
    return int(tile + cast + 4 * forward * cells), int(tile + cast + summed + 4 * backward * cells)
