"""Streams of records, without a length: repeated for training, filled up to whole batches for evaluation.

Data loader workers do not change what comes in which order. datasets would give each worker some of the shards, which are of
unequal sizes, so that a worker begins its shards again while others are still in their first pass. Here every worker reads the
whole stream and keeps every n-th block of records, a block being a batch of all ranks; the workers share the costly part, which
is making batches.
"""

import copy
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import fsspec.asyn  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker  # private; checked with PyTorch 2.11 to 2.14

PADDING = "is_padding"
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
        block: records that go to one data loader worker together: pairs of one batch of all ranks.
    """

    def __init__(self, stream: Any, block: int = 1) -> None:
        self._stream = stream
        self._block = block

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _of_this_worker(self._passes(), self._block)

    def _passes(self) -> Iterator[dict[str, Any]]:
        stream = _own_copy(self._stream)
        for epoch in count():
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(epoch)
            empty = True
            for record in _whole(stream):
                empty = False
                yield in_epoch(record, epoch)
            if empty:
                raise ValueError("The stream of records is empty.")


class FilledStream(IterableDataset[dict[str, Any]]):
    """The records of a stream, then its first records again, marked, until their number is a multiple.

    Left to itself, accelerate would repeat records unmarked, and these pairs would count twice.

    >>> [(r["id"], PADDING in r) for r in FilledStream([{"id": 1}, {"id": 2}, {"id": 3}], multiple=2)]
    [(1, False), (2, False), (3, False), (1, True)]

    Args:
        stream: an iterable of records.
        multiple: pairs of one batch of all ranks.
        fill: False: leave the last batch smaller, as one rank can.
    """

    def __init__(self, stream: Any, multiple: int, *, fill: bool = True) -> None:
        self._stream = stream
        self._multiple = multiple
        self._fill = fill

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return _of_this_worker(self._filled(), self._multiple)

    def _filled(self) -> Iterator[dict[str, Any]]:
        first: list[dict[str, Any]] = []
        seen = 0
        for record in _whole(_own_copy(self._stream)):
            if len(first) < self._multiple:
                first.append(record)
            seen += 1
            yield record
        for place in range(-seen % self._multiple if seen and self._fill else 0):
            yield {**first[place % len(first)], PADDING: True}


def _of_this_worker(records: Iterable[dict[str, Any]], block: int) -> Iterator[dict[str, Any]]:
    """Every n-th block of records for each of n data loader workers, which give their batches in turn; all, without workers."""
    info = get_worker_info()
    for place, record in enumerate(records):
        if info is None or place // block % info.num_workers == info.id:
            yield record


def _own_copy(stream: Any) -> Any:
    """In a data loader worker, the stream with an epoch of its own: datasets lets workers share one number, in shared memory."""
    epoch = getattr(stream, "_epoch", None)
    if get_worker_info() is None or not isinstance(epoch, Tensor):
        return stream
    stream = copy.copy(stream)
    stream._epoch = epoch.clone()
    return stream


def _whole(stream: Any) -> Iterator[dict[str, Any]]:
    """All records of a stream, in a data loader worker too: whoever asks PyTorch for the worker meanwhile is told of none."""
    info = get_worker_info()
    if info is None:
        yield from stream
        return
    fsspec.asyn.reset_lock()  # in a forked process; datasets does this only where it shares a stream out
    records: Iterator[dict[str, Any]] | None = None
    while True:
        torch_worker._worker_info = None
        try:
            assert get_worker_info() is None
            records = iter(stream) if records is None else records
            record = next(records)
        except StopIteration:
            return
        finally:
            torch_worker._worker_info = info
        yield record
