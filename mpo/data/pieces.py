"""Parts of a source, each of which a process can read by itself, line by line.

A line comes with where it stands (``file:line``), as a dict or as the BadRecord that it is. Damage that nothing can be read behind
is a ValueError with the name of the file.
"""

from __future__ import annotations

import gzip
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset

from mpo.data.pairs import BadRecord, json_kind, parse_json

DAMAGE = (OSError, EOFError, zlib.error)  # what reading a file, compressed or not, may raise
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
LONGEST_LINE = 64 * 2**20
"""In bytes. No line of a pair is as long: it is a file of something else."""
LARGEST_MEMBER = 256 * 2**20
ROWS = 256
"""Rows of a table that are turned into lines at once."""
_NAMES = ("image", "images", "question", "prompt", "chosen", "rejected", "messages", "rejected_response", "conversations", "text")
_QUOTED = [(name, f'"{name}"'.encode()) for name in _NAMES]

Line = tuple[str, "dict[str, Any] | BadRecord"]


class Piece(Protocol):
    """Part of a source."""

    @property
    def size(self) -> int:
        """In bytes, about, or in rows; the same for all pieces of a source."""

    def lines(self) -> Iterator[Line]:
        """Where each line stands, and what it is."""


@dataclass(frozen=True)
class LinesPiece:
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
                try:
                    text = file.readline(LONGEST_LINE + 1)
                except DAMAGE as error:
                    raise ValueError(f"{self.path} is damaged or cut short: {one_line(error)}") from error
                if not text:
                    return
                number += 1
                place += len(text)
                where = f"{self.path}:{number}"
                if len(text) > LONGEST_LINE:
                    raise BadRecord(
                        where, f"a line of more than {LONGEST_LINE >> 20} MiB. A pair file holds one JSON object a line."
                    )
                if number == 1:
                    text = text.removeprefix(b"\xef\xbb\xbf")
                if text.isspace():
                    continue
                try:
                    yield where, parse_line(text)
                except BadRecord as bad:
                    yield where, BadRecord(where, bad.reason)


@dataclass(frozen=True)
class ArrayPiece:
    """A file that is one JSON array of objects. All of its text is in memory while it is read, but one object at a time."""

    path: Path

    @property
    def size(self) -> int:  # noqa: D102
        return self.path.stat().st_size

    def lines(self) -> Iterator[Line]:  # noqa: D102
        try:
            with opened(self.path) as file:
                text = file.read().decode("utf-8-sig")
        except (UnicodeDecodeError, *DAMAGE) as error:
            raise ValueError(f"{self.path} is not UTF-8, damaged or cut short: {one_line(error)}") from error
        decode, blank = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")

        def skip_blanks(place: int) -> int:
            found = blank.match(text, place)
            return found.end() if found else place

        number, counted = 1, 0
        place = skip_blanks(skip_blanks(0) + 1)  # behind the bracket
        mark = text[place : place + 1]
        while mark != "]":
            number, counted = number + text.count("\n", counted, place), place
            where = f"{self.path}:{number}"
            try:
                line, place = decode(text, place)
            except (ValueError, RecursionError) as error:
                raise BadRecord(where, f"not JSON from here on ({one_line(error)}), in a file that is one array.") from None
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
                raise BadRecord(where, "not JSON behind this object: a comma or the end of the array is expected.")
        if text[place + 1 :].strip():
            raise BadRecord(str(self.path), "there is more behind the end of the array.")


@dataclass(frozen=True)
class ParquetPiece:
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
                    for line in batch.to_pylist():
                        yield f"{self.path}:{number}", line
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{self.path} is damaged or cut short ({one_line(error)}).") from error


@dataclass(frozen=True)
class DatasetPiece:
    """Rows of a data set in Arrow's format, whose pictures stay encoded."""

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
                rows = self.dataset[start : min(start + ROWS, self.end)].to_pylist()
            except (pa.ArrowException, OSError, ValueError, IndexError) as error:
                raise ValueError(f"{self.name} is damaged: {one_line(error)}") from error
            for number, line in enumerate(rows, start=start + 1):
                yield f"{self.name}:{number}", line


@dataclass(frozen=True)
class TarPiece:
    """A tar of a WebDataset: members of one key are a sample, ``key.json`` its line, ``key.jpg`` or several its pictures.

    A line may name its pictures, as their members are called; else they are all its pictures, in the tar's order.
    """

    path: Path

    @property
    def size(self) -> int:  # noqa: D102
        return self.path.stat().st_size

    def lines(self) -> Iterator[Line]:  # noqa: D102
        key: str | None = None
        members: dict[str, bytes] = {}
        seen: set[str] = set()
        try:
            with tarfile.open(self.path, "r|*") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    own_key = f"{folder}/{name.partition('.')[0]}" if folder else name.partition(".")[0]
                    where = f"{self.path}:{member.name}"
                    if not member.isreg():
                        raise BadRecord(where, "a link or a device in the tar. Pack the files themselves.")
                    if member.size > LARGEST_MEMBER:
                        raise BadRecord(where, f"a member of more than {LARGEST_MEMBER >> 20} MiB.")
                    if key is not None and own_key != key:
                        yield self._sample(key, members)
                        members = {}
                        seen.add(key)
                    if own_key in seen:
                        raise BadRecord(where, "its key was there before: the members of a sample stand one behind the other.")
                    key = own_key
                    file = archive.extractfile(member)
                    if name in members or file is None:
                        raise BadRecord(where, "this member is there twice.")
                    members[name] = file.read()
        except (tarfile.TarError, *DAMAGE) as error:
            raise ValueError(f"{self.path} is no tar, damaged or cut short: {one_line(error)}") from error
        if key is not None:
            yield self._sample(key, members)

    def _sample(self, key: str, members: dict[str, bytes]) -> Line:
        where = f"{self.path}:{key}"
        try:
            texts = [name for name in members if name.lower().endswith(".json")]
            if len(texts) != 1:
                raise BadRecord("", f"a sample has one member {Path(key).name}.json with its line; this one has {sorted(members)}.")
            line = parse_line(members.pop(texts[0]))
            field = next((name for name in ("images", "image", "img_path") if line.get(name)), "images")
            found = _named(line.get(field), members) if line.get(field) else list(members)
            others = [name for name in found if name.rpartition(".")[2].lower() not in PICTURES]
            if others:
                raise BadRecord("", f"the member {others[0]!r} is no picture of a known kind ({', '.join(PICTURES)}).")
            if found:
                line[field] = [{"bytes": members[name], "path": name} for name in found]
            return where, line
        except BadRecord as bad:
            return where, BadRecord(where, bad.reason)


def _named(given: Any, members: dict[str, bytes]) -> list[str]:
    """The members that a line names as its pictures: by their names, with or without a folder, or by what stands behind the key."""
    names = []
    for one in given if isinstance(given, list) else [given]:
        last = one.rpartition("/")[2] if isinstance(one, str) else None
        fitting = [name for name in members if last in (name, name.partition(".")[2])]
        if len(fitting) != 1:
            raise BadRecord("", f"its picture {one!r} is no member of the sample, which has {sorted(members)}.")
        names += fitting
    return names


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
