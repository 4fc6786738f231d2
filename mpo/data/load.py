"""Load preference pairs or conversations: dispatch to one source, or to a mixture of sources, each loaded in the same way.

One way through the files: this file -> `mixture_file` (what a mixture is made of) ->
`sources` (one source) -> `files` and `shards` (lines) -> `records` (a line is a record, or bad).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from numpy.typing import NDArray

from mpo.data import mixture_file
from mpo.data.encoded import with_encoded_images
from mpo.data.eval_part import By, choose_eval
from mpo.data.files import open_files
from mpo.data.formats import check_format
from mpo.data.records import KINDS, Reading, checked_tiles, kind_of
from mpo.data.sources import BadList, Stream, folder_of, load_source, spread, stem, with_own, with_settings
from mpo.data.video import checked_frames
from mpo.io import BAD_RECORDS, MAX_BAD_FRACTION
from mpo.visible import table

logger = logging.getLogger(__name__)


def load_preferences(
    path: str | Path,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    split: str = "train",
    limit: int | None = None,
    tiles: Mapping[str, Any] | None = None,
    frames: Mapping[str, Any] | None = None,
    source: str | None = None,
    metadata: Sequence[str] | None = None,
    on_bad_record: str = "raise",
    max_bad_fraction: float = MAX_BAD_FRACTION,
    bad_records: str | Path | None = None,
    streaming: bool = False,
    num_proc: int | None = None,
    seed: int = 0,
) -> Any:
    """Load preference pairs.

    The first call reads and checks a source and converts it to Arrow in datasets' cache; later calls open the cached
    result, as long as the files do not change.

    Args:
        path: a file (JSONL, optionally with gzip; a JSON array; Parquet; a WebDataset tar), several files by a pattern
            (``*.tar``), a folder of such files (`mpo.data.files`) or of `save_to_disk`, the name of a data set on the Hub, MMPR's
            ``meta.json``, or a mixture file (`mpo.data.mixture_file.read_mixture`): YAML, or JSON with ``sources``.
        format: format of the lines, see `mpo.data.formats`; None: detect it for each line.
        image_root: the folder that image paths are relative to and must be inside; default: the folder of the file. For a
            ``meta.json``: the folder that its paths are relative to and its roots must be inside; default: it may name any folder.
        split: the split to load; ``"train"`` for a source without splits; ``"eval"`` is the evaluation part of a mixture.
        limit: maximum number of pairs: the first ones, or in a mixture or ``meta.json`` pairs evenly spread over all sources.
        tiles: how images are split into tiles, if not as the processor does: ``min``, ``max``, ``thumbnail``, each optional
            (`mpo.encoding.tiles`). A record's own settings take precedence.
        frames: number of frames of each video, ``min`` (8) and ``max`` (32), evenly spread in time (`mpo.data.video`). A record's
            own settings take precedence.
        source: name of the source in the records; default: the name of the file. For a mixture: a prefix of its sources' names.
        metadata: fields that are metadata, whatever they hold; a field that no format uses, but that may be an image, a message or
            text of the prompt, is refused without it (`mpo.data.unused`).
        on_bad_record: ``"raise"``, or ``"skip"`` to leave bad records out, count and list them.
        max_bad_fraction: with ``"skip"``, the maximum fraction of bad records; of a stream, the fraction of the records that a
            process has read so far, but of at least 100.
        bad_records: the file that lists bad records, JSONL with ``where`` and ``reason``; default: ``bad_records.jsonl`` in the
            current folder.
        streaming: read lazily, without converting anything beforehand. Lines that give no pair, and pairs beyond the limit per
            line, are then not counted and not logged.
        num_proc: number of processes that read; default: one per core for a large source, else one.
        seed: of the random choices in a mixture that does not set one.

    Returns:
        a `datasets.Dataset` (streaming: an `IterableDataset`) with the columns of `mpo.schema`; optional columns exist if any
        record has a value in them.

    Raises:
        BadRecord: for a line that is not a valid pair; a ValueError that begins with ``file:line``.
        ValueError: for files that are missing, damaged or without pairs, and for invalid settings.
    """
    return _load("pair", **locals())


def load_conversations(path: str | Path, *, from_preferences: bool = False, **settings: Any) -> Any:
    """Load conversations for supervised training (`mpo.PackedSFTTrainer`).

    Args:
        path: as in `load_preferences`; a ``meta.json`` may be InternVL's. A source of a mixture may have ``from_preferences`` too.
        from_preferences: read pairs, in any format of `load_preferences`, and take each prompt with its chosen completion, whose
            turns alone are labelled. One that is chosen in several pairs of a line is taken once; margins and known answers are
            left out.
        settings: the other arguments of `load_preferences`; ``format`` is one of `mpo.data.conversations.CONVERSATIONS`.

    Returns:
        a `datasets.Dataset` (streaming: an `IterableDataset`) with the columns of `mpo.schema.CONVERSATIONS`; optional columns
        exist if any record has a value in them. Contents of ``messages`` are parts, ``tools`` and ``tool_calls`` are JSON, and a
        turn of the assistant that is not labelled has ``"train": false``.

    Raises:
        BadRecord, ValueError: as `load_preferences`.
    """
    if not isinstance(from_preferences, bool):
        raise ValueError(f"from_preferences must be true or false; got {from_preferences!r}.")
    given = signature(load_preferences).bind(path, **settings)
    given.apply_defaults()
    return _load("chosen" if from_preferences else "conversation", **given.arguments)


def kind_of_source(path: str | Path, split: str = "train", *, format: str | None = None) -> str:
    """Whether a source, a mixture included, holds conversations, by its first record, or else pairs; ``format`` may decide it."""
    if len(kinds := [kind for kind in ("pair", "conversation") if format in KINDS[kind].formats]) == 1:
        return kinds[0]
    path = os.path.expanduser(path)
    if mixture_file.has_sources(path):
        first = mixture_file.read_mixture(path)["sources"][0]
        if first.get("from_preferences") is not None:
            return "conversation"
        return kind_of_source(first["path"], first.get("split") or "train", format=first.get("format"))
    lines = (line for shard in open_files(path, split) for _, line in shard.lines() if isinstance(line, Mapping))
    return kind_of(next(lines, {}))


def _load(
    kind: str, path: Any, *, format: Any, image_root: Any, split: str, limit: Any, tiles: Any, frames: Any, source: Any,
    metadata: Any, on_bad_record: str, max_bad_fraction: float, bad_records: Any, streaming: bool, num_proc: int | None, seed: int
) -> Any:  # fmt: skip
    check_format(format, KINDS[kind].formats)
    bad = {"on_bad_record": on_bad_record, "max_bad_fraction": max_bad_fraction}
    mixture_file.check_values({"split": split, **bad, **({} if limit is None else {"limit": limit})})
    if max_bad_fraction != MAX_BAD_FRACTION and on_bad_record == "raise":
        raise ValueError(f"max_bad_fraction={max_bad_fraction} needs on_bad_record='skip'. Set that, or leave it out.")
    metadata = mixture_file.checked_names(metadata)
    own = {"tiles": checked_tiles(tiles), "frames": checked_frames(frames)}
    if not isinstance(path, (str, os.PathLike)):
        several = "Name several files by a pattern (data/*.jsonl), a folder, or a mixture file (mpo.data.mixture_file)."
        raise ValueError(f"A data set is one path or name; got {type(path).__name__} {path!r:.80}. {several}")
    path = os.path.expanduser(path)
    if mixture_file.has_sources(path):
        if streaming:
            found = f"{path} says how often each record is used, but a stream's records are not counted"
            raise ValueError(f"{found}. Set streaming=false, or call mpo.data.load.stream_mixture.")
        settings = {"format": format, "num_proc": num_proc, "metadata": metadata, "bad_records": bad_records, **bad}
        return with_settings(spread(_load_mixture(path, image_root, split, seed, settings, source, kind), limit), own)
    root = os.path.expanduser(image_root) if image_root else folder_of(path)
    reading = Reading(os.path.realpath(root), format, source or stem(path), on_bad_record == "skip", metadata, kind)
    listed = BadList(Path(bad_records or BAD_RECORDS), max_bad_fraction)
    if streaming:
        stream = Stream(reading, listed, own).open(path, split)
        return stream if limit is None else stream.take(limit)
    return load_source(path, split, reading, listed, own, limit, num_proc)


def mix(
    sources: Sequence[Mapping[str, Any]],
    *,
    seed: int = 0,
    sampling: mixture_file.Sampling | None = None,
    size: int | None = None,
    eval_size: float | int | None = None,
    eval_by: By = "both",
    kind: str = "pair",
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
        kind: one of `mpo.data.records.KINDS`.

    Raises:
        ValueError: for invalid sources or settings, and for columns that do not match.
    """
    checked = mixture_file.check_sources(sources)
    sampling = mixture_file.check_settings(checked, seed=seed, sampling=sampling, size=size, eval_size=eval_size, eval_by=eval_by)
    loaded = [with_settings(_load_one(kind, source, seed=seed), {"augment": source.augment}) for source in checked]
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
            found = f"No record of source {row.name!r} is taken: its part of {row.pairs:,} records rounds to 0"
            logger.warning(f"{found}. Increase its repeat_time or weight, or remove it.")
    order = np.concatenate(drawn)
    if not len(order):
        raise ValueError("The mixture is empty: repeat_time and cap leave no record of any source. Increase them.")
    everything = len(order) == len(pairs) and bool((order == np.arange(len(pairs))).all())
    train = pairs if everything else pairs.select(order)
    return Mixture(train, pairs.select(np.flatnonzero(in_eval)) if eval_size else None, taken)


def _load_one(kind: str, source: mixture_file.Source, **settings: Any) -> Any:
    settings |= source.load
    if kind != "pair":
        chosen = kind == "chosen" if source.from_preferences is None else source.from_preferences
        return load_conversations(**settings, from_preferences=chosen)
    if source.from_preferences is not None:
        raise ValueError(f"Source {source.name!r} has from_preferences, which is for conversations. Remove it.")
    return load_preferences(**settings)


def stream_mixture(sources: Sequence[Mapping[str, Any]], *, seed: int = 0, kind: str = "pair") -> IterableDataset:
    """Interleave streams of several sources, drawing the source of each pair by weight, until every source was read once.

    A source that ends earlier is repeated. The result resumes with `state_dict` and `load_state_dict`. Arguments are as in `mix`;
    all sources have a ``weight`` or, to take them in turn, none. Raises ValueError for invalid sources, and for settings that need
    the number of pairs.
    """
    checked = mixture_file.check_sources(sources)
    counted = [source.name for source in checked if source.repeat_time != 1 or source.cap is not None]
    if counted:
        raise ValueError(f"Source {counted[0]!r} has a repeat_time or a cap, but a stream's records are not counted. Set a weight.")
    weights = mixture_file.weights_of(checked) if any(source.weight is not None for source in checked) else None
    streams = []
    for source in checked:
        stream = _load_one(kind, source, streaming=True)
        own = {} if source.augment is None else {"augment": source.augment}
        streams.append(stream.map(with_own, fn_kwargs={"own": own}, features=stream.features) if own else stream)
    probabilities = None if weights is None else list(np.array(weights) / sum(weights))
    return interleave_datasets(streams, probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted")


def _load_mixture(path: str, base: Any, split: str, seed: int, settings: dict[str, Any], name: str | None, kind: str) -> Dataset:
    splits = ("train",) if mixture_file.is_meta(path) else ("train", "eval")
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}. Leave split out, or set it to {' or '.join(map(repr, splits))}.")
    described = mixture_file.read_mixture(path, base=base)
    sources = [_merged(source, settings, name) for source in described["sources"]]
    mixture = mix(**{"seed": seed, **described, "sources": sources, "kind": kind})
    if split == "eval":
        if mixture.eval is None:
            raise ValueError(f"{path} has no evaluation part. Add eval_size to it, a fraction or number of records, such as 0.01.")
        return mixture.eval
    logger.info(f"{path}:\n{mixture.describe()}")
    return mixture.train


def _merged(source: Mapping[str, Any], settings: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    if prefix is not None:
        source = {**source, "source": f"{prefix}/{source.get('source') or mixture_file.source_name(source)}"}
    merged = {**settings, **{key: value for key, value in source.items() if value is not None}}
    if merged["on_bad_record"] == "raise" and source.get("max_bad_fraction") is None:
        del merged["max_bad_fraction"]  # it is only for sources that skip bad records
    return merged


# How much of each source


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


def amounts(
    sources: Sequence[mixture_file.Source], pairs: Sequence[int], sampling: mixture_file.Sampling, size: int | None = None
) -> list[int]:
    """Compute how many pairs to take of each source, given the number of pairs it has."""
    caps = [np.inf if source.cap is None else source.cap for source in sources]
    # Rounded down, as in the official code; a whole repeat_time is then exact.
    wanted = [int(min(int(count * source.repeat_time), cap)) for source, count, cap in zip(sources, pairs, caps, strict=True)]
    if sampling == "repeat_time":
        return wanted
    base = [float(np.sqrt(count)) for count in wanted] if sampling == "sqrt" else mixture_file.weights_of(sources)
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


def joined(sources: Sequence[mixture_file.Source], loaded: Sequence[Dataset]) -> Dataset:
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
