"""Load files of pairs as a `datasets.Dataset` of records, whose images are opened when they are read, or as a stream."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from mpo.data.converted import Converted, Reading, convert
from mpo.data.files import files_of, open_files
from mpo.data.formats import check_format
from mpo.data.formats.vlfeedback import MAX_PAIRS
from mpo.data.meta import is_meta, one_object, read_meta
from mpo.data.pairs import BadRecord
from mpo.data.records import FEATURES, FRAMES, TILES, checked_tiles, to_record
from mpo.data.shards import LinesShard, Shard
from mpo.data.video import checked_frames
from mpo.training.bad_records import MAX_BAD_FRACTION, MIN_DENOMINATOR

__all__ = ["FEATURES", "folder_of", "is_mixture", "load_preferences", "read_jsonl"]

logger = logging.getLogger(__name__)
ON_BAD_RECORD = ("raise", "skip")
MIXTURES = (".yaml", ".yml")
STREAM_SHARDS = 64
"""Minimum number of shards of a streamed JSONL file, for the workers and ranks that share it."""


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
            (``*.tar``), a folder of such files (`mpo.data.splits`) or of `save_to_disk`, the name of a data set on the Hub, MMPR's
            ``meta.json``, or a mixture file (`mpo.data.mixing.read_mixture`): YAML, or JSON with ``sources``.
        format: format of the lines, see `mpo.data.formats`; None: detect it for each line.
        image_root: the folder that image paths are relative to and must be inside; default: the folder of the file. For a
            ``meta.json``: the folder that its paths are relative to and its roots must be inside; default: it may name any folder.
        split: the split to load; ``"train"`` for a source without splits; ``"eval"`` is the evaluation part of a mixture.
        limit: maximum number of pairs: the first ones, or in a mixture or ``meta.json`` pairs evenly spread over all sources.
        tiles: how images are split into tiles, if not as the processor does: ``min``, ``max``, ``thumbnail``, each optional
            (`mpo.encoding.tiles`). A record's own settings take precedence.
        frames: number of frames of each video, ``min`` (8) and ``max`` (32), evenly spread in time (`mpo.data.video`). A record's
            own settings take precedence.
        source: name of the source in the records; default: the name of the file.
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
        a `datasets.Dataset` (streaming: an `IterableDataset`) with the columns of `mpo.data.records`; optional columns exist if any
        record has a value in them.

    Raises:
        BadRecord: for a line that is not a valid pair; a ValueError that begins with ``file:line``.
        ValueError: for files that are missing, damaged or without pairs, and for invalid settings.
    """
    check_format(format)
    _check(split, limit, on_bad_record, max_bad_fraction)
    own_tiles = checked_tiles(tiles)
    limits = checked_frames(frames)
    own_frames = limits if frames and any(value is not None for value in frames.values()) else None
    path = os.path.expanduser(path)
    if is_meta(path) or is_mixture(path):
        if streaming:
            raise ValueError(
                f"{path} says how often each pair is used, but a stream's pairs are not counted. Set streaming=false, or call "
                "mpo.data.mixing.stream_mixture."
            )
        settings = {"on_bad_record": on_bad_record, "max_bad_fraction": max_bad_fraction, "bad_records": bad_records}
        settings |= {"format": format, "num_proc": num_proc}
        return _with_own(_spread(_load_mixture(path, image_root, split, seed, settings), limit), own_tiles, own_frames)

    root = os.path.expanduser(image_root) if image_root else folder_of(path)
    reading = Reading(os.path.realpath(root), format, source or _stem(path), skip=on_bad_record == "skip")
    bad_file = Path(bad_records) if bad_records else Path("bad_records.jsonl")
    if streaming:
        stream = _Stream(reading, {"tiles": own_tiles, "frames": own_frames}, bad_file, max_bad_fraction)
        shards = open_files(path, split, min_shards=STREAM_SHARDS)
        records = IterableDataset.from_generator(stream, features=FEATURES, gen_kwargs={"shards": shards})
        return records if limit is None else records.take(limit)
    key, opened = _key(path, split)
    converted = convert(lambda: opened or open_files(path, split), reading, key, name=_stem(path), num_proc=num_proc)
    _report(converted, path, bad_file, max_bad_fraction)
    _report_unused(converted, path)
    if converted.pairs is None:
        raise ValueError(f"{path} has no pairs. Set data.path to a file of preference pairs.")
    return _with_own(_first(converted.pairs, limit), own_tiles, own_frames)


def _check(split: Any, limit: Any, on_bad_record: Any, max_bad_fraction: Any) -> None:
    if not isinstance(split, str):
        raise ValueError(f"split must be the name of a split, such as 'train'; got {split!r}.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a number of pairs, 1 or more; got {limit!r}.")
    if on_bad_record not in ON_BAD_RECORD:
        raise ValueError(f"on_bad_record must be one of {', '.join(ON_BAD_RECORD)}; got {on_bad_record!r}.")
    if isinstance(max_bad_fraction, bool) or not isinstance(max_bad_fraction, (int, float)) or not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction must be between 0 and 1; got {max_bad_fraction!r}.")
    if max_bad_fraction != MAX_BAD_FRACTION and on_bad_record == "raise":
        raise ValueError(
            f"max_bad_fraction={max_bad_fraction} needs on_bad_record='skip'. Set that, or leave max_bad_fraction out."
        )


def is_mixture(path: str | Path) -> bool:
    """Whether a file is a mixture file: by its ending, or as a JSON object with a list of sources."""
    if os.fspath(path).lower().endswith(MIXTURES):
        return True
    sources = one_object(path).get("sources")
    return isinstance(sources, list) and all(isinstance(source, Mapping) for source in sources)


def read_jsonl(path: Path, image_root: Path, to_row: Callable[..., dict[str, Any]] = to_record) -> Iterator[dict[str, Any]]:
    """Yield the records of a JSONL file, each made by `to_row`; empty lines are skipped."""
    for where, line in LinesShard(path, 0, None, 1).lines():
        if isinstance(line, BadRecord):
            raise line
        yield to_row(line, where=where, image_root=image_root)


def _load_mixture(path: str, base: str | Path | None, split: str, seed: int, settings: dict[str, Any]) -> Dataset:
    from mpo.data.mixing import mix, read_mixture  # imported here: mixing imports load_preferences

    splits = ("train",) if is_meta(path) else ("train", "eval")
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}. Leave split out, or set it to {' or '.join(map(repr, splits))}.")
    if is_meta(path):
        sources = [spec.as_source() for spec in read_meta(path, base=base)]
        described: dict[str, Any] = {"sources": sources, "sampling": "repeat_time"}
    elif base:
        raise ValueError(
            f"{path} is a mixture, whose sources have their own image_root; got {base}. Set it for each source in the file."
        )
    else:
        described = read_mixture(path)
    sources = [_with_settings(source, settings) for source in described["sources"]]
    mixture = mix(**{"seed": seed, **described, "sources": sources})
    if split == "eval":
        if mixture.eval is None:
            raise ValueError(
                f"{path} has no evaluation part. Add eval_size to it, a fraction or a number of pairs, such as eval_size: 0.01."
            )
        return mixture.eval
    logger.info(f"{path}:\n{mixture.describe()}")
    return mixture.train


def _with_settings(source: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**settings, **source}
    if merged["on_bad_record"] == "raise" and "max_bad_fraction" not in source:
        del merged["max_bad_fraction"]  # it is only for sources that skip bad records
    return merged


def folder_of(path: str) -> str:
    """Return the folder of a file or folder; of a pattern, the part without wildcards; of a name on the Hub, the current folder."""
    if os.path.isdir(path):
        return path
    while any(wildcard in path for wildcard in "*?["):
        path = os.path.dirname(path)
        if not any(wildcard in path for wildcard in "*?["):
            return path or "."
    return os.path.dirname(path) or "."


def _stem(path: str) -> str:
    name = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else path
    return name.partition(".")[0] or name


def _key(path: str, split: str) -> tuple[Any, list[Shard]]:
    """Return the state of a source as a cache key, and its shards if they had to be opened for it."""
    if files := files_of(path, split):
        names = [(os.path.abspath(file), os.path.realpath(file)) for file in files]  # a link may be changed later
        stats = [file.stat() for file in files]
        return [[*name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)] + [split], []
    shards = open_files(path, split)  # of the Hub: identified by datasets' fingerprint
    return [path, split, [getattr(getattr(shard, "dataset", None), "_fingerprint", None) for shard in shards[:1]]], shards


def _first(pairs: Dataset, limit: int | None) -> Dataset:
    return pairs if limit is None else pairs.select(range(min(limit, len(pairs))))


def _spread(pairs: Dataset, limit: int | None) -> Dataset:
    """Select `limit` pairs, evenly spread: the middles of equal intervals."""
    if limit is None or limit >= len(pairs):
        return pairs
    return pairs.select([(2 * number + 1) * len(pairs) // (2 * limit) for number in range(limit)])


def _with_own(pairs: Dataset, tiles: dict[str, Any] | None, frames: dict[str, Any] | None) -> Dataset:
    """Add the settings of the source to records that have none of their own."""
    if "videos" not in pairs.column_names:
        frames = None
    for name, given, feature in (("tiles", tiles, TILES), ("frames", frames, FRAMES)):
        if given is not None:
            column = [given] * len(pairs)
            if name in pairs.column_names:
                column = [own or given for own in pairs.select_columns([name])[:][name]]
                pairs = pairs.remove_columns([name])
            pairs = pairs.add_column(name, column, feature=feature)
    return pairs


# Bad records


def _report(converted: Converted, path: str, listed: Path, most: float) -> None:
    """List the bad records that were skipped.

    Raises:
        ValueError: if there are too many of them.
    """
    if not converted.bad:
        return
    count, lines = len(converted.bad), converted.lines
    lines_of_list = [json.dumps({"where": bad.where, "reason": bad.reason}, ensure_ascii=True) for bad in converted.bad]
    _append(listed, lines_of_list)
    message = (
        f"{count:,} of {lines:,} records of {path} are bad and left out; {listed} lists them with reasons. The first: "
        f"{converted.bad[0]}"
    )
    if count > most * lines:
        raise ValueError(f"{message} That is more than max_bad_fraction={most:g} allows. Fix the records, or increase it.")
    logger.warning(message)


def _report_unused(converted: Converted, path: str) -> None:
    """Log how many good lines give no pair, and how many pairs exceed the limit per line."""
    if converted.empty:
        logger.warning(
            f"{converted.empty:,} of {converted.lines:,} records of {path} give no pair: no two of their completions differ in "
            "rating and text."
        )
    if converted.dropped:
        logger.warning(
            f"{converted.dropped:,} pairs of {path} are left out: only the {MAX_PAIRS} with the largest margins per "
            "prompt are used."
        )


def _append(path: Path, lines: Sequence[str]) -> None:
    """Append lines that a file does not have yet: every rank and every epoch reports the same lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = set(path.read_text("utf-8").splitlines()) if path.is_file() else set()
    new = [line for line in lines if line not in known]
    if new:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in new))


class _Stream:
    """Generates the records of several shards of a source."""

    def __init__(self, reading: Reading, own: dict[str, Any], listed: Path, most: float) -> None:
        self._reading, self._own, self._listed, self._most = reading, own, listed, most
        self._read: dict[str, tuple[int, int]] = {}  # lines and bad lines of each shard so far; datasets passes shards singly

    def __call__(self, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            name, lines, bad = repr(shard), 0, 0
            for found in self._reading.lines(shard):
                lines += 1
                if isinstance(found, BadRecord):
                    bad += 1
                    _append(self._listed, [json.dumps({"where": found.where, "reason": found.reason})])
                    self._read[name] = lines, bad
                    self._check_fraction(found)
                    continue
                for row in found:
                    yield {**row, **{name: row[name] or given for name, given in self._own.items()}}
            self._read[name] = lines, bad

    def _check_fraction(self, last: BadRecord) -> None:
        """Raise if too many of the records that this process has read of the stream are bad; each is counted once."""
        lines, bad = (sum(counts) for counts in zip(*self._read.values(), strict=True))
        if bad > self._most * max(lines, MIN_DENOMINATOR):
            raise ValueError(
                f"{bad:,} of the first {lines:,} records of this stream are bad, which is more than "
                f"max_bad_fraction={self._most:g} allows; {self._listed} lists them. Fix them, or increase it. The last: {last}"
            )
