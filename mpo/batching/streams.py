"""Streams of records without a length: repeated for training, padded to whole batches for evaluation.

The order of records does not depend on the number of data loader workers. datasets would give each worker some of the shards,
which have unequal sizes, so that a worker repeats its shards while others are still in their first pass. Here every worker reads
the whole stream and keeps every n-th block of records, a block being a batch of all ranks; the workers share the expensive part,
which is collating.
"""

import copy
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import fsspec.asyn  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker  # private; checked with PyTorch 2.11 to 2.14

from mpo.schema import EPOCH, PADDING


def in_epoch(record: dict[str, Any], epoch: int) -> dict[str, Any]:
    """Add the epoch to a record that is to be augmented."""
    return {**record, EPOCH: epoch} if record.get("augment") else record


class RepeatedStream(IterableDataset[dict[str, Any]]):
    """Repeat the records of a stream endlessly.

    transformers' Trainer does not know the length of a stream: the gradients of a last, smaller group of micro-batches would
    carry over to the next pass, and a resumed run could not find its position in a second pass.

    >>> from itertools import islice
    >>> list(islice(RepeatedStream([{"id": 1}, {"id": 2}]), 3))
    [{'id': 1}, {'id': 2}, {'id': 1}]

    Args:
        stream: an iterable of records; its `set_epoch`, if it has one, is called with the number of the pass.
        block: number of consecutive records for one data loader worker: the pairs of one batch of all ranks.
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
    """Pad a stream with its first records, marked as padding, until their number is a multiple.

    accelerate would repeat records without marking them, and these pairs would count twice.

    >>> [(r["id"], PADDING in r) for r in FilledStream([{"id": 1}, {"id": 2}, {"id": 3}], multiple=2)]
    [(1, False), (2, False), (3, False), (1, True)]

    Args:
        stream: an iterable of records.
        multiple: number of pairs in one batch of all ranks.
        fill: False: leave the last batch smaller, which is possible with one rank.
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
    """Every n-th block of records for each of n data loader workers, which take turns; all records without workers."""
    info = get_worker_info()
    for place, record in enumerate(records):
        if info is None or place // block % info.num_workers == info.id:
            yield record


def _own_copy(stream: Any) -> Any:
    """In a data loader worker, a stream with its own epoch: datasets keeps one number for all workers, in shared memory."""
    epoch = getattr(stream, "_epoch", None)
    if get_worker_info() is None or not isinstance(epoch, Tensor):
        return stream
    stream = copy.copy(stream)
    stream._epoch = epoch.clone()
    return stream


def _whole(stream: Any) -> Iterator[dict[str, Any]]:
    """All records of a stream, also in a data loader worker: meanwhile PyTorch's worker info is None."""
    info = get_worker_info()
    if info is None:
        yield from stream
        return
    fsspec.asyn.reset_lock()  # needed in a forked process; datasets does this only where it splits a stream over workers
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
