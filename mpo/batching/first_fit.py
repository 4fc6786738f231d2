"""First-fit: pack units of tokens and tiles into batches within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mpo.batching.planned import Floats, Ints

REPACK_BELOW = 0.9
"""Batches filled below this fraction of their budget are packed again, together with those of other windows."""
JITTER = 0.2
"""Sizes are reduced at random by up to this fraction before a window is sorted, so that the batches change every epoch."""


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
    """The largest fraction of a limit that each unit takes."""
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
