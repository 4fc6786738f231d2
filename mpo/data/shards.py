"""Read the shards of a source, line by line; each shard can be read by a different process.

A line is yielded with its place (``file:line``), as a dict or as a BadRecord. Damage after which nothing can be read raises a
ValueError with the name of the file.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset

from mpo.io import BadRecord, after_blanks, bad_record, decode_text, end_of_json, json_kind, parse_json, parse_json_at

DAMAGE = (OSError, EOFError, zlib.error)  # errors of reading a file, compressed or not
MAX_LINE_BYTES = 64 * 2**20
"""Maximum bytes of a line. A longer line is not a pair but another kind of file."""
MAX_ARRAY_BYTES = 2**30
"""Maximum uncompressed bytes of a JSON array: it is read at once, and a small compressed file may contain many gigabytes."""
TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
MAX_SAMPLE_BYTES = 256 * 2**20
"""Maximum uncompressed bytes of all members of a sample of a tar, which are in memory at once."""
ROWS = 256
"""Number of table rows that are converted to lines at once."""
FILE_DAMAGED = "file damaged"
"""Kind of a bad record after which nothing of its file can be read."""

Line = tuple[str, "dict[str, Any] | BadRecord"]


@dataclass(frozen=True)
class Shard:
    """Part of a source: a file, or some of its lines or rows; ``size``: its bytes, or its rows."""

    path: str
    size: int = 0

    def lines(self) -> Iterator[Line]:
        """Yield the place of each line and the line. Raises ValueError for a damaged file."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinesShard(Shard):
    """The lines of a JSONL file from byte `start` to `end` (None: its end); `first` is the number of the first line."""

    start: int = 0
    end: int | None = None
    first: int = 1

    def lines(self) -> Iterator[Line]:  # noqa: D102
        number, place = self.first - 1, self.start
        try:
            with opened(self.path) as file:
                file.seek(place)
                while (self.end is None or place < self.end) and (text := file.readline(MAX_LINE_BYTES + 1)):
                    number += 1
                    place += len(text)
                    where = f"{self.path}:{number}"
                    if len(text) > MAX_LINE_BYTES:
                        while text and not text.endswith(b"\n"):
                            text = file.readline(2**20)
                            place += len(text)
                        reason = f"a line of more than {MAX_LINE_BYTES >> 20} MiB. Write one JSON object per line."
                        yield where, BadRecord(where, reason)
                        continue
                    if text.strip() not in (b"", BOM_UTF8):
                        line = _parsed(partial(parse_line, text), where)
                        is_object = text.removeprefix(BOM_UTF8).lstrip().startswith(b"{")
                        if number == 1 and isinstance(line, BadRecord) and not is_object:
                            advice = "Write one JSON object per line; a file with a JSON array ends in .json."
                            line = BadRecord(where, f"{line.reason} {advice}", line.kind)
                        yield where, line
        except DAMAGE as error:
            raise damaged(self.path, error) from error


def _parsed(parse: Callable[[], dict[str, Any]], where: str) -> dict[str, Any] | BadRecord:
    try:
        with bad_record(where):
            return parse()
    except BadRecord as bad:
        return bad


@dataclass(frozen=True)
class ArrayShard(Shard):
    """A file that is one JSON array of objects. Its whole text is in memory, but only one parsed object at a time.

    An element whose end is known is a bad record like a line. After other invalid JSON nothing can be read: a BadRecord is raised.
    """

    def lines(self) -> Iterator[Line]:  # noqa: D102
        return ((where, line) for where, line, _ in self.elements())

    def elements(self) -> Iterator[tuple[str, Any, str]]:
        """Read the lines, each with its text in the file."""
        try:
            data = self._read()
        except DAMAGE as error:
            raise damaged(self.path, error) from error
        number, counted, again, where = 1, 0, 0, f"{self.path}:1"
        try:
            text = decode_text(data, "the file")
            place = after_blanks(text, after_blanks(text, 0) + 1)  # after the bracket
            token = text[place : place + 1]
            while token != "]":
                again = 0 if (lines := text.count("\n", counted, place)) or not counted else again + 1
                number, counted, start = number + lines, place, place
                where = f"{self.path}:{number}{f'.{again}' if again else ''}"  # several on a line have a place each
                try:
                    line, place = parse_json_at(text, place, "the array")
                except BadRecord as bad:
                    if (end := end_of_json(text, place)) is None:
                        reason = bad.reason.removeprefix("not JSON ")
                        raise BadRecord("", f"not JSON from here on: {reason} Nothing after it can be read.", bad.kind) from None
                    line, place = BadRecord(where, bad.reason, bad.kind), end
                reason = f"the array has {json_kind(line)}; expected an object with the fields of a pair."
                yield where, line if isinstance(line, (dict, BadRecord)) else BadRecord(where, reason), text[start:place]
                place = after_blanks(text, place)
                token = text[place : place + 1]
                if token == ",":
                    place = after_blanks(text, place + 1)
                elif token != "]":
                    raise BadRecord("", "not JSON after this object: expected a comma or the end of the array. Fix the file.")
            if text[place + 1 :].strip():
                where = self.path
                raise BadRecord("", "there is text after the end of the array. Remove it, or write the file as JSONL.")
        except BadRecord as bad:  # nothing after it can be read, so it is not skipped
            raise BadRecord(where, bad.reason, bad.kind or FILE_DAMAGED) from None

    def _read(self) -> bytearray:
        text = bytearray()
        with opened(self.path) as file:
            while block := file.read(2**24):
                text += block
                if len(text) > MAX_ARRAY_BYTES:
                    found = f"{self.path} is one JSON array of more than {MAX_ARRAY_BYTES >> 20:,} MiB, which is read at once"
                    raise ValueError(f"{found}. Write it as JSONL: jq -c '.[]' FILE.json > FILE.jsonl")
        return text


@dataclass(frozen=True)
class ParquetShard(Shard):
    """A row group of a Parquet file; `first` is the number of its first row."""

    group: int = 0
    first: int = 1

    def lines(self) -> Iterator[Line]:  # noqa: D102
        number = self.first
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(ROWS, row_groups=[self.group]):
                    yield from _rows(batch, self.path, number)
                    number += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise damaged(self.path, error) from error


@dataclass(frozen=True)
class DatasetShard(Shard):
    """The rows of a data set in Arrow format from `start` on, whose images stay encoded; `path` may be its name on the Hub."""

    dataset: Dataset | None = None
    start: int = 0

    def lines(self) -> Iterator[Line]:  # noqa: D102
        assert self.dataset is not None
        end = self.start + self.size
        for start in range(self.start, end, ROWS):
            try:
                rows = self.dataset[start : min(start + ROWS, end)]
            except (pa.ArrowException, OSError, ValueError, IndexError) as error:
                raise ValueError(f"{self.path} is damaged ({one_line(error)}). Save or download it again.") from error
            yield from _rows(rows, self.path, start + 1)


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
    line: dict[str, Any] = {}
    for column in row.schema.names:
        try:
            line[column] = row.column(column).to_pylist()[0]
        except Exception as error:
            reason = f"the value of column {column!r} cannot be read ({one_line(error)}). Fix it or leave the row out."
            return BadRecord(where, reason)
    return line


# Tars


@dataclass(frozen=True)
class TarShard(Shard):
    """A WebDataset tar: the members with one key are a sample, ``key.json`` is its line, ``key.jpg`` and similar are its images.

    A line may name its images by their members; otherwise the sample has all its image members, in the tar's order.
    """

    def lines(self) -> Iterator[Line]:  # noqa: D102
        seen: set[str] = set()
        try:
            with tarfile.open(self.path, "r|*") as archive:
                members = (member for member in archive if not member.isdir())
                for key, sample in groupby(members, lambda member: _key(member.name)):
                    yield self._line(archive, key, sample, key not in seen)
                    seen.add(key)
        except (tarfile.TarError, *DAMAGE) as error:
            raise damaged(self.path, error, "not a tar, ") from error

    def _line(self, archive: tarfile.TarFile, key: str, sample: Iterator[tarfile.TarInfo], is_new: bool) -> Line:
        """Return the place of a sample and its line with the images in it, or the first reason why it is not valid."""
        members: dict[str, bytes] = {}
        size = 0
        for member in sample:
            where, name = f"{self.path}:{member.name}", member.name.rpartition("/")[2]
            size += member.size
            file = archive.extractfile(member) if member.isreg() and size <= MAX_SAMPLE_BYTES else None
            if not is_new:
                reason = "its key was there before, after which other samples came. Put the members of a sample together."
            elif not member.isreg():
                reason = "a link or a device in the tar. Pack the files themselves."
            elif name in members:
                reason = "this member is in the tar twice. Remove one of them."
            elif file is None:
                found = f"the members of its sample have more than {MAX_SAMPLE_BYTES >> 20} MiB, but are read at once"
                reason = f"{found}. Make the images smaller, or leave the sample out."
            else:
                members[name] = file.read()
                continue
            return where, BadRecord(where, reason)
        where = f"{self.path}:{key}"
        return where, _parsed(lambda: _with_images(key, members), where)


def _key(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _with_images(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    texts = [name for name in members if name.lower().endswith(".json")]
    if len(texts) != 1:
        raise ValueError(f"a sample must have one member {os.path.basename(key)}.json with its line; got {sorted(members)}.")
    line = parse_line(members.pop(texts[0]))
    column = next((name for name in ("images", "image", "img_path") if line.get(name)), "images")
    found = _named(line.get(column), members) if line.get(column) else list(members)
    others = [name for name in found if name.rpartition(".")[2].lower() not in TAR_IMAGES]
    if others:
        raise ValueError(f"the member {others[0]!r} is not an image of a known type ({', '.join(TAR_IMAGES)}). Remove it.")
    if unused := sorted(members.keys() - set(found)):
        raise ValueError(f"the line does not name the member {unused[0]!r} of its sample among its images. Name or remove it.")
    if found:
        line[column] = [{"bytes": members[name], "path": name} for name in found]
    return line


def _named(given: Any, members: dict[str, bytes]) -> list[str]:
    """Find the members that a line names as its images: by their names, with or without a folder, or by the part after the key."""
    names = []
    for one in given if isinstance(given, list) else [given]:
        last = one.rpartition("/")[2] if isinstance(one, str) else None
        matching = [name for name in members if last in (name, name.partition(".")[2])]
        if len(matching) != 1:
            raise ValueError(f"its image {one!r} is not a member of the sample, which has {sorted(members)}. Fix the name.")
        names += matching
    return names


# Lines


def parse_line(text: bytes) -> dict[str, Any]:
    """Parse a line of a JSONL file. Raises BadRecord for anything but a JSON object, and for a duplicate key at any depth."""
    line = parse_json(text, "the line")
    if not isinstance(line, dict):
        raise ValueError(f"a JSON {type(line).__name__} instead of an object with the fields of a pair ({json_kind(line)}).")
    return line


def opened(path: str) -> Any:
    """Open a file as bytes, decompressed if it is gzip."""
    return gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb")


def damaged(path: str, error: BaseException, kind: str = "") -> ValueError:
    """Return the error of a file that cannot be read; ``kind`` says what else it may be."""
    return ValueError(f"{path} is {kind}damaged or cut short ({one_line(error)}). Download or write it again.")


def one_line(error: BaseException) -> str:
    """Format an error's text to be quoted in another message."""
    return " ".join(str(error).split())[:500] or type(error).__name__
