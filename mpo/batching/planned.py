"""Batches of records as arrays: packed within a budget by first-fit, reordered, split; and their statistics."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
REPACK_BELOW = 0.9
"""Batches filled below this fraction of their budget are packed again, together with those of other windows."""
JITTER = 0.2
"""Sizes are reduced at random by up to this fraction before a window is sorted, so that the batches change every epoch."""


@dataclass(frozen=True, eq=False)
class Batches:
    """Batch b holds the records from ``starts[b]`` on, in order. ``is_first``: whether a record is the first of a unit."""

    records: Ints
    is_first: NDArray[np.bool_]
    starts: Ints

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def ends(self) -> Ints:
        """One past the last record of each batch."""
        return np.append(self.starts[1:], len(self.records))

    def take(self, order: Ints) -> Batches:
        """Select batches, in the given order."""
        places, starts = take_units(np.arange(len(self.records)), self.starts, order)
        return Batches(self.records[places], self.is_first[places], starts)


def split(batches: Batches, cost: Floats, record_costs: Floats, target: int) -> Batches:
    """Halve the most expensive batches of two or more pairs until there are `target` batches or none can be split."""
    missing = target - len(batches)
    if missing <= 0:
        return batches
    ends = batches.ends
    candidates = np.flatnonzero(ends - batches.starts > 1)
    if len(candidates) > missing:  # more are never split
        candidates = candidates[np.argsort(-cost[candidates], kind="stable")[:missing]]
    heap = [(-float(cost[b]), int(batches.starts[b]), int(ends[b])) for b in candidates]
    heapq.heapify(heap)
    cuts: list[int] = []
    while heap and len(cuts) < missing:
        _, begin, end = heapq.heappop(heap)
        sums = np.cumsum(record_costs[batches.records[begin:end]])
        cut = begin + 1 + int(np.argmin(np.abs(2 * sums[:-1] - sums[-1])))
        cuts.append(cut)
        for low, high in ((begin, cut), (cut, end)):
            if high - low > 1:
                heapq.heappush(heap, (-float(record_costs[batches.records[low:high]].sum()), low, high))
    return Batches(batches.records, batches.is_first, np.sort(np.append(batches.starts, np.array(cuts, dtype=np.int64))))


def take_units(records: Ints, starts: Ints, order: Ints) -> tuple[Ints, Ints]:
    """Select units in a new order: their records, and the offset of each.

    >>> [found.tolist() for found in take_units(np.arange(5, 10), np.array([0, 3]), np.array([1, 0]))]
    [[8, 9, 5, 6, 7], [0, 2]]
    """
    sizes = np.diff(starts, append=len(records))[order]
    offsets = np.cumsum(sizes) - sizes
    return records[np.arange(sizes.sum()) + np.repeat(starts[order] - offsets, sizes)], offsets


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


def pack(sizes: Ints, limits: Sequence[int], window: int, rng: np.random.Generator | None) -> Ints:
    """Assign each unit to a batch: first-fit within windows, then once more over the batches that stayed rather empty.

    The arguments are those of `first_fit`, but a unit may exceed the limits: it gets a batch of its own.
    """
    full = np.array(limits)[:, None] * (np.arange(len(limits)) == 0)[:, None]  # so that no other unit is added
    sizes = np.where(_shares(sizes, limits) > 1, full, sizes)
    bins = first_fit(sizes, limits, window, rng)
    if rng is None or sizes.shape[1] <= window:
        return bins
    fill = np.max([np.bincount(bins, own) / limit for own, limit in zip(sizes, limits, strict=True)], axis=0)
    left = np.flatnonzero(fill[bins] < REPACK_BELOW)
    if len(left):
        bins[left] = len(fill) + first_fit(sizes[:, left], limits, window, rng)
        bins = np.unique(bins, return_inverse=True)[1]
    return bins


def first_fit(sizes: Ints, limits: Sequence[int], window: int, rng: np.random.Generator | None) -> Ints:
    """Put each unit into the first batch of its window with room for it, large units first.

    All windows are packed at the same time, one unit of each per iteration: the loop is over the units of one window.

    Args:
        sizes: tokens of each unit, and tiles if there is such a limit, shape (1 or 2, units).
        limits: the budget of a batch in each, which no unit exceeds.
        window: number of units per window.
        rng: for the order among units of about the same size. None: units stay in order, unsorted.

    Returns:
        the batch of each unit, numbered from 0 without gaps in the order of windows.
    """
    count = sizes.shape[1]
    window = min(window, count)
    padded = -(-count // window) * window
    rows = np.arange(padded).reshape(-1, window)
    if rng is not None:
        # The padding after the last unit counts as the smallest and comes last.
        key = np.zeros(padded)
        key[:count] = -_shares(sizes, limits) * (1 - JITTER * rng.random(count))
        rows = np.take_along_axis(rows, np.argsort(key.reshape(rows.shape), axis=1, kind="stable"), axis=1)
    bins = np.zeros(padded, dtype=np.int64)
    base = 0
    for block in np.array_split(rows, -(-len(rows) // 256)):  # few enough windows for their free space to stay in the CPU cache
        real = block < count
        needs = np.where(real, sizes[:, np.where(real, block, 0)], 0).astype(np.int32)
        placed = _first_fit_block(needs, limits)
        opened = np.where(real, placed + 1, 0).max(axis=1)
        bins[block] = placed + (base + np.cumsum(opened) - opened)[:, None]
        base += int(opened.sum())
    return bins[:count]


def _shares(sizes: Ints, limits: Sequence[int]) -> Floats:
    shares: Floats = (sizes / np.array(limits)[:, None]).max(axis=0)
    return shares


def _first_fit_block(needs: NDArray[np.int32], limits: Sequence[int]) -> Ints:
    """Apply first-fit to all rows of (limits, windows, units) at once. Units of size 0, which pad a row, have no effect."""
    _, windows, units = needs.shape
    every = np.arange(windows)
    width, opened = 64, 0
    rooms = [np.full((windows, width), limit, dtype=np.int32) for limit in limits]
    placed = np.zeros((windows, units), dtype=np.int64)
    for unit in range(units):
        if opened == width:  # keep one empty batch available: any unit fits there
            rooms = [np.pad(room, ((0, 0), (0, width)), constant_values=limit) for room, limit in zip(rooms, limits, strict=True)]
            width *= 2
        fits = rooms[0][:, : opened + 1] >= needs[0, :, unit, None]
        for room, need in zip(rooms[1:], needs[1:], strict=True):
            fits &= room[:, : opened + 1] >= need[:, unit, None]
        chosen = fits.argmax(axis=1)
        for room, need in zip(rooms, needs, strict=True):
            room[every, chosen] -= need[:, unit]
        placed[:, unit] = chosen
        opened = max(opened, int(chosen.max()) + 1)
    return placed
