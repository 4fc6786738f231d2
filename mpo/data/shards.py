"""Parts of a source, each of which a process can read by itself, line by line.

A line comes with where it stands (``file:line``), as a dict or as the BadRecord that it is. Damage that nothing can be read after
is a ValueError with the name of the file. Tars: `mpo.data.tars`.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset

from mpo.data.pairs import BadRecord, json_kind, parse_json

DAMAGE = (OSError, EOFError, zlib.error)  # what reading a file, compressed or not, may raise
MAX_LINE_BYTES = 64 * 2**20
"""In bytes. No line of a pair is as long: it is a file of something else."""
MAX_ARRAY_BYTES = 2**30
"""In bytes, unpacked: a JSON array is read whole, and a compressed file of a few megabytes may hold any number of gigabytes."""
ROWS = 256
"""Rows of a table that are turned into lines at once."""
_NAMES = ("image", "images", "question", "prompt", "chosen", "rejected", "messages", "rejected_response", "conversations", "text")
_QUOTED = [(name, f'"{name}"'.encode()) for name in _NAMES]

Line = tuple[str, "dict[str, Any] | BadRecord"]


class Shard(Protocol):
    """Part of a source."""

    @property
    def size(self) -> int:
        """In bytes, about, or in rows; the same for all shards of a source."""

    def lines(self) -> Iterator[Line]:
        """Where each line stands, and what it is."""


@dataclass(frozen=True)
class LinesShard:
    """The lines of a JSONL file from byte `start` to `end` (None: its end); the first of them has the number `first`."""

    path: Path
    start: int
    end: int | None
    first: int

    @property
    def size(self) -> int:  # noqa: D102
        return (self.path.stat().st_size if self.end is None else self.end) - self.start

    def lines(self) -> Iterator[Line]:  # noqa: D102
        number, place = self.first - 1, self.start
        with opened(self.path) as file:
            file.seek(place)
            while self.end is None or place < self.end:
                text = self._read(file, MAX_LINE_BYTES + 1)
                if not text:
                    return
                number += 1
                place += len(text)
                where = f"{self.path}:{number}"
                if len(text) > MAX_LINE_BYTES:
                    place += self._rest_of_line(file, text)
                    reason = f"a line of more than {MAX_LINE_BYTES >> 20} MiB. A pair file holds one JSON object a line."
                    yield where, BadRecord(where, reason)
                    continue
                if number == 1:
                    text = text.removeprefix(b"\xef\xbb\xbf")
                if text.isspace():
                    continue
                try:
                    yield where, parse_line(text)
                except BadRecord as bad:
                    yield where, BadRecord(where, bad.reason)

    def _rest_of_line(self, file: BinaryIO, text: bytes) -> int:
        """Read on to the end of a line that begins with `text`; how many bytes that were."""
        passed = 0
        while text and not text.endswith(b"\n"):
            text = self._read(file, 2**20)
            passed += len(text)
        return passed

    def _read(self, file: BinaryIO, most: int) -> bytes:
        try:
            return file.readline(most)
        except DAMAGE as error:
            raise ValueError(f"{self.path} is damaged or cut short: {one_line(error)}") from error


@dataclass(frozen=True)
class ArrayShard:
    """A file that is one JSON array of objects. All of its text is in memory while it is read, but one object at a time.

    Where it is no JSON, nothing after can be told apart: the rest is one bad record.
    """

    path: Path

    @property
    def size(self) -> int:  # noqa: D102
        return self.path.stat().st_size

    def lines(self) -> Iterator[Line]:  # noqa: D102
        try:
            text = self._read().decode("utf-8-sig")
        except (UnicodeDecodeError, *DAMAGE) as error:
            raise ValueError(f"{self.path} is not UTF-8, damaged or cut short: {one_line(error)}") from error
        decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")

        def skip_blanks(place: int) -> int:
            found = blank.match(text, place)
            return found.end() if found else place

        number, counted = 1, 0
        place = skip_blanks(skip_blanks(0) + 1)  # after the bracket
        mark = text[place : place + 1]
        while mark != "]":
            number, counted = number + text.count("\n", counted, place), place
            where = f"{self.path}:{number}"
            try:
                line, place = decode(text, place)
            except (ValueError, RecursionError) as error:
                yield where, BadRecord(where, f"not JSON from here on ({one_line(error)}), in a file that is one array.")
                return
            if isinstance(line, dict):
                yield where, line
            else:
                kind = json_kind(line)
                yield where, BadRecord(where, f"the array has {kind} where an object with the fields of a pair is expected.")
            place = skip_blanks(place)
            mark = text[place : place + 1]
            if mark == ",":
                place = skip_blanks(place + 1)
            elif mark != "]":
                yield where, BadRecord(where, "not JSON after this object: a comma or the end of the array is expected.")
                return
        if text[place + 1 :].strip():
            yield str(self.path), BadRecord(str(self.path), "there is more after the end of the array.")

    def _read(self) -> bytearray:
        text = bytearray()
        with opened(self.path) as file:
            while block := file.read(2**24):
                text += block
                if len(text) > MAX_ARRAY_BYTES:
                    raise ValueError(
                        f"{self.path} is one JSON array of more than {MAX_ARRAY_BYTES >> 20:,} MiB, which is read whole. Write it "
                        "as JSONL, an object a line, which is read line by line: jq -c '.[]' FILE.json > FILE.jsonl"
                    )
        return text


@dataclass(frozen=True)
class ParquetShard:
    """A row group of a Parquet file; its first row has the number `first`."""

    path: Path
    group: int
    first: int
    size: int

    def lines(self) -> Iterator[Line]:  # noqa: D102
        number = self.first
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(ROWS, row_groups=[self.group]):
                    yield from _rows(batch, str(self.path), number)
                    number += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is damaged or cut short ({one_line(error)}).") from error


@dataclass(frozen=True)
class DatasetShard:
    """Rows of a data set in Arrow's format, whose images stay encoded."""

    dataset: Dataset
    name: str
    start: int
    end: int

    @property
    def size(self) -> int:  # noqa: D102
        return self.end - self.start

    def lines(self) -> Iterator[Line]:  # noqa: D102
        for start in range(self.start, self.end, ROWS):
            try:
                rows = self.dataset[start : min(start + ROWS, self.end)]
            except (pa.ArrowException, OSError, ValueError, IndexError) as error:
                raise ValueError(f"{self.name} is damaged: {one_line(error)}") from error
            yield from _rows(rows, self.name, start + 1)


def _rows(table: Any, name: str, first: int) -> Iterator[Line]:
    """The rows of an Arrow table or batch as lines, the first with the number `first`.

    A row with a value that Python cannot hold, such as a date beyond the year 9999 or text that is not UTF-8, is a bad one.
    """
    try:
        rows = table.to_pylist()
    except Exception:  # of many kinds: of each type of column its own
        rows = [_row(table.slice(place, 1), f"{name}:{first + place}") for place in range(table.num_rows)]
    for number, line in enumerate(rows, start=first):
        yield f"{name}:{number}", line


def _row(row: Any, where: str) -> dict[str, Any] | BadRecord:
    try:
        line: dict[str, Any] = row.to_pylist()[0]
        return line
    except Exception as error:
        column = next((name for name in row.schema.names if not _is_readable(row, name)), "?")
        return BadRecord(where, f"the value of column {column!r} cannot be read ({one_line(error)}). Fix it or leave the row out.")


def _is_readable(row: Any, column: str) -> bool:
    try:
        row.column(column).to_pylist()
    except Exception:
        return False
    return True


# Lines


def parse_line(text: bytes) -> dict[str, Any]:
    """Parse a line of a JSONL file.

    Raises:
        BadRecord: for what is not a JSON object, and for one that has a field of a pair twice.
    """
    line = parse_json(text, "the line")
    if not isinstance(line, dict):
        raise BadRecord("", f"a JSON {type(line).__name__} instead of an object with the fields of a pair ({json_kind(line)}).")
    # Python keeps the last of two values. Looking closer takes time, and is done where a name is there more than once.
    for name, quoted in _QUOTED:
        if name in line and text.count(quoted) > 1:
            try:
                json.loads(text, object_pairs_hook=_refuse_twice)
            except RecursionError:
                raise BadRecord("", "nested too deeply to be the line.") from None
            break
    return line


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    line = dict(pairs)
    if len(line) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRecord("", f"{twice!r} is there twice, and only one of the two would count.")
    return line


def opened(path: Path) -> Any:
    """A file as bytes, unpacked if it is of gzip."""
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def one_line(error: BaseException) -> str:
    """An error's text for a place inside of another's."""
    return " ".join(str(error).split())[:500] or type(error).__name__
