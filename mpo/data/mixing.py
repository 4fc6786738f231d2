"""Mix several sources of pairs into one data set, by an index over all of them: no pair is copied."""

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
        """Format a table of each source's name, pairs, taken pairs, and fraction of the mixture."""
        total = sum(row.taken for row in self.taken)
        rows = [*self.taken, Taken("in all", sum(row.pairs for row in self.taken), total, sum(row.eval for row in self.taken))]
        cells = [("source", "pairs", "taken", "fraction", "eval")]
        cells += [(r.name, f"{r.pairs:,}", f"{r.taken:,}", f"{r.taken / max(total, 1):.1%}", f"{r.eval:,}") for r in rows]
        columns = range(4 if self.eval is None else 5)
        widths = [max(len(row[column]) for row in cells) for column in columns]
        lines = []
        for row in cells:
            numbers = "".join(f"  {row[column]:>{widths[column]}}" for column in columns[1:])
            lines.append(f"{row[0]:<{widths[0]}}{numbers}")
        return "\n".join(lines)


def load_mixture(sources: Sequence[Mapping[str, Any]], **settings: Any) -> Dataset:
    """Load the training pairs of a mixture; arguments and errors as in `mix`."""
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
    """Make one data set of several sources; the result depends only on the sources, the settings and the seed.

    Args:
        sources: dicts as described in `mpo.data.mixture_file`.
        seed: of all random choices. The choices in one source do not depend on the other sources.
        sampling: ``"repeat_time"``: use every source `repeat_time` times. ``"weight"``: divide `size` in proportion to the weights.
            ``"sqrt"``: divide `size` in proportion to the square root of each source's pairs after repeat_time and cap. Default:
            by weight if sources have one, else by repeat_time. A source with too few pairs is repeated: all its pairs first.
        size: number of pairs of the mixture, for ``"weight"`` and ``"sqrt"``; default: as many as repeat_time gives.
        eval_size: fraction or number of pairs, over all sources, of the evaluation part (`mpo.data.eval_part.split_eval`), in
            which each pair is there once.
        eval_by: what connects two pairs, as `by` in `split_eval`.

    Raises:
        ValueError: for invalid sources or settings, and for columns that do not match.
    """
    checked = check_sources(sources)
    sampling = check_settings(checked, seed=seed, sampling=sampling, size=size, eval_size=eval_size, eval_by=eval_by)
    loaded = [dressed(source, load_preferences(**{"seed": seed, **source.load})) for source in checked]
    pairs = joined(checked, loaded)
    starts = np.cumsum([0, *map(len, loaded)])
    in_eval = np.zeros(len(pairs), dtype=bool)
    if eval_size:
        in_eval = choose_eval(pairs, eval_size, seed=seed, by=eval_by)
    left = [start + np.flatnonzero(~in_eval[start:end]) for start, end in zip(starts[:-1], starts[1:], strict=True)]
    counts = amounts(checked, [len(rows) for rows in left], sampling, size)
    drawn = [rows[draw(len(rows), count, source.rng(seed))] for source, rows, count in zip(checked, left, counts, strict=True)]
    taken = tuple(
        Taken(source.name, len(rows), count, int(in_eval[start:end].sum()))
        for source, rows, count, start, end in zip(checked, left, counts, starts[:-1], starts[1:], strict=True)
    )
    for row in taken:
        if row.pairs and not row.taken:
            logger.warning(
                f"No pair of source {row.name!r} is taken: its part of {row.pairs:,} pairs rounds to 0. Increase its repeat_time "
                "or weight, or remove it."
            )
    order = np.concatenate(drawn)
    if not len(order):
        raise ValueError("The mixture is empty: repeat_time and cap leave no pair of any source. Increase them.")
    everything = len(order) == len(pairs) and bool((order == np.arange(len(pairs))).all())
    train = pairs if everything else pairs.select(order)
    return Mixture(train, pairs.select(np.flatnonzero(in_eval)) if eval_size else None, taken)


def stream_mixture(sources: Sequence[Mapping[str, Any]], *, seed: int = 0) -> IterableDataset:
    """Interleave streams of several sources, drawing the source of each pair by weight, until every source was read once.

    A source that ends earlier is repeated. The result resumes with `state_dict` and `load_state_dict`.

    Args:
        sources: as in `mix`, with a ``weight`` for all of them or, to take them in turn, for none.
        seed: of the random choices.

    Raises:
        ValueError: for invalid sources, and for settings that need the number of pairs.
    """
    checked = check_sources(sources)
    counted = [source.name for source in checked if source.repeat_time != 1 or source.cap is not None]
    if counted:
        raise ValueError(
            f"Source {counted[0]!r} has a repeat_time or a cap, but a stream's pairs are not counted. Set a weight instead."
        )
    weights = weights_of(checked) if any(source.weight is not None for source in checked) else None
    streams = []
    for source in checked:
        stream = load_preferences(**{**source.load, "streaming": True})
        streams.append(stream.map(_AddColumns(_columns(source)), features=stream.features) if _columns(source) else stream)
    probabilities = None if weights is None else list(np.array(weights) / sum(weights))
    return interleave_datasets(streams, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")


# How much of each source


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
        raise ValueError(f"Source {empty[0]!r} has no pairs. Remove it, or set a smaller eval_size.")
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
        raise ValueError(
            f"size={total:,}, but the caps of the sources allow {int(most.sum()):,} pairs. Set a smaller size, or raise a cap."
        )
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


# Columns


def dressed(source: Source, pairs: Dataset) -> Dataset:
    """Add the columns of a source's settings to its pairs; a record's own tiles and augment take precedence."""
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
    """Concatenate data sets, still memory-mapped; a missing column is filled with null.

    Raises:
        ValueError: for a column with different types.
    """
    first: dict[str, tuple[str, Any]] = {}
    for source, pairs in zip(sources, loaded, strict=True):
        for column, feature in pairs.features.items():
            name, known = first.setdefault(column, (source.name, feature))
            if known != feature and column != "images":
                raise ValueError(
                    f"The column {column!r} is {feature} in source {source.name!r} and {known} in {name!r}, so they cannot be "
                    "concatenated. Convert one to the other's format with `mpo data convert`."
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


class _AddColumns:
    """Adds the columns of a source's settings to one record of a stream."""

    def __init__(self, columns: Mapping[str, tuple[Any, Any]]) -> None:
        self._values = {name: value for name, (_, value) in columns.items()}

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        own = {name: record[name] for name in self._values if record.get(name) is not None}
        return {**record, **self._values, **own}
