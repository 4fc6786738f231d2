"""Convert lines to a memory-mapped `datasets.Dataset` on disk, once, with several processes; later calls open the result.

The result is in datasets' cache, under a key of the files (path, size, modification time) and of how they are read. It is written
to a temporary folder and renamed when complete; ranks that start together wait for the first one. A bad line may have become good,
for example when an image was fixed: bad lines are read again before a cached result is used.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, DatasetInfo, concatenate_datasets
from filelock import FileLock
from tqdm.auto import tqdm

from mpo.data.paths import Folders
from mpo.data.records import FEATURES, OPTIONAL, Row, Rows, rows_from
from mpo.data.shards import Shard
from mpo.io import BadRecord

VERSION = 6
"""Increase it when the same files give different records, so that cached results of earlier versions are not used."""
BATCH_ROWS = 1000
BATCH_BYTES = 64 * 2**20
PARALLEL_FROM_BYTES = 32 * 2**20
"""Total size of the shards (bytes, or rows of a table times 1000) above which several processes are used."""
MAX_PROCESSES = 16
_DONE = "info.json"


@dataclass(frozen=True)
class Reading:
    """How lines are read: see `mpo.data.load_preferences`."""

    image_root: str
    format: str | None = None
    source: str | None = None
    skip: bool = False

    def lines(self, shard: Shard) -> Iterator[Rows | BadRecord]:
        """Yield the records of each line of a shard, or the reason why the line has none.

        Raises:
            BadRecord: for a line that has none, unless bad lines are skipped.
        """
        for rows in rows_from(shard.lines(), Folders(self.image_root), self.format, self.source):
            if isinstance(rows, BadRecord) and not self.skip:
                raise rows
            yield rows


@dataclass(frozen=True)
class Converted:
    """A converted source: its pairs, the skipped bad records in order, and the number of lines.

    ``empty`` counts the good lines that give no pair, ``dropped`` the pairs beyond the limit of pairs per line.
    """

    pairs: Dataset | None
    bad: list[BadRecord]
    lines: int
    empty: int
    dropped: int


def convert(shards: Callable[[], Sequence[Shard]], reading: Reading, key: Any, *, name: str, num_proc: int | None) -> Converted:
    """Convert the shards of a source, or open the cached result.

    Args:
        shards: returns the shards, in order; called only when they have to be converted.
        reading: how to read them.
        key: what else determines the result, as JSON: the files and their modification times.
        name: name of the source in the progress bar and in the cache.
        num_proc: number of processes; None: one per core for a large source, else one.

    Raises:
        BadRecord: for the first bad record, unless bad records are skipped.
        ValueError: for damaged files.
    """
    digest = hashlib.blake2b(json.dumps([VERSION, asdict(reading), key]).encode(), digest_size=8).hexdigest()
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "mpo_pairs" / f"{_plain(name)}-{digest}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = time.time()
    with FileLock(f"{folder}.lock"):
        if not _is_current(folder, shards, reading, asked):
            # One name, under the lock: the next run removes what a killed one left.
            aside = folder.with_name(
                f"{folder.name}.incomplete"
            )  # one name, under the lock: the next run removes what a killed one left
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            try:
                current = shards()
                _write(current, reading, aside, name, _processes(current, num_proc))
                shutil.rmtree(folder, ignore_errors=True)
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return _open(folder)


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
        before = {bad.where: bad.reason for bad in _bad_of(folder, part)}
        lines = ((where, line) for where, line in shard.lines() if where in before)
        now = rows_from(lines, Folders(reading.image_root), reading.format, reading.source)
        if any(not isinstance(rows, BadRecord) or before.get(rows.where) != rows.reason for rows in now):
            return False
    os.utime(done)
    return True


def _bad_of(folder: Path, part: dict[str, Any]) -> list[BadRecord]:
    with (folder / part["file"]).with_suffix(".bad").open(encoding="utf-8") as listed:
        return [BadRecord(**json.loads(line)) for line in listed]


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)[-80:]


def _processes(shards: Sequence[Shard], asked: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = sum(shard.size for shard in shards)
    count = asked or (min(cores, MAX_PROCESSES) if size >= PARALLEL_FROM_BYTES else 1)
    return max(1, min(count, len(shards)))


def _write(shards: Sequence[Shard], reading: Reading, folder: Path, name: str, processes: int) -> None:
    parts: dict[int, dict[str, Any]] = {}
    total = sum(shard.size for shard in shards)
    with tqdm(total=total, desc=f"Reading {name}", unit="", unit_scale=True, disable=total < PARALLEL_FROM_BYTES // 8) as bar:
        if processes == 1:
            for number, shard in enumerate(shards):
                parts[number] = _write_shard(shard, reading, str(folder / f"{number:05d}"))
                bar.update(shard.size)
        else:
            _in_processes(shards, reading, folder, processes, parts, bar)
    info = {
        "parts": [{"file": f"{number:05d}.arrow", **parts[number]} for number in range(len(shards))],
        "columns": sorted({column for part in parts.values() for column in part.pop("columns")}),
    }
    (folder / _DONE).write_text(json.dumps(info))


def _in_processes(
    shards: Sequence[Shard], reading: Reading, folder: Path, processes: int, parts: dict[int, dict[str, Any]], bar: Any
) -> None:
    waiting = iter(enumerate(shards))
    running: dict[Future[dict[str, Any]], int] = {}
    pool = ProcessPoolExecutor(processes)
    try:
        while True:
            for number, shard in waiting:
                running[pool.submit(_write_shard, shard, reading, str(folder / f"{number:05d}"))] = number
                if len(running) >= 2 * processes:
                    break
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=running.__getitem__):
                number = running.pop(future)
                parts[number] = future.result()
                bar.update(shards[number].size)
    except BrokenProcessPool:
        raise RuntimeError(
            "A process that read the data was killed, perhaps because memory ran out. Set data.num_proc=1."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_shard(shard: Shard, reading: Reading, stem: str) -> dict[str, Any]:
    """Write a shard's records to ``stem.arrow`` and its bad records to ``stem.bad``; return its entry for ``info.json``."""
    lines, pairs, bad, empty, dropped = 0, 0, 0, 0, 0
    columns: set[str] = set()
    with (
        _no_garbage_collection(),
        pa.OSFile(f"{stem}.arrow", "wb") as sink,
        pa.ipc.new_stream(sink, FEATURES.arrow_schema) as writer,
        open(f"{stem}.bad", "w", encoding="utf-8") as list_of_bad,
    ):
        rows: list[Row] = []
        size = 0
        for found in reading.lines(shard):
            lines += 1
            if isinstance(found, BadRecord):
                bad += 1
                list_of_bad.write(json.dumps({"where": found.where, "reason": found.reason}) + "\n")
                continue
            empty += not found
            dropped += found.dropped
            rows += found
            size += sum(len(image["bytes"] or b"") for row in found for image in row["images"])
            if len(rows) >= BATCH_ROWS or size >= BATCH_BYTES:
                pairs += len(rows)
                _write_batch(writer, rows, columns)
                rows, size = [], 0
        pairs += len(rows)
        if rows:
            _write_batch(writer, rows, columns)
    return {"lines": lines, "pairs": pairs, "bad": bad, "empty": empty, "dropped": dropped, "columns": sorted(columns)}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Turn off garbage collection: records have no reference cycles, and searching for them takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _write_batch(writer: Any, rows: list[Row], columns: set[str]) -> None:
    batch = pa.RecordBatch.from_pylist(rows, schema=FEATURES.arrow_schema)
    writer.write_batch(batch)
    columns.update(name for name in OPTIONAL if batch.column(name).null_count < len(rows))


def _open(folder: Path) -> Converted:
    info = json.loads((folder / _DONE).read_text())
    bad = []
    for part in info["parts"]:
        if part["bad"]:
            bad += _bad_of(folder, part)
    files = [str(folder / part["file"]) for part in info["parts"] if part["pairs"]]
    lines, empty, dropped = (sum(part[count] for part in info["parts"]) for count in ("lines", "empty", "dropped"))
    if not files:
        return Converted(None, bad, lines, empty, dropped)
    parts = [Dataset.from_file(file, info=DatasetInfo(features=FEATURES)) for file in files]
    pairs = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    return Converted(pairs.remove_columns([name for name in OPTIONAL if name not in info["columns"]]), bad, lines, empty, dropped)
