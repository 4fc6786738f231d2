"""Filter files of conversations or preferences: lines that the steps of `mpo.curation.judge` keep are copied as they are."""

from __future__ import annotations

import gzip
import json
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import compress, groupby
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mpo.data.files import open_files
from mpo.data.formats import check_format
from mpo.data.records import to_records
from mpo.data.shards import ArrayShard, LinesShard, ParquetShard, Shard, opened
from mpo.data.sources import folder_of, stem
from mpo.io import BadRecord, atomic_write, bad_record, write_text
from mpo.pipelines.job import Job
from mpo.pipelines.ledger import json_bytes
from mpo.pipelines.part import DROPPED, OUTPUT
from mpo.pipelines.step import Record, Step

JOB, KEPT, REPORT = "job", "kept", "report.json"
PAIRS = ("chosen", "rejected", "rejected_response", "rejected_messages", "completions", "text")
"""Fields that tell a preference record from a conversation."""


class Source:
    """The records of a path: the conversation of each line, or its pairs. Images are not opened, nor looked for.

    Args:
        path: JSONL, a JSON array, Parquet, several of them by a pattern, or a folder of such files.
        format: format of preference records; None to detect it.
        metadata: as in `mpo.data.load_preferences`.
        keep_bad: give a line that is no record as one with the reason (``bad``), instead of raising.

    Raises:
        ValueError: for other kinds of sources. While iterating: BadRecord for a line that is no record.
    """

    def __init__(
        self, path: str | Path, *, format: str | None = None, metadata: Sequence[str] = (), keep_bad: bool = False
    ) -> None:
        check_format(format)
        self.path, self.format, self.metadata, self.keep_bad = os.path.expanduser(path), format, metadata, keep_bad
        self.root = folder_of(self.path)
        for shard in self.shards():
            if not isinstance(shard, LinesShard | ArrayShard | ParquetShard):
                raise ValueError(f"{path} is neither JSONL, nor a JSON array, nor Parquet. Convert it first (mpo data convert).")

    def shards(self) -> list[Shard]:
        """The shards of the files."""
        return open_files(self.path)

    def lines(self, shards: Iterable[Shard]) -> Iterator[tuple[str, Mapping[str, Any] | BadRecord]]:
        """The lines of a file with their places: its name, and the number of the line, row or element of the array."""
        number = 0
        for shard in shards:
            for where, line in shard.lines():
                name, _, at = where.rpartition(":")
                number = number + 1 if isinstance(shard, ArrayShard) else int(at)
                yield f"{os.path.relpath(name, self.root)}:{number}", line

    def __iter__(self) -> Iterator[Record]:
        for path, shards in groupby(self.shards(), lambda shard: shard.path):
            for where, line in self.lines(shards):
                try:
                    if isinstance(line, BadRecord):
                        raise BadRecord(where, line.reason, line.kind)
                    found = self._read(line, where)
                except BadRecord as error:
                    if not self.keep_bad:
                        raise
                    found = [{"bad": error.reason}]
                for number, one in enumerate(found, start=1):
                    own = {"id": where if number == 1 else f"{where}#{number}", "line": where}
                    yield {**own, **one, "source": one.get("source") or stem(path)}

    def _read(self, line: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
        if any(name in line for name in PAIRS):
            rows = to_records(line, where=where, find=lambda path, kind: path, format=self.format, metadata=self.metadata)
            names = ("source", "prompt", "chosen", "rejected")
        else:
            with bad_record(where):
                rows, names = [_conversation(line)], ("source", "messages")
        return [{**{name: row.get(name) for name in names}, "images": len(row["images"]) + len(row["videos"] or ())} for row in rows]


def filter_records(
    source: Source,
    steps: Sequence[Step],
    folder: str | Path,
    *,
    on_unscored: str = "keep",
    drop_bad: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Filter files, or go on with it: the job of the steps in ``folder/job``, then the files that follow from it.

    ``kept`` has the files of the source with the lines that are kept (JSONL: the same bytes), ``dropped.jsonl`` the other lines with
    all reasons: rule, value, threshold, text, and where in it (``start``, ``end``, in characters). A line with several pairs is dropped
    with any of them.

    Args:
        source: the files.
        steps: the steps, `mpo.curation.judge.Form` first.
        folder: the folder, new or of the same job.
        on_unscored: ``keep`` or ``drop`` records whose request failed for good, as `Judge` does without a score.
        drop_bad: drop lines that are no records (`Source` with ``keep_bad``).
        settings: of `Job.run`.

    Returns:
        the report: numbers of lines by outcome, by rule (the first reason of each line) and by source, and what was spent.

    Raises:
        ValueError: as `Source` and `Job.run`.
    """
    folder = Path(folder)
    job = Job(steps, source, folder / JOB, drop_bad=drop_bad).run(**settings)
    dropped: dict[str, list[dict[str, Any]]] = {}
    sources: dict[str, str] = {}
    unscored: set[str] = set()
    for name in (OUTPUT, DROPPED):
        for one in _lines(folder / JOB / name):
            record = one.get("record", one)
            sources[record["line"]] = record["source"]
            if "reasons" in one:
                dropped.setdefault(record["line"], []).extend(one["reasons"])
            elif name == DROPPED or None in [score for scores in one.get("scores", {}).values() for score in scores.values()]:
                unscored.add(record["line"])
                if name == DROPPED and on_unscored == "drop":
                    failed = [{"rule": one["step"], "value": None, "failed": one["reason"]}]
                    dropped.setdefault(record["line"], []).extend(failed)
    by_source: dict[str, Counter[str]] = {}
    rules: Counter[str] = Counter()
    for line, name in sources.items():
        counts = by_source.setdefault(name, Counter(dict.fromkeys(("records", "kept", "dropped", "unscored"), 0)))
        counts.update(["records", "dropped" if line in dropped else "kept", *(["unscored"] if line in unscored - dropped.keys() else [])])
        if line in dropped:
            counts[f"dropped: {dropped[line][0]['rule']}"] += 1
    with atomic_write(folder / "dropped.jsonl", "wb") as file:
        kept = sum(
            _split(path, [*shards], source, folder, dropped, sources, file)
            for path, shards in groupby(source.shards(), lambda shard: shard.path)
        )
    total = sum(by_source.values(), Counter())
    if not kept == total["kept"] == total["records"] - len(dropped):
        raise RuntimeError(f"{kept} lines were kept of {total['records']}, of which {len(dropped)} are dropped. Did the files change?")
    report = {**total, "by_source": by_source, "steps": job["steps"]}
    write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return {**report, "spent": job["spent"]}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        yield from map(json.loads, file)


def _split(
    path: str,
    shards: Sequence[Shard],
    source: Source,
    folder: Path,
    dropped: Mapping[str, Any],
    sources: Mapping[str, str],
    others: IO[bytes],
) -> int:
    """Copy the lines of a file that are kept, and add the others to those that are dropped. Returns how many are kept."""
    name = os.path.relpath(path, source.root)
    places: list[str] = []
    kept: list[dict[str, Any]] = []  # of an array, which is in memory anyway
    for where, line in source.lines(shards):
        places.append(where)
        if where in dropped:
            shown = line.reason if isinstance(line, BadRecord) else line
            one = {"where": where, "source": sources[where], "reasons": dropped[where], "record": shown}
            others.write(json_bytes(one, lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else str(value)) + b"\n")
        elif isinstance(shards[0], ArrayShard):
            kept.append(line)
    keep = [where not in dropped for where in places]
    with atomic_write(folder / KEPT / name, "wb") as file:
        if isinstance(shards[0], ParquetShard):
            with pq.ParquetFile(path) as table, pq.ParquetWriter(file, table.schema_arrow) as writer:
                start = 0
                for group in range(table.num_row_groups):
                    rows = table.read_row_group(group)
                    writer.write_table(rows.filter(keep[start : (start := start + len(rows))]))
        elif isinstance(shards[0], ArrayShard):
            file.write(b"[\n" + b",\n".join(map(json_bytes, kept)) + b"\n]\n")
        else:
            with opened(path) as given, gzip.GzipFile("", "wb", fileobj=file, mtime=0) if path.endswith(".gz") else nullcontext(file) as to:
                lines = (line for line in given if line.strip() not in (b"", BOM_UTF8))
                to.writelines(compress(lines, keep))
    return sum(keep)


def _conversation(line: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": line["messages"], "images": line.get("images", ()), "videos": ()}
