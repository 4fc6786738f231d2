"""Mix several sources of pairs into one data set, by an index over all of them: no pair is copied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray

from mpo.data.encoded import with_encoded_images
from mpo.data.mixture_file import Sampling, Source, weights_of
from mpo.visible import table


@dataclass(frozen=True)
class Taken:
    """Counts of one source: its training pairs, how many the mixture takes of them, and its evaluation pairs."""

    name: str
    pairs: int
    taken: int
    eval: int


@dataclass(frozen=True)
class Mixture:
    """The training pairs, source after source, and the evaluation pairs (None: no evaluation part)."""

    train: Dataset
    eval: Dataset | None
    taken: tuple[Taken, ...]

    def describe(self) -> str:
        """Format a table of each source's name, records, taken records, and fraction of the mixture."""
        total = sum(row.taken for row in self.taken)
        in_all = Taken("in all", sum(row.pairs for row in self.taken), total, sum(row.eval for row in self.taken))
        cells = [("source", "records", "taken", "fraction", "eval")]
        for row in (*self.taken, in_all):
            cells.append((row.name, f"{row.pairs:,}", f"{row.taken:,}", f"{row.taken / max(total, 1):.1%}", f"{row.eval:,}"))
        return table([row[: 4 if self.eval is None else 5] for row in cells])


def amounts(sources: Sequence[Source], pairs: Sequence[int], sampling: Sampling, size: int | None = None) -> list[int]:
    """Compute how many pairs to take of each source, given the number of pairs it has."""
    caps = [np.inf if source.cap is None else source.cap for source in sources]
    # Rounded down, as in the official code; a whole repeat_time is then exact.
    wanted = [int(min(int(count * source.repeat_time), cap)) for source, count, cap in zip(sources, pairs, caps, strict=True)]
    if sampling == "repeat_time":
        return wanted
    base = [float(np.sqrt(count)) for count in wanted] if sampling == "sqrt" else weights_of(sources)
    empty = [source.name for source, count in zip(sources, pairs, strict=True) if not count]
    if empty:
        raise ValueError(f"Source {empty[0]!r} has no records. Remove it, or set a smaller eval_size.")
    return shares(sum(wanted) if size is None else size, base, caps)


def shares(total: int, weights: Sequence[float], caps: Sequence[float]) -> list[int]:
    """Divide a total in proportion to weights; what exceeds a cap goes to the others.

    >>> shares(10, [1, 1, 2], [np.inf, np.inf, np.inf])
    [3, 2, 5]
    >>> shares(10, [1, 1, 2], [np.inf, np.inf, 3])
    [4, 3, 3]
    """
    weight, most = np.array(weights, dtype=float), np.array(caps, dtype=float)
    if most.sum() < total:
        raise ValueError(f"size={total:,}, but the sources' caps allow {int(most.sum()):,} records. Set a smaller size.")
    capped = np.zeros(len(weight), dtype=bool)
    while True:
        part = np.where(capped, most, 0.0)
        part[~capped] = (total - part.sum()) * weight[~capped] / max(weight[~capped].sum(), 1e-300)
        over = ~capped & (part > most)
        if not over.any():
            break
        capped |= over
    whole = np.floor(part + 1e-9).astype(int)
    for place in np.argsort(-(part - whole), kind="stable")[: total - whole.sum()]:
        whole[place] += 1
    return [int(count) for count in whole]


def draw(pairs: int, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Choose `count` of `pairs` indices: all of them as often as possible, and a sorted random choice for the rest.

    >>> draw(3, 7, np.random.default_rng(0)).tolist()
    [0, 1, 2, 0, 1, 2, 2]
    """
    if not count:
        return np.zeros(0, dtype=np.int64)
    whole, rest = divmod(count, pairs)
    return np.concatenate([np.tile(np.arange(pairs), whole), np.sort(rng.choice(pairs, rest, replace=False))])


def joined(sources: Sequence[Source], loaded: Sequence[Dataset]) -> Dataset:
    """Concatenate data sets, still memory-mapped; a missing column is filled with null, one with different types is refused."""
    first: dict[str, tuple[str, Any]] = {}
    for source, pairs in zip(sources, loaded, strict=True):
        for column, feature in pairs.features.items():
            name, known = first.setdefault(column, (source.name, feature))
            if known != feature and column != "images":
                found = f"The column {column!r} is {feature} in source {source.name!r} and {known} in {name!r}"
                raise ValueError(f"{found}. Convert one to the other's format with `mpo data convert`.")
    images = [str(pairs.features["images"]) for pairs in loaded if "images" in pairs.column_names]
    alike = loaded if len(set(images)) < 2 else [with_encoded_images(pairs) for pairs in loaded]
    return alike[0] if len(alike) == 1 else concatenate_datasets(list(alike))
