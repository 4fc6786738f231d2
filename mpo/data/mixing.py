"""Several sources of pairs as one data set, by an index over all of them: no pair is copied."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, Value, concatenate_datasets, interleave_datasets
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from mpo.data.encoded import with_encoded_images
from mpo.data.eval_part import By, choose_eval
from mpo.data.mixture_file import (
    Sampling,
    Source,
    check_settings,
    check_sources,
    read_mixture,
    refuse_beside_mixture,
    weights_of,
)
from mpo.data.records import TILES
from mpo.data.sources import load_preferences

__all__ = ["Mixture", "load_mixture", "mix", "read_mixture", "refuse_beside_mixture", "stream_mixture"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Taken:
    """How many pairs a source has (without those held out), how many are taken, and how many are held out."""

    name: str
    pairs: int
    taken: int
    eval: int


@dataclass(frozen=True)
class Mixture:
    """What is trained on, source after source, and what is held out of it (None: nothing)."""

    train: Dataset
    eval: Dataset | None
    taken: tuple[Taken, ...]

    def describe(self) -> str:
        """A table: of every source its name, its pairs, how many are taken, and their share of the mixture."""
        total = sum(row.taken for row in self.taken)
        rows = [*self.taken, Taken("in all", sum(row.pairs for row in self.taken), total, sum(row.eval for row in self.taken))]
        cells = [("source", "pairs", "taken", "share", "held out")]
        cells += [(r.name, f"{r.pairs:,}", f"{r.taken:,}", f"{r.taken / max(total, 1):.1%}", f"{r.eval:,}") for r in rows]
        columns = range(4 if self.eval is None else 5)
        widths = [max(len(row[column]) for row in cells) for column in columns]
        lines = []
        for row in cells:
            numbers = "".join(f"  {row[column]:>{widths[column]}}" for column in columns[1:])
            lines.append(f"{row[0]:<{widths[0]}}{numbers}")
        return "\n".join(lines)


def load_mixture(sources: Sequence[Mapping[str, Any]], **settings: Any) -> Dataset:
    """The pairs of `mix` to train on; arguments and errors as of it."""
    return mix(sources, **settings).train


def mix(
    sources: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    sampling: Sampling | None = None,
    size: int | None = None,
    eval_size: float | int | None = None,
    eval_by: By = "both",
) -> Mixture:
    """Make one data set of several sources; the same for the same sources, settings and seed, on every rank and in every resume.

    Args:
        sources: as `mpo.data.mixture_file` says.
        seed: of everything drawn. What is drawn from a source does not depend on the others.
        sampling: ``"repeat_time"``: every source as often as it says. ``"weight"``: shares of `size` by weight. ``"sqrt"``: shares
            of `size` in proportion to the square root of what repeat_time and cap make of a source. Default: by weight where
            sources have one, else by repeat_time. A source whose share is more than it has is repeated, whole times first.
        size: pairs of the mixture, for shares; by default as many as repeat_time would give.
        eval_size: a share or number of pairs of all sources together to keep out (`mpo.data.eval_part.split_eval`), each there
            once.
        eval_by: as of `split_eval`.

    Raises:
        ValueError: for sources or settings that make no sense, and columns that do not go together.
    """
    checked = check_sources(sources)
    sampling = check_settings(checked, seed=seed, sampling=sampling, size=size, eval_size=eval_size, eval_by=eval_by)
    loaded = [dressed(source, load_preferences(**{"seed": seed, **source.load})) for source in checked]
    pairs = joined(checked, loaded)
    starts = np.cumsum([0, *map(len, loaded)])
    held = np.zeros(len(pairs), dtype=bool)
    if eval_size:
        held = choose_eval(pairs, eval_size, seed=seed, by=eval_by)
    left = [start + np.flatnonzero(~held[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True)]
    counts = amounts(checked, [len(rows) for rows in left], sampling, size)
    drawn = [rows[draw(len(rows), count, source.rng(seed))] for source, rows, count in zip(checked, left, counts, strict=True)]
    taken = tuple(
        Taken(source.name, len(rows), count, int(held[start:end].sum()))
        for source, rows, count, start, end in zip(checked, left, counts, starts[:-1], starts[1:], strict=True)
    )
    for row in taken:
        if row.pairs and not row.taken:
            logger.warning(f"No pair of source {row.name!r} is taken: its part of {row.pairs:,} rounds to 0. Raise it or drop it.")
    order = np.concatenate(drawn)
    if not len(order):
        raise ValueError("The mixture is empty: repeat_time and cap leave no pair of any source.")
    everything = len(order) == len(pairs) and bool((order == np.arange(len(pairs))).all())
    train = pairs if everything else pairs.select(order)
    return Mixture(train, pairs.select(np.flatnonzero(held)) if eval_size else None, taken)


def stream_mixture(sources: Sequence[Mapping[str, Any]], *, seed: int = 0) -> IterableDataset:
    """Streams of several sources as one, each next pair from a source drawn by weight, until every source was read once.

    A source that ends before starts again. `state_dict` and `load_state_dict` of the result go on where it stood.

    Args:
        sources: as of `mix`, with ``weight`` for all of them, or for none: then they come in turn.
        seed: of the draws.

    Raises:
        ValueError: for sources without sense, or settings that need to know how many pairs there are.
    """
    checked = check_sources(sources)
    counted = [source.name for source in checked if source.repeat_time != 1 or source.cap is not None]
    if counted:
        raise ValueError(f"Source {counted[0]!r} has a repeat_time or a cap, and a stream's pairs are not counted. Give weights.")
    weights = weights_of(checked) if any(source.weight is not None for source in checked) else None
    streams = []
    for source in checked:
        stream = load_preferences(**{**source.load, "streaming": True})
        streams.append(stream.map(_Dress(_columns(source)), features=stream.features) if _columns(source) else stream)
    probabilities = None if weights is None else list(np.array(weights) / sum(weights))
    return interleave_datasets(streams, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")


# How much of each source


def amounts(sources: Sequence[Source], pairs: Sequence[int], sampling: Sampling, size: int | None = None) -> list[int]:
    """How many pairs to take of each source, which has so many."""
    caps = [np.inf if source.cap is None else source.cap for source in sources]
    # Rounded down, as in the official code; a whole repeat_time is then exact.
    wanted = [int(min(int(count * source.repeat_time), cap)) for source, count, cap in zip(sources, pairs, caps, strict=True)]
    if sampling == "repeat_time":
        return wanted
    base = [float(np.sqrt(count)) for count in wanted] if sampling == "sqrt" else weights_of(sources)
    empty = [source.name for source, count in zip(sources, pairs, strict=True) if not count]
    if empty:
        raise ValueError(f"Source {empty[0]!r} has no pairs to take a share of.")
    return shares(sum(wanted) if size is None else size, base, caps)


def shares(total: int, weights: Sequence[float], caps: Sequence[float]) -> list[int]:
    """Share out a total by weight; what a cap leaves over goes to the others.

    >>> shares(10, [1, 1, 2], [np.inf, np.inf, np.inf])
    [3, 2, 5]
    >>> shares(10, [1, 1, 2], [np.inf, np.inf, 3])
    [4, 3, 3]
    """
    weight, most = np.array(weights, dtype=float), np.array(caps, dtype=float)
    if most.sum() < total:
        raise ValueError(f"size={total:,}, but the caps of the sources allow {int(most.sum()):,} pairs in all.")
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
    """Places of `count` of so many pairs: all of them as often as they go, and a random few for the rest, in order.

    >>> draw(3, 7, np.random.default_rng(0)).tolist()
    [0, 1, 2, 0, 1, 2, 2]
    """
    if not count:
        return np.zeros(0, dtype=np.int64)
    whole, rest = divmod(count, pairs)
    return np.concatenate([np.tile(np.arange(pairs), whole), np.sort(rng.choice(pairs, rest, replace=False))])


# One schema


def dressed(source: Source, pairs: Dataset) -> Dataset:
    """Give pairs the columns that their source asks for; a record's own tiles and augment come first."""
    for name, (feature, value) in _columns(source).items():
        column = [value] * len(pairs)
        if name in pairs.column_names:
            own = pairs.select_columns([name])[:][name]
            if all(one is None for one in own):
                pairs = pairs.remove_columns([name])
            elif all(one is not None for one in own):
                continue
            else:
                column = [value if one is None else one for one in own]
                pairs = pairs.remove_columns([name])
        fingerprint = Hasher.hash([pairs._fingerprint, name, value])
        pairs = pairs.add_column(name, column, feature=feature, new_fingerprint=fingerprint)
    return pairs


def joined(sources: Sequence[Source], loaded: Sequence[Dataset]) -> Dataset:
    """One data set after another, still memory-mapped; a column that one lacks is null there.

    Raises:
        ValueError: for a column of different types.
    """
    first: dict[str, tuple[str, Any]] = {}
    for source, pairs in zip(sources, loaded, strict=True):
        for column, feature in pairs.features.items():
            name, known = first.setdefault(column, (source.name, feature))
            if known != feature and column != "images":
                raise ValueError(
                    f"The column {column!r} is {feature} in source {source.name!r} and {known} in {name!r}, so they are not one "
                    "data set. Bring one into the other's form with `mpo data convert`."
                )
    images = [str(pairs.features["images"]) for pairs in loaded if "images" in pairs.column_names]
    alike = loaded if len(set(images)) < 2 else [with_encoded_images(pairs) for pairs in loaded]
    return alike[0] if len(alike) == 1 else concatenate_datasets(list(alike))


def _columns(source: Source) -> dict[str, tuple[Any, Any]]:
    columns: dict[str, tuple[Any, Any]] = {}
    if source.tiles is not None:
        columns["tiles"] = (dict(TILES), source.tiles)
    if source.augment is not None:
        columns["augment"] = (Value("bool"), source.augment)
    return columns


class _Dress:
    """Puts a source's columns into one record of a stream."""

    def __init__(self, columns: Mapping[str, tuple[Any, Any]]) -> None:
        self._values = {name: value for name, (_, value) in columns.items()}

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        own = {name: record[name] for name in self._values if record.get(name) is not None}
        return {**record, **self._values, **own}
