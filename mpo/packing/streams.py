"""Streams of records, without a length: repeated for training, filled up to whole batches for evaluation."""

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset

FILLER = "is_filler"
"""Key of a record that stands only to fill a batch up."""
EPOCH = "epoch"
"""Key of a record that is to be augmented: which pass over the records it is in. Only training has it."""


def in_epoch(record: dict[str, Any], epoch: int) -> dict[str, Any]:
    """The record, told the epoch if it is to be augmented."""
    return {**record, EPOCH: epoch} if record.get("augment") else record


class RepeatedStream(IterableDataset[dict[str, Any]]):
    """The records of a stream, over and over, without a seam.

    transformers' Trainer does not know where a stream ends: the gradients of a last, smaller group of micro-batches would run
    into the next pass, and a resume could not find its place in a second pass.

    >>> from itertools import islice
    >>> list(islice(RepeatedStream([{"id": 1}, {"id": 2}]), 3))
    [{'id': 1}, {'id': 2}, {'id': 1}]

    Args:
        stream: an iterable of records; its `set_epoch`, if it has one, is told the number of the pass.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for epoch in count():
            if hasattr(self._stream, "set_epoch"):
                self._stream.set_epoch(epoch)
            empty = True
            for record in self._stream:
                empty = False
                yield in_epoch(record, epoch)
            if empty:
                raise ValueError("The stream of records is empty (with dataloader workers: one of its shards is).")


class FilledStream(IterableDataset[dict[str, Any]]):
    """The records of a stream, then its first records again, marked, until their number is a multiple.

    Left to itself, accelerate would repeat records unmarked, and these pairs would count twice.

    >>> [(r["id"], FILLER in r) for r in FilledStream([{"id": 1}, {"id": 2}, {"id": 3}], multiple=2)]
    [(1, False), (2, False), (3, False), (1, True)]

    Args:
        stream: an iterable of records.
        multiple: pairs of one batch of all ranks.
    """

    def __init__(self, stream: Any, multiple: int) -> None:
        self._stream = stream
        self._multiple = multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first: list[dict[str, Any]] = []
        seen = 0
        for record in self._stream:
            if len(first) < self._multiple:
                first.append(record)
            seen += 1
            yield record
        for place in range(-seen % self._multiple if seen else 0):
            yield {**first[place % len(first)], FILLER: True}
