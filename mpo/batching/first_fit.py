"""First-fit: pack units of tokens and tiles into batches within a budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mpo.batching.planned import Ints

REPACK_BELOW = 0.9
"""Batches filled below this fraction of their budget are packed again, together with those of other windows."""
JITTER = 0.2
"""Sizes are reduced at random by up to this fraction before a window is sorted, so that the batches change every epoch."""


def pack(tokens: Ints, tiles: Ints, max_tokens: int, max_tiles: int | None, window: int, rng: np.random.Generator | None) -> Ints:
    """Assign each unit to a batch: first-fit within windows, then once more over the batches that stayed rather empty."""
    # A unit that exceeds a budget fills a batch, so that no other unit is added.
    too_large = tokens > max_tokens
    if max_tiles is not None:
        too_large |= tiles > max_tiles
    tokens, tiles = np.where(too_large, max_tokens, tokens), np.where(too_large, 0, tiles)
    bins = first_fit(tokens, tiles, max_tokens, max_tiles, window, rng)
    if rng is None or len(tokens) <= window:
        return bins
    fill = np.bincount(bins, tokens) / max_tokens
    if max_tiles is not None:
        fill = np.maximum(fill, np.bincount(bins, tiles) / max_tiles)
    left = np.flatnonzero(fill[bins] < REPACK_BELOW)
    if len(left):
        bins[left] = len(fill) + first_fit(tokens[left], tiles[left], max_tokens, max_tiles, window, rng)
        bins = np.unique(bins, return_inverse=True)[1]
    return bins


def first_fit(
    tokens: Ints, tiles: Ints | None, max_tokens: int, max_tiles: int | None, window: int, rng: np.random.Generator | None
) -> Ints:
    """Put each unit into the first batch of its window with room for it, large units first.

    All windows are packed at the same time, one unit of each per iteration: the loop is over the units of one window.

    Args:
        tokens: size of each unit, at most `max_tokens`.
        max_tokens: the token budget of a batch.
        tiles: tiles of each unit, at most `max_tiles`; used if there is such a limit.
        window: number of units per window.
        rng: for the order among units of about the same size. None: units stay in order, unsorted.

    Returns:
        the batch of each unit, numbered from 0 without gaps in the order of windows.
    """
    count = len(tokens)
    window = min(window, count)
    padded = -(-count // window) * window
    size = tokens / max_tokens
    if tiles is not None and max_tiles is not None:
        size = np.maximum(size, tiles / max_tiles)
    else:
        tiles = None
    rows = np.arange(padded).reshape(-1, window)
    if rng is not None:
        # The padding after the last unit counts as the smallest and comes last.
        key = np.zeros(padded)
        key[:count] = -size * (1 - JITTER * rng.random(count))
        rows = np.take_along_axis(rows, np.argsort(key.reshape(rows.shape), axis=1, kind="stable"), axis=1)
    bins = np.zeros(padded, dtype=np.int64)
    base = 0
    for block in np.array_split(rows, -(-len(rows) // 256)):  # few enough windows for their free space to stay in the CPU cache
        real = block < count
        index = np.where(real, block, 0)
        need_tokens = np.where(real, tokens[index], 0).astype(np.int32)
        need_tiles = None if tiles is None else np.where(real, tiles[index], 0).astype(np.int32)
        placed = _first_fit_block(need_tokens, need_tiles, max_tokens, max_tiles)
        opened = np.where(real, placed + 1, 0).max(axis=1)
        bins[block] = placed + (base + np.cumsum(opened) - opened)[:, None]
        base += int(opened.sum())
    return bins[:count]


def _first_fit_block(tokens: NDArray[np.int32], tiles: NDArray[np.int32] | None, max_tokens: int, max_tiles: int | None) -> Ints:
    """Apply first-fit to all rows of (windows, units) at once. Units of size 0, which pad a row, have no effect."""
    windows, units = tokens.shape
    every = np.arange(windows)
    width, opened = 64, 0
    room = np.full((windows, width), max_tokens, dtype=np.int32)
    tile_room = None if tiles is None else np.full((windows, width), max_tiles, dtype=np.int32)
    placed = np.zeros((windows, units), dtype=np.int64)
    for unit in range(units):
        if opened == width:  # keep one empty batch available: any unit fits there
            room = np.concatenate([room, np.full_like(room, max_tokens)], axis=1)
            if tile_room is not None:
                tile_room = np.concatenate([tile_room, np.full_like(tile_room, max_tiles)], axis=1)
            width *= 2
        fits = room[:, : opened + 1] >= tokens[:, unit, None]
        if tiles is not None and tile_room is not None:
            fits &= tile_room[:, : opened + 1] >= tiles[:, unit, None]
        chosen = fits.argmax(axis=1)
        room[every, chosen] -= tokens[:, unit]
        if tiles is not None and tile_room is not None:
            tile_room[every, chosen] -= tiles[:, unit]
        placed[:, unit] = chosen
        opened = max(opened, int(chosen.max()) + 1)
    return placed
