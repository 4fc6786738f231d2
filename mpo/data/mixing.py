"""Mix several sources of pairs into one data set, by an index over all of them: no pair is copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Value, concatenate_datasets
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from mpo.data.encoded import with_encoded_images
from mpo.data.mixture_file import Sampling, Source, weights_of
from mpo.data.records import TILES

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
    for name, (feature, value) in source_columns(source).items():
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


def source_columns(source: Source) -> dict[str, tuple[Any, Any]]:
    """Return the columns that a source sets, with their types and values."""
    columns: dict[str, tuple[Any, Any]] = {}
    if source.tiles is not None:
        columns["tiles"] = (dict(TILES), source.tiles)
    if source.augment is not None:
        columns["augment"] = (Value("bool"), source.augment)
    return columns


class AddColumns:
    """Adds the columns of a source's settings to one record of a stream."""

    def __init__(self, columns: Mapping[str, tuple[Any, Any]]) -> None:
        self._values = {name: value for name, (_, value) in columns.items()}

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Add the columns; the record's own values take precedence."""
        own = {name: record[name] for name in self._values if record.get(name) is not None}
        return {**record, **self._values, **own}
