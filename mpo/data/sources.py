"""Load files of pairs as a `datasets.Dataset` of records, whose images are opened when they are read, or as a stream.

Lines are converted to a memory-mapped data set on disk once, with several processes; later calls open the result, in datasets'
cache, under a key of the files (path, size, modification time) and of how they are read. It is written to a temporary folder and
renamed when complete; ranks that start together wait for the first one. A bad line may have become good, for example when an image
was fixed: bad lines are read again before a cached result is used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, DatasetInfo, IterableDataset, concatenate_datasets
from datasets.fingerprint import Hasher
from filelock import FileLock
from tqdm.auto import tqdm

from mpo.data.files import files_of, is_pattern, open_files
from mpo.data.formats import MAX_PAIRS
from mpo.data.records import KINDS, Reading, Row
from mpo.data.shards import Shard
from mpo.io import MIN_DENOMINATOR, BadRecord, without_collection

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
    pairs, bad, counts = _convert(lambda: opened or open_files(path, split), reading, key, name=stem(path), num_proc=num_proc)
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

        Raises ValueError if too many of the records that this process has read are bad; each is counted once.
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


# Converting once


VERSION = 9
"""Increase it when the same files give different records, so that cached results of earlier versions are not used."""
BATCH_ROWS = 1000
BATCH_BYTES = 64 * 2**20
PARALLEL_FROM_BYTES = 32 * 2**20
"""Total size of the shards (bytes, or rows of a table times 1000) above which several processes are used."""
MAX_PROCESSES = 16
_DONE = "info.json"


def _convert(
    shards: Callable[[], Sequence[Shard]], reading: Reading, key: Any, *, name: str, num_proc: int | None
) -> tuple[Dataset | None, list[BadRecord], dict[str, int]]:
    """Convert the shards of a source, which are opened only if they have to be converted, or open the cached result.

    `key`: what else determines the result, as JSON. Returns the records; the bad ones that were skipped, in order; and how many
    ``lines`` there were, and good ones that give no pair (``empty``), and pairs beyond the limit of pairs per line (``dropped``).
    """
    digest = hashlib.blake2b(json.dumps([VERSION, asdict(reading), key]).encode(), digest_size=8).hexdigest()
    plain = re.sub(r"[^\w.-]", "_", name)[-80:]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "mpo_pairs" / f"{plain}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = time.time()
    with FileLock(f"{folder}.lock"):
        if not _is_current(folder, shards, reading, asked):
            # One name, under the lock: the next run removes what a killed one left.
            aside = folder.with_name(f"{folder.name}.incomplete")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                current = shards()
                _write(current, reading, aside, name, _processes(current, num_proc))
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return _open(folder, reading)


def _is_current(folder: Path, shards: Callable[[], Sequence[Shard]], reading: Reading, asked: float) -> bool:
    """Whether a conversion exists and its bad lines are still bad, now or when another rank checked them after `asked`."""
    done = folder / _DONE
    if not done.is_file():
        return False
    parts = json.loads(done.read_text())["parts"]
    if not any(part["bad"] for part in parts) or done.stat().st_mtime >= asked:
        return True
    found = shards()
    if len(found) != len(parts):
        return False
    for shard, part in zip(found, parts, strict=True):
        if not part["bad"]:
            continue
        before = dict(part["bad"])
        now = reading.rows(((where, line) for where, line in shard.lines() if where in before))
        if any(not isinstance(rows, BadRecord) or before.get(rows.where) != rows.reason for rows in now):
            return False
    os.utime(done)
    return True


def _processes(shards: Sequence[Shard], asked: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(shard.size for shard in shards)
    count = asked or (min(cores, MAX_PROCESSES) if size >= PARALLEL_FROM_BYTES else 1)
    return max(1, min(count, len(shards)))


def _write(shards: Sequence[Shard], reading: Reading, folder: Path, name: str, processes: int) -> None:
    stems = [str(folder / f"{number:05d}") for number in range(len(shards))]
    total = sum(shard.size for shard in shards)
    parts: list[dict[str, Any]] = []
    pool = ProcessPoolExecutor(processes) if processes > 1 else None
    try:
        with tqdm(total=total, desc=f"Reading {name}", unit="", unit_scale=True, disable=total < PARALLEL_FROM_BYTES // 8) as bar:
            for shard, part in zip(shards, (pool.map if pool else map)(_write_shard, shards, repeat(reading), stems), strict=False):
                parts.append(part)
                bar.update(shard.size)
    except BrokenProcessPool:
        found = "A process that read the data was killed, perhaps because memory ran out"
        raise RuntimeError(f"{found}. Set data.num_proc=1.") from None
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    columns = sorted({column for part in parts for column in part.pop("columns")})
    (folder / _DONE).write_text(json.dumps({"parts": parts, "columns": columns}))


def _write_shard(shard: Shard, reading: Reading, stem: str) -> dict[str, Any]:
    """Write a shard's records to ``stem.arrow``; return its entry for ``info.json``, with its bad records."""
    counts = dict.fromkeys(("lines", "pairs", "empty", "dropped"), 0)
    bad: list[tuple[str, str]] = []
    columns: set[str] = set()
    rows: list[Row] = []
    size = 0
    kind = KINDS[reading.kind]
    schema = kind.features.arrow_schema
    with without_collection(), pa.OSFile(f"{stem}.arrow", "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:

        def write_batch() -> None:
            batch = pa.RecordBatch.from_pylist(rows, schema=schema)
            writer.write_batch(batch)
            columns.update(name for name in kind.optional if batch.column(name).null_count < len(rows))

        for found in reading.rows(shard.lines()):
            counts["lines"] += 1
            if isinstance(found, BadRecord):
                bad.append((found.where, found.reason))
                continue
            counts["pairs"] += len(found)
            counts["empty"] += not found
            counts["dropped"] += found.dropped
            rows += found
            size += sum(len(image["bytes"] or b"") for row in found for image in row["images"])
            if len(rows) >= BATCH_ROWS or size >= BATCH_BYTES:
                write_batch()
                rows, size = [], 0
        if rows:
            write_batch()
    return {"file": f"{Path(stem).name}.arrow", **counts, "bad": bad, "columns": sorted(columns)}


def _open(folder: Path, reading: Reading) -> tuple[Dataset | None, list[BadRecord], dict[str, int]]:
    info = json.loads((folder / _DONE).read_text())
    parts, kind = info["parts"], KINDS[reading.kind]
    as_read = DatasetInfo(features=kind.features)
    bad = [BadRecord(*one) for part in parts for one in part["bad"]]
    counts = {name: sum(part[name] for part in parts) for name in ("lines", "empty", "dropped")}
    found = [Dataset.from_file(str(folder / part["file"]), info=as_read) for part in parts if part["pairs"]]
    if not found:
        return None, bad, counts
    pairs = found[0] if len(found) == 1 else concatenate_datasets(found)
    return pairs.remove_columns([name for name in kind.optional if name not in info["columns"]]), bad, counts
