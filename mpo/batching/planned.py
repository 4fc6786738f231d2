"""Batches of records as arrays: the records of each batch, how batches are reordered and split, and their statistics."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batch b holds ``records[starts[b]:ends[b]]``, in order. ``is_first``: whether a record is the first of a unit."""

    records: Ints
    is_first: NDArray[np.bool_]
    starts: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, order: Ints) -> Batches:
        """Select batches, in the given order."""
        sizes = (self.ends - self.starts)[order]
        places = ranges(self.starts[order], sizes)
        ends = np.cumsum(sizes)
        return Batches(self.records[places], self.is_first[places], ends - sizes, ends)

    def extended(self, alone: Ints) -> Batches:
        """Append batches of one record each."""
        places = len(self.records) + np.arange(len(alone))
        return Batches(
            np.append(self.records, alone),
            np.append(self.is_first, np.ones(len(alone), dtype=bool)),
            np.append(self.starts, places),
            np.append(self.ends, places + 1),
        )


def split(batches: Batches, cost: Floats, record_costs: Floats, target: int) -> Batches:
    """Halve the most expensive batches of two or more pairs until there are `target` batches or none can be split."""
    missing = target - len(batches)
    if missing <= 0:
        return batches
    sizes = batches.ends - batches.starts
    candidates = np.flatnonzero(sizes > 1)
    if len(candidates) > missing:  # more are never split
        candidates = candidates[np.argsort(-cost[candidates], kind="stable")[:missing]]
    heap = [(-float(cost[b]), int(batches.starts[b]), int(batches.ends[b])) for b in candidates]
    heapq.heapify(heap)
    cuts: list[int] = []
    while heap and len(cuts) < missing:
        _, begin, end = heapq.heappop(heap)
        each = record_costs[batches.records[begin:end]]
        sums = np.cumsum(each)
        cut = begin + 1 + int(np.argmin(np.abs(2 * sums[:-1] - sums[-1])))
        cuts.append(cut)
        for low, high in ((begin, cut), (cut, end)):
            if high - low > 1:
                heapq.heappush(heap, (-float(record_costs[batches.records[low:high]].sum()), low, high))
    starts = np.sort(np.concatenate([batches.starts, np.array(cuts, dtype=np.int64)]))
    return Batches(batches.records, batches.is_first, starts, np.append(starts[1:], len(batches.records)))


def take_units(records: Ints, starts: Ints, sizes: Ints, order: Ints) -> tuple[Ints, Ints]:
    """Reorder units: their records in the new order, and the offset of each unit."""
    sizes = sizes[order]
    return records[ranges(starts[order], sizes)], np.cumsum(sizes) - sizes


def ranges(starts: Ints, sizes: Ints) -> Ints:
    """Concatenate ranges of indices.

    >>> ranges(np.array([7, 2]), np.array([2, 3])).tolist()
    [7, 8, 2, 3, 4]
    """
    ends = np.cumsum(sizes)
    result: Ints = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - sizes), sizes)
    return result


@dataclass(frozen=True)
class PackingReport:
    """Packing statistics of an epoch, over all ranks; `str` gives one line for a log.

    ``padding``: batches of padding pairs, which give ranks the same number. ``mean_fill``, ``min_fill``: tokens of a batch as a
    fraction of its budget. ``pairs_per_batch``: minimum, mean, maximum. ``imbalance``: the most expensive batch of a slot divided
    by the slot's mean, averaged over slots. ``oversized``: records that exceed a budget.
    """

    batches: int
    padding: int
    steps: int
    pairs: int
    tokens: int | None
    tiles: int | None
    mean_fill: float | None
    min_fill: float | None
    pairs_per_batch: tuple[int, float, int]
    imbalance: float
    oversized: int

    def __str__(self) -> str:
        least, mean, most = self.pairs_per_batch
        parts = [
            f"{self.pairs:,} records in {self.batches:,} batches ({least} to {most}, {mean:.1f} on average), {self.steps:,} steps"
        ]
        if self.tokens is not None:
            parts.append(f"{self.tokens:,} tokens, {self.tiles:,} tiles")
        if self.mean_fill is not None:
            parts.append(f"budget filled to {self.mean_fill:.1%} (at least {self.min_fill:.1%})")
        parts.append(f"imbalance between ranks {self.imbalance:.3f}")
        if self.oversized:
            parts.append(f"{self.oversized:,} records beyond the budget, in batches of their own")
        if self.padding:
            parts.append(f"{self.padding} batches of a repeated record that does not count")
        return "; ".join(parts)
