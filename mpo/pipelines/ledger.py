"""The ledger of a job: every response that was paid for, one line each, found again after any interruption."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from mpo.generation.generator import Request, Response

KEY_DIGITS = 32
NO_KEY = "0" * KEY_DIGITS
"""Of a line without a response, for what was spent on others that did not come."""
_START = b'{"key": "'
_SPENT, _CHECKSUM = b', "spent": ', b', "checksum": "'


def key_of(record_id: str, step: str, number: int, request: str, sample: int) -> str:
    """The key of a sample of a request (its number among those about this record, its hash) of a step, in hex digits."""
    return _digest(json.dumps([record_id, step, number, request, sample]).encode())


def request_hash(request: Request, asked_with: Any = None) -> str:
    """Hash what a model is asked: messages, prefix, and the contents of the images and videos, wherever they are.

    A ledger of another model and sampling (`asked_with`) has no response to it. Raises ValueError for a file that is gone.
    """
    files = [[content_hash(one) for one in files] for files in (request.images, request.videos)]
    return _digest(json.dumps([request.messages, request.prefix or "", *files, asked_with], sort_keys=True).encode())


def content_hash(image: Any, *, read: bool = True) -> str:
    """Hash an image or video: the bytes of a file (of all files of a folder), encoded bytes, or the pixels of a PIL image.

    Without `read` only a file's size and times count. Raises ValueError for a file that is gone.
    """
    if isinstance(image, str | os.PathLike):
        try:
            if os.path.isdir(image):
                return _digest("".join(content_hash(one, read=read) for one in sorted(Path(image).iterdir())).encode())
            if read:
                return _digest(Path(image).read_bytes())
            found = os.stat(image)
            return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
        except OSError as error:
            raise ValueError(f"{image}: this file cannot be read ({error.strerror}). Put it back, or fix the path.") from None
    if not read:
        return ""
    if isinstance(image, bytes | bytearray | memoryview):
        return _digest(image)
    return _digest(f"{image.mode}{image.size}".encode() + image.tobytes())


def write_all(file: int, data: bytes) -> None:
    """Write to a file descriptor: with one call, unless the disk is full or a signal comes."""
    while data:
        data = data[os.write(file, data) :]


def json_bytes(value: Any, default: Any = None, *, allow_nan: bool = True) -> bytes:
    """Write a value as JSON in UTF-8. Text with half a character, which UTF-8 lacks, is escaped."""
    text = json.dumps(value, ensure_ascii=False, default=default, allow_nan=allow_nan)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(json.loads(text)).encode()


def json_line(record: Mapping[str, Any], default: Callable[[Any], Any]) -> bytes:
    """A record as a line of JSON. Raises ValueError for what JSON cannot hold: NaN, keys that are no text, other types."""
    try:
        line = json_bytes(record, default, allow_nan=False) + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Record {record['id']!r} cannot be written as JSON: {error}") from None
    inner: list[Any] = [record]
    for value in inner:
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str)]:
                raise ValueError(f"Record {record['id']!r} has the key {wrong[0]!r:.80}, and keys of JSON are text. Make it text.")
            inner += value.values()
        elif isinstance(value, list | tuple):
            inner += value
    return line


def plain(value: Any) -> Any:
    """What JSON lacks, but for images: paths, numbers of numpy, dates, decimal numbers. Raises ValueError for anything else."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, date | Decimal):
        return str(value)
    if getattr(value, "shape", None) == ():
        return value.item()
    raise ValueError(
        f"a record has a {type(value).__name__}, which JSON cannot hold: {value!r:.80}. Leave it out, or make it text."
    )


def digestible(value: Any) -> Any:
    """What stands in the digest for what JSON lacks."""
    return content_hash(value) if isinstance(value, bytes | bytearray | Image) else plain(value)


def copied(value: Any) -> Any:
    """A deep copy of what JSON holds, several times as fast as `copy.deepcopy`, which copies anything else in it.

    >>> copied({"a": [1, {"b": "c"}]})
    {'a': [1, {'b': 'c'}]}
    """
    kind = type(value)
    if kind is dict:
        return {key: copied(one) for key, one in value.items()}
    if kind is list:
        return [copied(one) for one in value]
    return value if kind in (str, int, float, bool, type(None)) else deepcopy(value)


def _digest(data: bytes | bytearray | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=KEY_DIGITS // 2).hexdigest()


class Ledger:
    """A JSONL file of responses that is only appended to. Its index takes 16 bytes a response that was there when it was opened.

    Args:
        path: the file. An unfinished end, which a killed process or a full disk leaves, is `cut` off. Damage elsewhere is refused.
        base: another ledger, whose responses are found too, and which stays as it is; None for none.
        shared: find responses also by the key of their request without a record (`key_of` with ``""``).
    """

    def __init__(self, path: Path, base: Ledger | None = None, *, shared: bool = False) -> None:
        self.path, self.base, self.shared, self.cut, self.kept = path, base, shared, 0, 0
        self.spent: Counter[str] = Counter()
        if base is not None:
            base.close()  # a job may have more of them than files can be open
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._scan()
        except BaseException:
            self.close()
            raise

    def _scan(self) -> None:
        keys, places, end, bad = array("Q"), array("Q"), 0, 0
        with open(self.path, "rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                if _is_whole(line):
                    if bad:
                        raise ValueError(
                            f"{self.path}:{bad}: this line is damaged: its checksum is not that of its text. Delete the line, and "
                            "the same command asks for its response again."
                        )
                    keys.append(int(line[len(_START) : len(_START) + 16], 16))
                    places.append(place)
                    self.kept += keys[-1] != 0
                    if self.shared and keys[-1]:
                        keys.append(int(_without_record(json.loads(line))[:16], 16))
                        places.append(place)
                    self.spent.update(json.loads(line.rpartition(_CHECKSUM)[0].rpartition(_SPENT)[2]))
                    end = place + len(line)
                elif not bad:
                    bad = number
                place += len(line)
        if place > end:
            os.ftruncate(self._file, end)
        self.cut, self._size = place - end, end
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        self._keys, self._places = (np.array(one, np.uint64)[order] for one in (keys, places))

    def get(self, key: str) -> tuple[str, Response] | None:
        """Return the response of a key that was there when the ledger was opened, with its line's own key, or None."""
        start = int(np.searchsorted(self._keys, np.uint64(int(key[:16], 16))))
        while start < len(self._keys) and int(self._keys[start]) == int(key[:16], 16):
            with open(self.path, "rb") as file:
                file.seek(int(self._places[start]))
                line = json.loads(file.readline())
            if line["key"] == key or (self.shared and _without_record(line) == key):
                found = line["response"]
                logprobs = None if found["logprobs"] is None else tuple(found["logprobs"])
                return line["key"], Response(**{**found, "logprobs": logprobs})
            start += 1
        return None if self.base is None else self.base.get(key)

    def append(self, key: str, about: Mapping[str, Any], response: Response | None, spent: Mapping[str, Any]) -> None:
        """Append a response (None with `NO_KEY`) with what its key was made of, and what was `spent` since the one before.

        It survives the end of this process. Raises OSError for a full disk; what was written of the line is removed.
        """
        data = json_bytes({"key": key, **about, "response": response and asdict(response), "spent": spent})[:-1]
        line = data + _CHECKSUM + f'{zlib.crc32(data):08x}"}}\n'.encode()
        try:
            write_all(self._file, line)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise OSError(error.errno, error.strerror, str(self.path)) from None
        self._size += len(line)
        self.kept += response is not None
        self.spent = self.spent + Counter(spent)  # a new one: another thread may be reading

    def sync(self) -> None:
        """Flush the file to disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file, if it is open. Its responses are still found."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1


def requests_in(paths: Iterable[Path]) -> set[str]:
    """Hashes (`request_hash`) of the requests that ledgers have responses to."""
    found = set[str]()
    for path in paths:
        with open(path, "rb") as lines:
            found.update(one["request"] for one in map(json.loads, filter(_is_whole, lines)) if one["response"])
    return found


def _without_record(line: Mapping[str, Any]) -> str:
    return key_of("", line["step"], line["number"], line["request"], line["sample"])


def _is_whole(line: bytes) -> bool:
    body, found, checksum = line.rpartition(_CHECKSUM)
    return bool(found) and line.startswith(_START) and checksum == f'{zlib.crc32(body):08x}"}}\n'.encode()
