"""Load files of pairs as a `datasets.Dataset` of records, whose images are opened when they are read, or as a stream."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

from mpo.data.converted import convert
from mpo.data.files import files_of, is_pattern, open_files
from mpo.data.formats import MAX_PAIRS
from mpo.data.records import KINDS, Reading
from mpo.data.shards import Shard
from mpo.io import MIN_DENOMINATOR, BadRecord

logger = logging.getLogger(__name__)
STREAM_SHARDS = 64
"""Minimum number of shards of a streamed JSONL file, for the workers and ranks that share it."""


@dataclass(frozen=True)
class BadList:
    """The file that lists bad records, and the maximum fraction of them."""

    path: Path
    most: float

    def add(self, records: Sequence[BadRecord]) -> None:
        """Append records that the file does not list yet: every rank and every epoch reports the same ones."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = set(self.path.read_text("utf-8").splitlines()) if self.path.is_file() else set()
        lines = [json.dumps({"where": bad.where, "reason": bad.reason}) for bad in records]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines if line not in known))


def load_source(
    path: str, split: str, reading: Reading, listed: BadList, own: Mapping[str, Any], limit: int | None, num_proc: int | None
) -> Dataset:
    """Load the pairs of one source, whose settings are checked; ``own`` are its tiles and frames (`mpo.data.load_preferences`)."""
    key, opened = _key(path, split)
    pairs, bad, counts = convert(lambda: opened or open_files(path, split), reading, key, name=stem(path), num_proc=num_proc)
    lines = counts["lines"]
    if bad:
        listed.add(bad)
        message = f"{len(bad):,} of {lines:,} records of {path} are bad and left out; {listed.path} lists them. The first: {bad[0]}"
        if len(bad) > listed.most * lines:
            raise ValueError(f"{message} That is more than max_bad_fraction={listed.most:g} allows. Fix them, or increase it.")
        logger.warning(message)
    if counts["empty"]:
        found = f"{counts['empty']:,} of {lines:,} records of {path} give no pair"
        logger.warning(f"{found}: no two of their completions differ in rating and text.")
    if counts["dropped"]:
        found = f"{counts['dropped']:,} pairs of {path} are left out"
        logger.warning(f"{found}: only the {MAX_PAIRS} with the largest margins per prompt are used.")
    if pairs is None:
        noun = KINDS[reading.kind].noun
        raise ValueError(f"{path} has no {noun}s. Give a file of {noun}s.")
    return with_settings(pairs if limit is None else pairs.select(range(min(limit, len(pairs)))), own)


def folder_of(path: str) -> str:
    """Return the folder of a file or folder; of a pattern, the part without wildcards; of a name on the Hub, the current folder."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    while is_pattern(folder) and not os.path.exists(path):
        folder = os.path.dirname(folder)
    return folder or "."


def stem(path: str) -> str:
    """Return the name of a file or folder up to its first dot, which names a source."""
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


def spread(pairs: Dataset, limit: int | None) -> Dataset:
    """Select `limit` pairs, evenly spread: the middles of equal intervals."""
    if limit is None or limit >= len(pairs):
        return pairs
    return pairs.select([(2 * number + 1) * len(pairs) // (2 * limit) for number in range(limit)])


def with_settings(pairs: Dataset, own: Mapping[str, Any]) -> Dataset:
    """Add the settings of a source, ``tiles``, ``frames`` and ``augment``, to records that have none of their own."""
    features = KINDS["pair"].features
    for name, value in own.items():
        if value is None or (name == "frames" and "videos" not in pairs.column_names):
            continue
        column = [value] * len(pairs)
        fingerprint = Hasher.hash([pairs._fingerprint, name, value])
        if name in pairs.column_names:
            column = [value if one is None else one for one in pairs.select_columns([name])[:][name]]
            pairs = pairs.remove_columns([name])
        pairs = pairs.add_column(name, column, feature=features[name], new_fingerprint=fingerprint)
    return pairs


def with_own(record: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Add the settings of a source to one record that has none of its own."""
    return {**record, **{name: value for name, value in own.items() if record.get(name) is None}}


class Stream:
    """Generates the records of several shards of a source; arguments as in `load_source`."""

    def __init__(self, reading: Reading, listed: BadList, own: Mapping[str, Any]) -> None:
        self._reading, self._listed, self._own = reading, listed, own
        self._read: dict[str, tuple[int, int]] = {}  # lines and bad lines of each shard so far; datasets passes shards singly

    def open(self, path: str, split: str) -> IterableDataset:
        """Open a source as a stream of records."""
        shards = open_files(path, split, min_shards=STREAM_SHARDS)
        return IterableDataset.from_generator(self, features=KINDS[self._reading.kind].features, gen_kwargs={"shards": shards})

    def __call__(self, shards: Sequence[Shard]) -> Iterator[dict[str, Any]]:
        """Yield the records of shards.

        Raises:
            ValueError: if too many of the records that this process has read are bad; each is counted once.
        """
        for shard in shards:
            name, lines, bad = repr(shard), 0, 0
            for found in self._reading.rows(shard.lines()):
                lines += 1
                if isinstance(found, BadRecord):
                    bad += 1
                    self._listed.add([found])
                    self._read[name] = lines, bad
                    self._check_fraction(found)
                    continue
                for row in found:
                    yield with_own(row, self._own)
            self._read[name] = lines, bad

    def _check_fraction(self, last: BadRecord) -> None:
        lines, bad = (sum(counts) for counts in zip(*self._read.values(), strict=True))
        if bad > self._listed.most * max(lines, MIN_DENOMINATOR):
            found = f"{bad:,} of the first {lines:,} records of this stream are bad"
            allowed = f"which is more than max_bad_fraction={self._listed.most:g} allows"
            raise ValueError(f"{found}, {allowed}; {self._listed.path} lists them. Fix them, or increase it. The last: {last}")
