"""Records as a data loader takes them: by index, or as streams, repeated for training, padded to whole batches for evaluation.

The order of a stream's records does not depend on the number of data loader workers. datasets would give each worker some shards,
which have unequal sizes, so that a worker repeats its shards while others are still in their first pass. Here every worker reads
the whole stream and keeps every n-th block of records, a block being a batch of all ranks; the workers share the expensive part,
which is collating.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import fsspec.asyn  # type: ignore[import-untyped]
import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker  # private; checked with PyTorch 2.11 to 2.14

from mpo.batching.planned import Ints, pack
from mpo.batching.sampler import PairBatchSampler
from mpo.encoding.costs import Budget, OtherCount, RecordMeasure, exceeds
from mpo.encoding.turns import Record, describe
from mpo.io import RECORD_ERRORS, BadRecord, bad_record
from mpo.schema import BAD, COUNTED, EPOCH, PADDING

logger = logging.getLogger(__name__)
FEWER_FRAMES = "have fewer frames of their videos, evenly spread, so that each fits a row (oversized='fewer_frames')."


def in_epoch(record: Record, epoch: int) -> Record:
    """Add the epoch to a record that is to be augmented."""
    return {**record, EPOCH: epoch} if record.get("augment") else record


@dataclass(eq=False, repr=False)
class IndexedRecords(Dataset[dict[str, Any]]):
    """A data set that also returns record ``i`` for the index ``-1 - i``, marked as padding.

    A record that the data set cannot return, for example since it decodes a damaged image, is an error of that record alone.

    >>> IndexedRecords([{"id": "a"}, {"id": "b"}])[-2]
    {'id': 'b', 'PADDING': True}

    Args:
        sampler: its epoch is set together with the data set's. With several ranks, the data loader of a resumed epoch does not
            reach it (accelerate wraps it in SkipBatchSampler and BatchSamplerShard), but reaches the data set.
        epoch: shape (), in memory shared with data loader workers; for records that are to be augmented.
        counted: for each record, the tokens of its prompt, by which its batch was planned.
        beyond: indices of records that exceed a batch, and why; they are bad records.
    """

    dataset: Any
    sampler: PairBatchSampler | None = None
    epoch: Tensor | None = None
    counted: Any = None
    beyond: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several records at once, as data loaders request them."""
        places = [-1 - index if index < 0 else index for index in indices]
        many = getattr(self.dataset, "__getitems__", None)
        try:
            records = many(places) if many else [self.dataset[place] for place in places]
        except RECORD_ERRORS:  # of one of them
            records = list(map(self._one, places))
        if self.epoch is not None:
            records = [in_epoch(record, int(self.epoch)) for record in records]
        for at, place in enumerate(places):
            if place in self.beyond:
                name = records[at].get("id")
                name = place if name is None else name
                records[at] = {**records[at], "id": name, BAD: BadRecord(f"record {name!r}", self.beyond[place])}
        if self.counted is not None:
            records = [{**record, COUNTED: int(self.counted[place])} for place, record in zip(places, records, strict=True)]
        return [{**record, PADDING: True} if index < 0 else record for index, record in zip(indices, records, strict=True)]

    def _one(self, place: int) -> dict[str, Any]:
        try:
            with bad_record(f"record {place}"):
                return dict(self.dataset[place])
        except BadRecord as bad:
            return {"id": place, BAD: bad}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler, and of the data set if it has one."""
        for listener in (self.sampler, self.dataset):
            tell = getattr(listener, "set_epoch", None)
            if tell is not None:
                tell(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sampler": None}  # workers do not need it


class RepeatedStream(IterableDataset[Record]):
    """Repeat the records of a stream endlessly, telling it the number of each pass by its `set_epoch`, if it has one.

    transformers' Trainer does not know the length of a stream: the gradients of a last, smaller group of micro-batches would
    carry over to the next pass, and a resumed run could not find its position in a second pass.

    >>> from itertools import islice
    >>> list(islice(RepeatedStream([{"id": 1}, {"id": 2}]), 3))
    [{'id': 1}, {'id': 2}, {'id': 1}]

    `block`: number of consecutive records for one data loader worker: the pairs of one batch of all ranks.
    """

    def __init__(self, stream: Any, block: int = 1) -> None:
        self._stream = stream
        self._block = block

    def __iter__(self) -> Iterator[Record]:
        return _of_this_worker(self._passes(), self._block)

    def _of_pass(self, records: Iterator[Record]) -> Iterator[Any]:
        return records

    def _passes(self) -> Iterator[Any]:
        stream = _own_copy(self._stream)
        for epoch in count():
            if hasattr(stream, "set_epoch"):
                stream.set_epoch(epoch)
            empty = True
            for found in self._of_pass(in_epoch(record, epoch) for record in _whole(stream)):
                empty = False
                yield found
            if empty:
                raise ValueError("The stream of records is empty.")


class PackedStream(RepeatedStream):
    """Repeat the records of a stream in packs, lists of records, within a budget of tokens and tiles.

    A buffer of records is packed, large ones first, each into the first pack with room; the fullest half of the packs and the one
    with the record that has waited longest are taken, and the buffer is filled up. At the end of a pass all of it is taken.

    Args:
        measure: the costs of records.
        limits: tokens of a pack, and image tiles (None: no limit).
        buffer: number of records in the buffer.
        own_row: a record that exceeds a budget is a pack of its own. False: it is an error.
        block: number of ranks.
    """

    def __init__(
        self, stream: Any, measure: RecordMeasure, limits: Budget, *, buffer: int = 256, own_row: bool = False, block: int = 1
    ) -> None:
        super().__init__(stream, block)
        self._measure, self._buffer, self._own_row = measure, buffer, own_row
        self._budget = limits
        self._limits = limits[0], np.iinfo(np.int32).max if limits[1] is None else limits[1]
        self._said = False

    def _of_pass(self, records: Iterator[Record]) -> Iterator[list[Record]]:
        waiting: list[Record] = []
        sizes = np.zeros((2, 0), dtype=np.int64)
        while new := list(islice(records, self._buffer - len(waiting))) or waiting:
            if new is not waiting:
                sizes = np.append(sizes, self._sizes(new), axis=1)
                waiting = waiting + new
            fill, packs = self._packed(sizes)
            if len(waiting) == self._buffer:
                half = sorted(range(len(packs)), key=lambda one: (-fill[one], packs[one][0]))[: -(-len(packs) // 2)]
                packs = [one for number, one in enumerate(packs) if number in half or one[0] == 0]
            for places in sorted(packs):
                yield [waiting[place] for place in places]
            left = sorted({*range(len(waiting))}.difference(*packs))
            waiting, sizes = [waiting[place] for place in left], sizes[:, left]

    def _sizes(self, records: list[Record]) -> Ints:
        """Tokens and tiles of records, shape (2, N); one that exceeds a budget is an error, or replaced by one that is bad."""
        try:
            costs = self._measure.many(records)
        except OtherCount:
            self._measure.sampled = 0
            costs = self._measure.many(records)
        info = get_worker_info()
        if any(one["group"] for one in costs) and not self._said and (info is None or info.id == 0):
            self._said = True
            logger.warning(f"Some conversations {FEWER_FRAMES}")
        sizes = np.array([[one["prompt"] + one["chosen"], one["tiles"]] for one in costs], dtype=np.int64).T
        for place in () if self._own_row else np.flatnonzero((sizes > np.array(self._limits)[:, None]).any(axis=0)):
            record, (tokens, tiles) = records[place], sizes[:, place].tolist()
            bad = BadRecord(describe(record), exceeds(tokens, tiles, self._budget))
            if self._measure.on_bad_record == "raise":
                raise bad
            records[place], sizes[:, place] = {**record, BAD: bad}, (2, 0)
        return sizes

    def _packed(self, sizes: Ints) -> tuple[list[float], list[list[int]]]:
        shares = (sizes / np.array(self._limits)[:, None]).max(axis=0)
        order = np.argsort(-shares, kind="stable")
        bins = np.empty_like(order)
        bins[order] = pack(sizes[:, order], self._limits, len(order), None)
        counts = np.bincount(bins)
        fill = np.max([np.bincount(bins, one) / limit for one, limit in zip(sizes, self._limits, strict=True)], axis=0)
        places = np.split(np.argsort(bins, kind="stable"), np.cumsum(counts)[:-1])
        return fill.tolist(), [one.tolist() for one in places]


class FilledStream(IterableDataset[Record]):
    """Pad a stream with its first records, marked as padding, until their number is a multiple: the pairs of a batch of all ranks.

    accelerate would repeat records without marking them, and these pairs would count twice. Without `fill` the last batch stays
    smaller, which is possible with one rank.

    >>> [(r["id"], PADDING in r) for r in FilledStream([{"id": 1}, {"id": 2}, {"id": 3}], multiple=2)]
    [(1, False), (2, False), (3, False), (1, True)]
    """

    def __init__(self, stream: Any, multiple: int, *, fill: bool = True) -> None:
        self._stream = stream
        self._multiple = multiple
        self._fill = fill

    def __iter__(self) -> Iterator[Record]:
        return _of_this_worker(self._filled(), self._multiple)

    def _filled(self) -> Iterator[Record]:
        first: list[Record] = []
        seen = 0
        for record in _whole(_own_copy(self._stream)):
            if len(first) < self._multiple:
                first.append(record)
            seen += 1
            yield record
        for place in range(-seen % self._multiple if seen and self._fill else 0):
            yield {**first[place % len(first)], PADDING: True}


def _of_this_worker(records: Iterable[Record], block: int) -> Iterator[Record]:
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


def _whole(stream: Any) -> Iterator[Record]:
    """All records of a stream, also in a data loader worker: meanwhile PyTorch's worker info is None."""
    info = get_worker_info()
    if info is None:
        yield from stream
        return
    fsspec.asyn.reset_lock()  # needed in a forked process; datasets does this only where it splits a stream over workers
    records: Iterator[Record] | None = None
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
