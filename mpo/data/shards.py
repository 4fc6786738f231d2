"""Read the shards of a source, line by line; each shard can be read by a different process.

A line is yielded with its place (``file:line``), as a dict or as a BadRecord. Damage after which nothing can be read raises a
ValueError with the name of the file. Tars: `mpo.data.tars`.
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

from mpo.io import BadRecord, json_kind, parse_json

DAMAGE = (OSError, EOFError, zlib.error)  # errors of reading a file, compressed or not
MAX_LINE_BYTES = 64 * 2**20
"""Maximum bytes of a line. A longer line is not a pair but another kind of file."""
MAX_ARRAY_BYTES = 2**30
"""Maximum uncompressed bytes of a JSON array: it is read at once, and a small compressed file may contain many gigabytes."""
ROWS = 256
"""Number of table rows that are converted to lines at once."""
_NAMES = ("image", "images", "question", "prompt", "chosen", "rejected", "messages", "rejected_response", "conversations", "text")
_QUOTED = [(name, f'"{name}"'.encode()) for name in _NAMES]

Line = tuple[str, "dict[str, Any] | BadRecord"]


class Shard(Protocol):
    """Part of a source."""

    @property
    def size(self) -> int:
        """The approximate bytes, or the rows; the same unit for all shards of a source."""

    def lines(self) -> Iterator[Line]:
        """Yield the place of each line and the line."""


@dataclass(frozen=True)
class LinesShard:
    """The lines of a JSONL file from byte `start` to `end` (None: its end); `first` is the number of the first line."""

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
                    reason = f"a line of more than {MAX_LINE_BYTES >> 20} MiB. Write one JSON object per line."
                    yield where, BadRecord(where, reason)
                    continue
                if number == 1:
                    text = text.removeprefix(b"\xef\xbb\xbf")
                if text.isspace():
                    continue
                try:
                    yield where, parse_line(text)
                except ValueError as error:
                    yield where, BadRecord(where, str(error))

    def _rest_of_line(self, file: BinaryIO, text: bytes) -> int:
        """Skip to the end of a line that begins with `text`; return the number of skipped bytes."""
        passed = 0
        while text and not text.endswith(b"\n"):
            text = self._read(file, 2**20)
            passed += len(text)
        return passed

    def _read(self, file: BinaryIO, most: int) -> bytes:
        try:
            return file.readline(most)
        except DAMAGE as error:
            raise ValueError(f"{self.path} is damaged or cut short ({one_line(error)}). Download or write it again.") from error


@dataclass(frozen=True)
class ArrayShard:
    """A file that is one JSON array of objects. Its whole text is in memory, but only one parsed object at a time.

    After invalid JSON nothing can be parsed: the rest of the file is one bad record.
    """

    path: Path

    @property
    def size(self) -> int:  # noqa: D102
        return self.path.stat().st_size

    def lines(self) -> Iterator[Line]:  # noqa: D102
        try:
            text = self._read().decode("utf-8-sig")
        except (UnicodeDecodeError, *DAMAGE) as error:
            raise ValueError(
                f"{self.path} is not UTF-8, damaged or cut short ({one_line(error)}). Download or write it again."
            ) from error
        decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")

        def skip_blanks(place: int) -> int:
            found = blank.match(text, place)
            return found.end() if found else place

        number, counted = 1, 0
        place = skip_blanks(skip_blanks(0) + 1)  # after the bracket
        token = text[place : place + 1]
        while token != "]":
            number, counted = number + text.count("\n", counted, place), place
            where = f"{self.path}:{number}"
            try:
                line, place = decode(text, place)
            except (ValueError, RecursionError) as error:
                yield (
                    where,
                    BadRecord(where, f"not JSON from here on ({one_line(error)}), in a file that is one array. Fix the file."),
                )
                return
            if isinstance(line, dict):
                yield where, line
            else:
                kind = json_kind(line)
                yield where, BadRecord(where, f"the array has {kind}; expected an object with the fields of a pair.")
            place = skip_blanks(place)
            token = text[place : place + 1]
            if token == ",":
                place = skip_blanks(place + 1)
            elif token != "]":
                yield where, BadRecord(where, "not JSON after this object: expected a comma or the end of the array. Fix the file.")
                return
        if text[place + 1 :].strip():
            yield (
                str(self.path),
                BadRecord(str(self.path), "there is text after the end of the array. Remove it, or write the file as JSONL."),
            )

    def _read(self) -> bytearray:
        text = bytearray()
        with opened(self.path) as file:
            while block := file.read(2**24):
                text += block
                if len(text) > MAX_ARRAY_BYTES:
                    raise ValueError(
                        f"{self.path} is one JSON array of more than {MAX_ARRAY_BYTES >> 20:,} MiB, which is read at once. "
                        "Write it as JSONL, which is read line by line: jq -c '.[]' FILE.json > FILE.jsonl"
                    )
        return text


@dataclass(frozen=True)
class ParquetShard:
    """A row group of a Parquet file; `first` is the number of its first row."""

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
            raise ValueError(f"{self.path} is damaged or cut short ({one_line(error)}). Download or write it again.") from error


@dataclass(frozen=True)
class DatasetShard:
    """Rows of a data set in Arrow format, whose images stay encoded."""

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
                raise ValueError(f"{self.name} is damaged ({one_line(error)}). Save or download it again.") from error
            yield from _rows(rows, self.name, start + 1)


def _rows(table: Any, name: str, first: int) -> Iterator[Line]:
    """Yield the rows of an Arrow table or batch as lines; `first` is the number of the first row.

    A row with a value that Python cannot represent, such as a date after the year 9999 or text that is not UTF-8, is a BadRecord.
    """
    try:
        rows = table.to_pylist()
    except Exception:  # of many types, depending on the column
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
        ValueError: for anything but a JSON object, and for an object with a duplicate field of a pair.
    """
    line = parse_json(text, "the line")
    if not isinstance(line, dict):
        raise ValueError(f"a JSON {type(line).__name__} instead of an object with the fields of a pair ({json_kind(line)}).")
    # Python keeps the last of two values. The exact check takes time, so it is done only if a name occurs more than once.
    for name, quoted in _QUOTED:
        if name in line and text.count(quoted) > 1:
            try:
                json.loads(text, object_pairs_hook=_refuse_twice)
            except RecursionError:
                raise ValueError("the line is nested too deeply to be read.") from None
            break
    return line


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    line = dict(pairs)
    if len(line) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice, but only the last one would be used. Remove one of them.")
    return line


def opened(path: Path) -> Any:
    """Open a file as bytes, decompressed if it is gzip."""
    return gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb")


def one_line(error: BaseException) -> str:
    """Format an error's text to be quoted in another message."""
    return " ".join(str(error).split())[:500] or type(error).__name__
