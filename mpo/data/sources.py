"""Files of pairs -> a `datasets.Dataset` of records whose images are opened when they are read, or a stream of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from mpo.bad_records import MAX_BAD_FRACTION, MIN_DENOMINATOR
from mpo.data.converted import Converted, Reading, convert
from mpo.data.files import files_of, open_files
from mpo.data.formats import check_format
from mpo.data.formats.vlfeedback import MAX_PAIRS
from mpo.data.meta import is_meta, one_object, read_meta
from mpo.data.pairs import BadRecord
from mpo.data.records import FEATURES, FRAMES, TILES, checked_tiles, to_record
from mpo.data.shards import LinesShard, Shard
from mpo.data.video import checked_frames

__all__ = ["FEATURES", "folder_of", "is_mixture", "load_preferences", "read_jsonl"]

logger = logging.getLogger(__name__)
ON_BAD_RECORD = ("raise", "skip")
MIXTURES = (".yaml", ".yml")
STREAM_SHARDS = 64
"""A stream of one JSONL file is cut into so many shards, for the workers and ranks that share it."""


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

    The first time, a source is read, checked and converted to Arrow in datasets' cache; later it is opened from there, as long as
    its files do not change.

    Args:
        path: a file (JSONL, also with gzip; a JSON array; Parquet; the tar of a WebDataset), several by a pattern (``*.tar``), a
            folder of such files (`mpo.data.splits`) or of `save_to_disk`, the name of a data set on the Hub, the ``meta.json`` of
            MMPR, or a file that describes a mixture (`mpo.data.mixing.read_mixture`): YAML, or JSON with ``sources``.
        format: of the lines, see `mpo.data.formats`; None: each line's is detected.
        image_root: the folder that image paths are relative to and stay inside; by default that of the file. Of a ``meta.json``:
            the folder that its own paths are relative to, and its roots inside; without, it may name any folder of this machine.
        split: the one to take, of a source that has several, else ``"train"``; of a mixture, ``"eval"`` is what it holds out.
        limit: only the first so many pairs; of a mixture or ``meta.json``, so many evenly spread over it, of every source in
            proportion.
        tiles: how images of these pairs are cut, where it is not what the processor does: ``min``, ``max``, ``thumbnail``, each
            optional (`mpo.packing.tiles`). What a record says itself comes first.
        frames: of each video, ``min`` (8) and ``max`` (32), evenly spread in time (`mpo.data.video`). What a record says
            itself comes first.
        source: what records call their source; by default the name of the file.
        on_bad_record: ``"raise"``, or ``"skip"``: leave bad records out, count and list them.
        max_bad_fraction: with ``"skip"``, more than this share of bad records is refused; of a stream, the share of what a process
            has read of it so far, or of 100 records where that is more.
        bad_records: the file that lists them, JSONL with ``where`` and ``reason``; by default ``bad_records.jsonl`` in the current
            folder.
        streaming: read while it goes, converting nothing beforehand. How many good lines give no pair, and how many pairs are more
            than a line may give, is then not counted and not logged.
        num_proc: processes that read; by default one per core, for a large source.
        seed: of what is drawn from the sources of a mixture that does not name one.

    Returns:
        a `datasets.Dataset` (streaming: an `IterableDataset`) with the columns of `mpo.data.records`; those that are optional are
        there when a record has something in them.

    Raises:
        BadRecord: for a line that is no pair, a ValueError that begins with ``file:line``.
        ValueError: for files that are not there, damaged, or have no pairs, and for settings that make no sense.
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
                f"{path} says how often each pair is taken, and a stream's pairs are not counted. Set streaming=false, or take "
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
        raise ValueError(f"{path} has no pairs.")
    return _with_own(_first(converted.pairs, limit), own_tiles, own_frames)


def _check(split: Any, limit: Any, on_bad_record: Any, max_bad_fraction: Any) -> None:
    if not isinstance(split, str):
        raise ValueError(f"split is the name of a split, such as 'train'; got {split!r}.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is a number of pairs, 1 or more; got {limit!r}.")
    if on_bad_record not in ON_BAD_RECORD:
        raise ValueError(f"on_bad_record is one of {', '.join(ON_BAD_RECORD)}; got {on_bad_record!r}.")
    if isinstance(max_bad_fraction, bool) or not isinstance(max_bad_fraction, (int, float)) or not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is a share between 0 and 1; got {max_bad_fraction!r}.")
    if max_bad_fraction != MAX_BAD_FRACTION and on_bad_record == "raise":
        raise ValueError("max_bad_fraction needs on_bad_record='skip'. Set it, or leave this out.")


def is_mixture(path: str | Path) -> bool:
    """Whether a file describes a mixture: by its ending, or as one JSON object with a list of sources."""
    if os.fspath(path).lower().endswith(MIXTURES):
        return True
    sources = one_object(path).get("sources")
    return isinstance(sources, list) and all(isinstance(source, Mapping) for source in sources)


def read_jsonl(path: Path, image_root: Path, to_row: Callable[..., dict[str, Any]] = to_record) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, one by one, each made by `to_row`; empty lines are passed over."""
    for where, line in LinesShard(path, 0, None, 1).lines():
        if isinstance(line, BadRecord):
            raise line
        yield to_row(line, where=where, image_root=image_root)


def _load_mixture(path: str, base: str | Path | None, split: str, seed: int, settings: dict[str, Any]) -> Dataset:
    from mpo.data.mixing import mix, read_mixture  # it loads its sources by load_preferences

    splits = ("train",) if is_meta(path) else ("train", "eval")
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}. Leave split out, or set it to {' or '.join(map(repr, splits))}.")
    if is_meta(path):
        sources = [spec.as_source() for spec in read_meta(path, base=base)]
        described: dict[str, Any] = {"sources": sources, "sampling": "repeat_time"}
    elif base:
        raise ValueError(f"The sources in {path} have an image_root of their own. Write it beside their paths.")
    else:
        described = read_mixture(path)
    sources = [_with_settings(source, settings) for source in described["sources"]]
    mixture = mix(**{"seed": seed, **described, "sources": sources})
    if split == "eval":
        if mixture.eval is None:
            raise ValueError(f"{path} holds nothing out. Write eval_size: 0.01 (a share, or a number of pairs) into it.")
        return mixture.eval
    logger.info(f"{path}:\n{mixture.describe()}")
    return mixture.train


def _with_settings(source: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    merged = {**settings, **source}
    if merged["on_bad_record"] == "raise" and "max_bad_fraction" not in source:
        del merged["max_bad_fraction"]  # it is of the sources that leave records out
    return merged


def folder_of(path: str) -> str:
    """The folder of a file; of a folder, itself; of a pattern, the part without marks; of a name on the Hub, the current one."""
    if os.path.isdir(path):
        return path
    while any(mark in path for mark in "*?["):
        path = os.path.dirname(path)
        if not any(mark in path for mark in "*?["):
            return path or "."
    return os.path.dirname(path) or "."


def _stem(path: str) -> str:
    name = os.path.basename(os.path.abspath(path)) if os.path.exists(path) else path
    return name.partition(".")[0] or name


def _key(path: str, split: str) -> tuple[Any, list[Shard]]:
    """What a source is now; and its shards, if they had to be opened to know that."""
    if files := files_of(path, split):
        names = [(os.path.abspath(file), os.path.realpath(file)) for file in files]  # a link may lead elsewhere later
        stats = [file.stat() for file in files]
        return [[*name, stat.st_size, stat.st_mtime_ns] for name, stat in zip(names, stats, strict=True)] + [split], []
    shards = open_files(path, split)  # of the Hub: datasets knows them by their fingerprint
    return [path, split, [getattr(getattr(shard, "dataset", None), "_fingerprint", None) for shard in shards[:1]]], shards


def _first(pairs: Dataset, limit: int | None) -> Dataset:
    return pairs if limit is None else pairs.select(range(min(limit, len(pairs))))


def _spread(pairs: Dataset, limit: int | None) -> Dataset:
    """So many pairs, evenly spread: the middles of equal stretches."""
    if limit is None or limit >= len(pairs):
        return pairs
    return pairs.select([(2 * number + 1) * len(pairs) // (2 * limit) for number in range(limit)])


def _with_own(pairs: Dataset, tiles: dict[str, Any] | None, frames: dict[str, Any] | None) -> Dataset:
    """With settings of the source, in records that have none of their own."""
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
    """List the bad records that were left out.

    Raises:
        ValueError: when they are too many.
    """
    if not converted.bad:
        return
    count, lines = len(converted.bad), converted.lines
    lines_of_list = [json.dumps({"where": bad.where, "reason": bad.reason}, ensure_ascii=True) for bad in converted.bad]
    _append(listed, lines_of_list)
    message = (
        f"{count:,} of {lines:,} records of {path} are bad and left out; {listed} says which and why. The first: {converted.bad[0]}"
    )
    if count > most * lines:
        raise ValueError(f"{message} That is more than max_bad_fraction={most:g} allows. Fix them, or raise it.")
    logger.warning(message)


def _report_unused(converted: Converted, path: str) -> None:
    """Say how many good lines give no pair, and how many pairs are more than a line may give."""
    if converted.empty:
        logger.warning(
            f"{converted.empty:,} of {converted.lines:,} records of {path} give no pair: no two of their answers differ in rating "
            "and text."
        )
    if converted.dropped:
        logger.warning(
            f"{converted.dropped:,} pairs of {path} are left out: a prompt gives the {MAX_PAIRS} with the largest margins."
        )


def _append(path: Path, lines: Sequence[str]) -> None:
    """Add lines to a file, those that it does not have yet: every rank and every epoch has the same ones to say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = set(path.read_text("utf-8").splitlines()) if path.is_file() else set()
    new = [line for line in lines if line not in known]
    if new:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in new))


class _Stream:
    """Generates the records of some shards of a source."""

    def __init__(self, reading: Reading, own: dict[str, Any], listed: Path, most: float) -> None:
        self._reading, self._own, self._listed, self._most = reading, own, listed, most
        self._read: dict[str, tuple[int, int]] = {}  # of each shard, its lines so far and the bad ones; datasets asks one by one

    def __call__(self, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        for shard in shards:
            name, lines, bad = repr(shard), 0, 0
            for found in self._reading.lines(shard):
                lines += 1
                if isinstance(found, BadRecord):
                    bad += 1
                    _append(self._listed, [json.dumps({"where": found.where, "reason": found.reason})])
                    self._read[name] = lines, bad
                    self._judge(found)
                    continue
                for row in found:
                    yield {**row, **{name: row[name] or given for name, given in self._own.items()}}
            self._read[name] = lines, bad

    def _judge(self, last: BadRecord) -> None:
        """Refuse too many bad records among all that this process has read of the stream, each counted once."""
        lines, bad = (sum(counts) for counts in zip(*self._read.values(), strict=True))
        if bad > self._most * max(lines, MIN_DENOMINATOR):
            raise ValueError(
                f"{bad:,} of the first {lines:,} records that were read of this stream are bad, which is more than "
                f"max_bad_fraction={self._most:g} allows; {self._listed} lists them. The last: {last}"
            )
