"""Convert lines to a memory-mapped `datasets.Dataset` on disk, once, with several processes; later calls open the result.

The result is in datasets' cache, under a key of the files (path, size, modification time) and of how they are read. It is written
to a temporary folder and renamed when complete; ranks that start together wait for the first one. A bad line may have become good,
for example when an image was fixed: bad lines are read again before a cached result is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, DatasetInfo, concatenate_datasets
from filelock import FileLock
from tqdm.auto import tqdm

from mpo.data.records import KINDS, Reading, Row
from mpo.data.shards import Shard
from mpo.io import BadRecord, read_json_lines, without_collection

VERSION = 7
"""Increase it when the same files give different records, so that cached results of earlier versions are not used."""
BATCH_ROWS = 1000
BATCH_BYTES = 64 * 2**20
PARALLEL_FROM_BYTES = 32 * 2**20
"""Total size of the shards (bytes, or rows of a table times 1000) above which several processes are used."""
MAX_PROCESSES = 16
_DONE = "info.json"


@dataclass(frozen=True)
class Converted:
    """A converted source."""

    pairs: Dataset | None
    bad: list[BadRecord]  # those that were skipped, in order
    lines: int
    empty: int  # good lines that give no pair
    dropped: int  # pairs beyond the limit of pairs per line


def convert(shards: Callable[[], Sequence[Shard]], reading: Reading, key: Any, *, name: str, num_proc: int | None) -> Converted:
    """Convert the shards of a source, which are opened only if they have to be converted, or open the cached result.

    Args:
        key: what else determines the result, as JSON: the files and their modification times.
        name: name of the source in the progress bar and in the cache.
        num_proc: number of processes; None: one per core for a large source, else one.

    Raises:
        BadRecord: for the first bad record, unless bad records are skipped; ValueError for damaged files.
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
        before = {bad.where: bad.reason for bad in _bad_of(folder, part)}
        lines = ((where, line) for where, line in shard.lines() if where in before)
        now = reading.rows(lines)
        if any(not isinstance(rows, BadRecord) or before.get(rows.where) != rows.reason for rows in now):
            return False
    os.utime(done)
    return True


def _bad_of(folder: Path, part: dict[str, Any]) -> list[BadRecord]:
    return [BadRecord(**bad) for bad in read_json_lines((folder / part["file"]).with_suffix(".bad"))]


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
    """Write a shard's records to ``stem.arrow`` and its bad records to ``stem.bad``; return its entry for ``info.json``."""
    counts = dict.fromkeys(("lines", "pairs", "bad", "empty", "dropped"), 0)
    columns: set[str] = set()
    rows: list[Row] = []
    size = 0
    kind = KINDS[reading.kind]
    schema = kind.features.arrow_schema
    with (
        without_collection(),
        pa.OSFile(f"{stem}.arrow", "wb") as sink,
        pa.ipc.new_stream(sink, schema) as writer,
        open(f"{stem}.bad", "w", encoding="utf-8") as list_of_bad,
    ):

        def write_batch() -> None:
            batch = pa.RecordBatch.from_pylist(rows, schema=schema)
            writer.write_batch(batch)
            columns.update(name for name in kind.optional if batch.column(name).null_count < len(rows))

        for found in reading.rows(shard.lines()):
            counts["lines"] += 1
            if isinstance(found, BadRecord):
                counts["bad"] += 1
                list_of_bad.write(json.dumps({"where": found.where, "reason": found.reason}) + "\n")
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
    return {"file": f"{Path(stem).name}.arrow", **counts, "columns": sorted(columns)}


def _open(folder: Path, reading: Reading) -> Converted:
    info = json.loads((folder / _DONE).read_text())
    parts, kind = info["parts"], KINDS[reading.kind]
    as_read = DatasetInfo(features=kind.features)
    bad = [one for part in parts if part["bad"] for one in _bad_of(folder, part)]
    lines, empty, dropped = (sum(part[count] for part in parts) for count in ("lines", "empty", "dropped"))
    found = [Dataset.from_file(str(folder / part["file"]), info=as_read) for part in parts if part["pairs"]]
    if not found:
        return Converted(None, bad, lines, empty, dropped)
    pairs = found[0] if len(found) == 1 else concatenate_datasets(found)
    unused = [name for name in kind.optional if name not in info["columns"]]
    return Converted(pairs.remove_columns(unused), bad, lines, empty, dropped)
