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
from mpo.data.records import kind_of, to_records
from mpo.data.shards import ArrayShard, LinesShard, ParquetShard, Shard, opened
from mpo.data.sources import folder_of, stem
from mpo.io import BadRecord, atomic_write, bad_record, write_text
from mpo.pipelines.job import Job
from mpo.pipelines.ledger import json_bytes
from mpo.pipelines.part import DROPPED, OUTPUT
from mpo.pipelines.step import Record, Step

JOB, KEPT, REPORT = "job", "kept", "report.json"
NAMES = ".kept"
"""Lists the files in KEPT that this has written, one a line."""


class Source:
    """The records of a path: the conversation of each line, or its pairs. Images are not opened, nor looked for.

    Args:
        path: JSONL, a JSON array, Parquet, several of them by a pattern, or a folder of such files.
        metadata: as in `mpo.data.load_preferences`.
        keep_bad: give a line that is no record as one with the reason (``bad``), instead of raising.

    Raises:
        ValueError: for other kinds of files. While iterating: BadRecord for a line that is no record.
    """

    def __init__(self, path: str | Path, *, metadata: Sequence[str] = (), keep_bad: bool = False) -> None:
        self.path, self.metadata, self.keep_bad = os.path.abspath(os.path.expanduser(path)), metadata, keep_bad
        self.root = folder_of(self.path)
        if not all(isinstance(shard, LinesShard | ArrayShard | ParquetShard) for shard in open_files(self.path)):
            raise ValueError(f"{path} is neither JSONL, nor a JSON array, nor Parquet. Convert it first (mpo data convert).")

    def files(self) -> Iterator[tuple[str, list[Shard]]]:
        """The files, with their shards."""
        return ((path, [*shards]) for path, shards in groupby(open_files(self.path), lambda shard: shard.path))

    def lines(self, shards: Iterable[Shard]) -> Iterator[tuple[str, Any]]:
        """The lines of a file (BadRecord for a bad one) with their places: its name, with line or row, or element (#)."""
        number = 0
        for shard in shards:
            for where, line in shard.lines():
                name, _, at = where.rpartition(":")
                number += 1
                place = f"#{number}" if isinstance(shard, ArrayShard) else f":{at}"
                yield os.path.relpath(name, self.root) + place, line

    def __iter__(self) -> Iterator[Record]:
        for path, shards in self.files():
            for where, line in self.lines(shards):
                try:
                    with bad_record(os.path.join(self.root, where)):
                        if isinstance(line, BadRecord):
                            raise BadRecord("", line.reason, line.kind)
                        found = self._read(line)
                except BadRecord as error:
                    if not self.keep_bad:
                        raise
                    found = [{"bad": error.reason}]
                for number, one in enumerate(found or [{"messages": []}], start=1):  # a line may give no pair
                    own = {"id": where if number == 1 else f"{where}#{number}", "line": where}
                    yield {**own, **one, "source": one.get("source") or stem(path)}

    def _read(self, line: Mapping[str, Any]) -> list[dict[str, Any]]:
        kind = kind_of(line)
        names = ("prompt", "chosen", "rejected") if kind == "pair" else ("messages",)
        rows = to_records(line, where="", find=lambda path, kind: path, metadata=self.metadata, kind=kind)
        seen = ("source", *names)
        return [{**{name: row[name] for name in seen}, "images": len(row["images"]) + len(row["videos"] or ())} for row in rows]


def filter_records(
    source: Source, steps: Sequence[Step], folder: str | Path, *, on_unscored: str = "keep", drop_bad: bool = False, **settings: Any
) -> dict[str, Any]:
    """Filter files, or go on with it: the job of the steps in ``folder/job``, then the files that follow from it.

    ``kept`` has the files with the lines that are kept (JSONL: the same bytes), ``dropped.jsonl`` all others with their reasons:
    rule, value, threshold, text, and from which character to which (``start``, ``end``). A line is dropped with any of its pairs.

    Args:
        steps: the steps, `mpo.curation.judge.Form` first.
        folder: the folder, new or of the same job.
        on_unscored: ``keep`` or ``drop`` records whose request failed for good.
        drop_bad: as in `Job`; for a source with ``keep_bad``.
        settings: of `Job.run`.

    Returns:
        the report: numbers of lines, also by source and by rule (of a line's first reason), and what was spent.

    Raises:
        ValueError: as `Source` and `Job.run`, and for a folder among the files.
    """
    folder = Path(folder)
    to, root = os.path.realpath(folder), os.path.realpath(source.root)
    inside = [root == to, *(Path(root).is_relative_to(Path(to, name)) for name in (JOB, KEPT))]
    if any(inside) or ("**" in source.path and Path(to).is_relative_to(root)):
        raise ValueError(f"{folder} is written to, and {source.path} would be read from it. Give another folder for the output.")
    job = Job(steps, source, folder / JOB, drop_bad=drop_bad).run(**settings)
    sources, dropped, unscored = _outcomes(folder / JOB, on_unscored)
    by_source: dict[str, Counter[str]] = {}
    for line, name in sources.items():
        outcome = ("dropped", f"dropped: {dropped[line][0]['rule']}") if line in dropped else ("kept",)
        counts = by_source.setdefault(name, Counter(records=0, kept=0, dropped=0, unscored=0))
        counts.update(["records", *outcome, *["unscored"] * (line in unscored and line not in dropped)])
    (folder / REPORT).unlink(missing_ok=True)  # of other lines, and after a kill of none
    listed = folder / NAMES
    before = {*listed.read_text().splitlines()} if listed.is_file() else set[str]()
    names = {os.path.relpath(path, source.root) for path, _ in source.files()}
    write_text(listed, "\n".join(sorted(before | names)))
    with atomic_write(folder / DROPPED, "wb") as file:
        kept = sum(_split(path, shards, source, folder / KEPT, sources, dropped, file) for path, shards in source.files())
    for name in before - names:  # of files that are gone
        (folder / KEPT / name).unlink(missing_ok=True)
    write_text(listed, "\n".join(sorted(names)))
    report: dict[str, Any] = dict(sum(by_source.values(), Counter()))
    report = {**{name: report.get(name, 0) for name in ("records", "kept", "dropped", "unscored")}, **report}
    if not kept == report["kept"] == report["records"] - len(dropped):
        raise RuntimeError(f"{kept} of {report['records']} lines were kept, and {len(dropped)} dropped. Have the files changed?")
    report["by_source"] = by_source
    write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return {**report, "spent": job["spent"]}


def _outcomes(job: Path, on_unscored: str) -> tuple[dict[str, str], dict[str, list[dict[str, Any]]], set[str]]:
    """The source of each line of a finished job, the reasons of those that are dropped, and the lines without all scores."""
    sources: dict[str, str] = {}
    dropped: dict[str, list[dict[str, Any]]] = {}
    unscored: set[str] = set()
    for name in (OUTPUT, DROPPED):
        with open(job / name, "rb") as file:
            for one in map(json.loads, file):
                record = one.get("record", one)
                line = record["line"]
                sources[line] = record["source"]
                reasons = one.get("reasons", ())
                if name == DROPPED and not reasons and on_unscored == "drop":
                    reasons = [{"rule": one["step"], "value": None, "failed": one["reason"]}]
                if reasons:
                    dropped.setdefault(line, []).extend(reasons)
                elif name == DROPPED or any(None in scores.values() for scores in one.get("scores", {}).values()):
                    unscored.add(line)
    return sources, dropped, unscored


def _split(
    path: str,
    shards: Sequence[Shard],
    source: Source,
    folder: Path,
    sources: Mapping[str, str],
    dropped: Mapping[str, Any],
    others: IO[bytes],
) -> int:
    """Copy the lines of a file that are kept, and write the others among those that are dropped. Return how many are kept."""
    keep: list[bool] = []
    elements: list[bytes] = []
    for where, line in source.lines(shards):
        keep.append(where not in dropped)
        if not keep[-1]:
            given = line.reason if isinstance(line, BadRecord) else line
            one = {"where": where, "source": sources[where], "reasons": dropped[where], "record": given}
            others.write(json_bytes(one, lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else str(value)) + b"\n")
        elif isinstance(shards[0], ArrayShard):
            elements.append(json_bytes(line))
    with atomic_write(folder / os.path.relpath(path, source.root), "wb") as file:
        zipped = path.lower().endswith(".gz")
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) if zipped else nullcontext(file) as to:
            if isinstance(shards[0], ParquetShard):
                pq.write_table(pq.read_table(path).filter(keep), to)
            elif isinstance(shards[0], ArrayShard):
                to.write(b"[\n" + b",\n".join(elements) + b"\n]\n")
            else:
                with opened(path) as lines:
                    to.writelines(compress((line for line in lines if line.strip() not in (b"", BOM_UTF8)), keep))
    return sum(keep)
