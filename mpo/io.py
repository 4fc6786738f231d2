"""Files that are whole or absent, JSON of unknown origin, and the errors and hints that every package shares."""

from __future__ import annotations

import codecs
import difflib
import errno
import gc
import json
import os
import re
import secrets
import shutil
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

DUPLICATE_KEY = "duplicate key"
"""Kind of the BadRecord of an object that has a key twice."""
MAX_REASON_LENGTH = 2000
"""In characters: what a file holds may be of any length, and part of the reason."""
BAD_RECORDS = "bad_records.jsonl"
"""Name of the file of a run that lists its bad records."""
MAX_BAD_FRACTION = 0.01
"""Default of the maximum fraction of bad records."""
MIN_DENOMINATOR = 100
"""Minimum denominator of the bad fraction, in records; a smaller data set's size takes its place."""
TEMPORARY = re.compile(r"(?P<name>.+)\.[0-9a-f]{12}\.tmp")
"""Names of files and folders that are being written: the target's name, a random part, ``.tmp``."""


class BadRecord(ValueError):
    """A record that cannot be used.

    Attributes:
        where: its place, ``file:line``, or its id.
        reason: why.
        kind: the kind of the reason, if it has one.
        field: the name of the field that is refused, if it is one.
    """

    def __init__(self, where: str, reason: str, kind: str = "", field: str = "") -> None:
        reason = reason if len(reason) <= MAX_REASON_LENGTH else reason[: MAX_REASON_LENGTH - 3] + "..."
        super().__init__(f"{where}: {reason}" if where else reason)
        self.where, self.reason, self.kind, self.field = where, reason, kind, field

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str, str, str]]:  # it crosses processes
        return BadRecord, (self.where, self.reason, self.kind, self.field)


class StoreError(ValueError):
    """A damaged or foreign file of a cache: no fault of the record that is looked up in it."""


RECORD_ERRORS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError),  # values of another type or size
    *(OSError, EOFError, SyntaxError, struct.error, zlib.error),  # files, and their decoders
)
"""What a record can raise in code that expects a good one; `mpo.data.images` turns Pillow's own errors into a ValueError."""


@contextmanager
def bad_record(where: str) -> Iterator[None]:
    """Turn every error that a record can cause into its BadRecord. A BadRecord, or an error that names `where`, keeps its words."""
    try:
        yield
    except RecursionError:
        raise BadRecord(where, "nested too deeply to be read.") from None
    except BadRecord as bad:
        raise (bad if bad.where else BadRecord(where, bad.reason, bad.kind, bad.field)) from bad.__cause__
    except RECORD_ERRORS as error:
        reason = str(error) if isinstance(error, ValueError) else f"it cannot be used ({type(error).__name__}: {error}). Fix it."
        raise BadRecord(where, reason.removeprefix(where).lstrip(":, ") if where else reason) from error


@contextmanager
def without_collection() -> Iterator[None]:
    """Turn off garbage collection, for objects that stay or have no cycles: imports take a fifth less time, records a third."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def did_you_mean(name: Any, known: Iterable[str], *, most: int = 0) -> str:
    """Suggest the nearest valid name, as the end of an error message.

    Args:
        name: the name that is not known.
        known: the valid names.
        most: without a near name, list all of them if there are at most this many.

    >>> did_you_mean("maxx", ["min", "max"])
    " Did you mean 'max'?"
    >>> did_you_mean("width", ["min", "max"]), did_you_mean("width", ["min", "max"], most=2)
    ('', ' Valid names: min, max.')
    """
    known = list(known)
    if (near := nearest(name, known)) is not None:
        return f" Did you mean {near!r}?"
    return f" Valid names: {', '.join(known)}." if 0 < len(known) <= most else ""


def nearest(name: Any, names: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """Return the name that is most like another one, or None if none is as like it as `cutoff`, of 1 for an equal one."""
    return next(iter(difflib.get_close_matches(str(name), list(names), n=1, cutoff=cutoff)), None)


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that has no room."""


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w", *, durable: bool = False) -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` at the end; after an error `path` is as it was.

    Several processes may write the same path at the same time: the last one to finish wins, whole.

    Args:
        path: the target; its folder is created. A link is followed, a mode is kept, and what is not a regular file is written
            directly.
        mode: ``"w"`` (UTF-8) or ``"wb"``.
        durable: flush the file and its folder to disk, so that it survives a power failure.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/a/b.txt") as file:
    ...         _ = file.write("text")
    ...     Path(folder, "a", "b.txt").read_text()
    'text'
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and not target.is_file():  # a pipe or a device, which a new file would take the place of
        with open(target, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        return
    try:
        with replacing(target) as temporary:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, temporary)
    except OSError as error:
        if error.errno in FULL and error.filename in (None, str(temporary)):
            error.filename = str(target)  # writing names no file
        raise
    if durable:
        flush(target.parent)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a new path next to `target`: the file or folder written there replaces it at the end, or is removed after an error."""
    temporary = temporary_path(target)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        remove(temporary)


def write_text(path: str | os.PathLike[str], text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 file atomically; see `atomic_write`."""
    with atomic_write(path, durable=durable) as file:
        file.write(text)


def temporary_path(target: Path) -> Path:
    """Return a new name next to `target` for what is to replace it (`TEMPORARY`)."""
    return target.with_name(f"{target.name}.{secrets.token_hex(6)}.tmp")


def refuse_existing(target: Path) -> None:
    """Refuse a target that exists and is not empty. Raises ValueError for a file, or a folder that is not empty."""
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{target} already exists. Remove it, or give another folder.")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder next to `target` that is renamed to it at the end; after an error it is kept for inspection.

    Args:
        target: an empty or nonexistent folder.

    Yields:
        an empty folder in ``TARGET.partial``, from which what earlier attempts left (`TEMPORARY`) is removed.

    Raises:
        ValueError: as in `refuse_existing`, and for a ``TARGET.partial`` that holds anything else.
    """
    target = target.absolute()
    refuse_existing(target)
    attempts = target.with_name(target.name + ".partial")
    only_attempts = attempts.is_dir() and all(TEMPORARY.fullmatch(one.name) and one.is_dir() for one in attempts.iterdir())
    if attempts.is_symlink() or attempts.is_file() or (attempts.exists() and not only_attempts):
        raise ValueError(f"{attempts} is in the way and not a failed attempt at {target}. Move it, or give another folder.")
    if attempts.exists():
        shutil.rmtree(attempts)
    partial = temporary_path(attempts / target.name)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)
    attempts.rmdir()


def flush(path: Path) -> None:
    """Flush a file or folder to disk. Windows cannot open folders, nor flush a file opened for reading: nothing there."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def json_line(value: Any) -> str:
    r"""Return a value as one line of a JSONL file, with its line break.

    >>> json_line({"a": 1})
    '{"a": 1}\n'
    """
    return json.dumps(value, ensure_ascii=False) + "\n"


def write_json_lines(path: str | os.PathLike[str], lines: Iterable[Any]) -> None:
    """Write a JSONL file atomically."""
    with atomic_write(path) as file:
        file.writelines(map(json_line, lines))


def append_json_lines(path: str | os.PathLike[str], lines: Iterable[Any]) -> None:
    """Append to a JSONL file with one write, so that lines of several processes do not mix.

    A last line without its line break, which a killed process leaves, gets one: the new lines stay whole.
    """
    data = "".join(map(json_line, lines)).encode()
    if not data:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode) and file.tell():
            with open(path, "rb") as before:
                before.seek(-1, os.SEEK_END)
                data = data if before.read(1) == b"\n" else b"\n" + data
        while data:  # one write, unless the disk is full or a signal comes
            data = data[file.write(data) :]


def read_json_lines(path: str | os.PathLike[str]) -> list[Any]:
    """Read a JSONL file. Raises BadRecord for a line that is not JSON or not UTF-8, with the file and the line."""
    found = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            with bad_record(f"{path}:{number}"):
                found.append(parse_json(line, "the line"))
    return found


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file that holds one object, such as a checkpoint's config.json.

    Raises:
        BadRecord: naming the file, for one that is not UTF-8, not JSON, or not an object.
    """
    data = Path(path).read_bytes()
    with bad_record(str(path)):
        found = parse_json(data, "the file")
        if not isinstance(found, dict):
            raise BadRecord("", f"expected a JSON object, got {json_kind(found)}.")
    return found


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse JSON of unknown origin.

    Args:
        text: the JSON; bytes are UTF-8, with or without a byte order mark.
        what: what it is said to be, for errors.

    Raises:
        BadRecord: when it is none, with the place of the mistake; and for an object, at any depth, with the same key twice.
    """
    return parse_json_at(text if isinstance(text, str) else decode_text(text, what), 0, what, whole=True)[0]


def parse_json_at(text: str, start: int, what: str, *, whole: bool = False) -> tuple[Any, int]:
    """Parse the JSON value at a place of a text; return it and the place after it. `whole`: nothing else is in the text."""
    try:
        value, end = _DECODER.raw_decode(text, after_blanks(text, start))
        if whole and (end := after_blanks(text, end)) < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        return value, end
    except _Twice as twice:
        (key,) = twice.args
        found = f"{key!r} is given twice, but only the last one would be used"
        quoted = json.dumps(key, ensure_ascii=False)
        if whole and "\n" in text.strip() and text.count(quoted) == 2:
            found += f" (line {text.count(chr(10), 0, text.rfind(quoted)) + 1})"
        raise BadRecord("", f"{found}. Remove one of them.", DUPLICATE_KEY) from None
    except json.JSONDecodeError as error:
        found = "a zero byte" if text[error.pos : error.pos + 1] == "\0" else error.msg
        if text[:1] == "\0" or text[1:2] == "\0":
            found = "a zero byte: it may be UTF-16. Save the file as UTF-8"
        elif error.msg == "Extra data" and "\r" in text[max(0, error.pos - 1) : error.pos + 1]:
            found = "two values with a carriage return (CR) between them: write line feeds (LF) as line ends"
        raise BadRecord("", f"not JSON ({found}, at character {error.pos + 1} of {what}).") from None
    except RecursionError:
        raise BadRecord("", f"nested too deeply to be {what}.") from None
    except ValueError:  # Python reads no whole numbers of more than 4,300 digits
        raise BadRecord("", f"a number in {what} is too long.") from None


def end_of_json(text: str, start: int) -> int | None:
    """Return the place after a JSON value that `parse_json_at` refuses, if only for a key, a character of a text or a number."""
    try:
        return _LENIENT.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        return None


class _Twice(Exception):  # noqa: N818  not an error of its own
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _Twice(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LENIENT = json.JSONDecoder(strict=False, parse_int=str)
_BLANKS = re.compile(r"[ \t\r\n]*")


def after_blanks(text: str, place: int) -> int:
    """Return the first place from `place` on that has none of JSON's white space."""
    found = _BLANKS.match(text, place)
    return found.end() if found else place


def decode_text(data: bytes | bytearray, what: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises BadRecord for anything else, with the first wrong byte."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        name = "UTF-16 or UTF-32, " if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)) else ""
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte {error.start + 1} of {what}{f', line {line}' if line > 1 else ''}"
        raise BadRecord("", f"{name}not UTF-8 ({place}). Save the file as UTF-8.") from None


def json_kind(value: Any) -> str:
    """Name a value's type as JSON does.

    >>> json_kind([1]), json_kind(None), json_kind(True)
    ('a list', 'null', 'a boolean')
    """
    if value is None:
        return "null"
    for types, name in (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "text"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
        ((bytes, bytearray), "bytes"),
    ):
        if isinstance(value, types):  # type: ignore[arg-type]
            return name
    return f"a {type(value).__name__}"
