"""Load files of pairs as a `datasets.Dataset` of records, whose images are opened when they are read, or as a stream."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from mpo.data.converted import Converted, Reading, convert
from mpo.data.files import files_of, open_files
from mpo.data.formats import MAX_PAIRS
from mpo.data.records import FEATURES, FRAMES, TILES
from mpo.data.shards import Shard
from mpo.io import BAD_RECORDS, MIN_DENOMINATOR, BadRecord

logger = logging.getLogger(__name__)
STREAM_SHARDS = 64
"""Minimum number of shards of a streamed JSONL file, for the workers and ranks that share it."""


def load_source(
    path: str,
    *,
    own: Mapping[str, dict[str, Any] | None],
    format: str | None,
    image_root: str | Path | None,
    split: str,
    limit: int | None,
    name: str | None,
    on_bad_record: str,
    max_bad_fraction: float,
    bad_records: str | Path | None,
    streaming: bool,
    num_proc: int | None,
) -> Any:
    """Load the pairs of one source, whose settings are checked; see `mpo.data.load_preferences`.

    Args:
        own: ``tiles`` and ``frames`` of records that have none of their own.
        name: name of the source in the records.
    """
    root = os.path.expanduser(image_root) if image_root else folder_of(path)
    reading = Reading(os.path.realpath(root), format, name or _stem(path), skip=on_bad_record == "skip")
    bad_file = Path(bad_records) if bad_records else Path(BAD_RECORDS)
    if streaming:
        stream = _Stream(reading, dict(own), bad_file, max_bad_fraction)
        shards = open_files(path, split, min_shards=STREAM_SHARDS)
        records = IterableDataset.from_generator(stream, features=FEATURES, gen_kwargs={"shards": shards})
        return records if limit is None else records.take(limit)
    key, opened = _key(path, split)
    converted = convert(lambda: opened or open_files(path, split), reading, key, name=_stem(path), num_proc=num_proc)
    _report(converted, path, bad_file, max_bad_fraction)
    _report_unused(converted, path)
    if converted.pairs is None:
        raise ValueError(f"{path} has no pairs. Set data.path to a file of preference pairs.")
    return with_settings(_first(converted.pairs, limit), own["tiles"], own["frames"])


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


def spread(pairs: Dataset, limit: int | None) -> Dataset:
    """Select `limit` pairs, evenly spread: the middles of equal intervals."""
    if limit is None or limit >= len(pairs):
        return pairs
    return pairs.select([(2 * number + 1) * len(pairs) // (2 * limit) for number in range(limit)])


def with_settings(pairs: Dataset, tiles: dict[str, Any] | None, frames: dict[str, Any] | None) -> Dataset:
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
