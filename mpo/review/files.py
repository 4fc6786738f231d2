"""The records of a file by their number: an index that is built while the first ones are read already."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import threading
from array import array
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from mpo.io import BadRecord, bad_record, parse_json

LINES = (".jsonl", ".ndjson", ".json")
BLOCK = 4 * 2**20
MAX_LINE_BYTES = 64 * 2**20
BLANKS = [*b" \t\r\n\xef"]
INSIDE = ("output.jsonl", "answers.jsonl")
"""What is reviewed of a folder: the output of a pipeline's job, or the answers of an evaluation."""


class Changed(ValueError):
    """The file is not the one that was opened."""


class Records:
    """The records of a JSONL file (also gzip), a JSON array or a Parquet file, or of the folder of a job or an evaluation.

    The index of a JSONL file is built by a thread: a record can be read as soon as the index has reached it. Images and videos stay
    in `image_root`, by default the folder of the file. Raises ValueError for no file, one of another type, and one that is empty.
    """

    def __init__(self, path: str | Path, image_root: str | Path | None = None) -> None:
        given = Path(os.path.expanduser(path))
        inside = [given / name for name in INSIDE if given.is_dir() and (given / name).is_file()]
        self.path = Path(os.path.realpath(inside[0] if inside else given))
        if not self.path.is_file():
            what = "a folder without output.jsonl or answers.jsonl" if given.is_dir() else "not there"
            raise ValueError(f"{given} is {what}. Give one file of records: JSONL, a JSON array or Parquet.")
        self.image_root = Path(os.path.expanduser(image_root) if image_root is not None else self.path.parent)
        if not self.image_root.is_dir():
            raise ValueError(f"--image-root {self.image_root} is not a folder. Give the folder of the images.")
        self.suffix = "".join(self.path.suffixes[-2:] if self.path.suffix == ".gz" else self.path.suffixes[-1:]).lower()
        self.is_array = False
        if self.suffix in (".json", ".json.gz"):
            with suppress(OSError, EOFError), (gzip.open if self.suffix == ".json.gz" else open)(self.path, "rb") as file:
                self.is_array = bytes(file.read(4096)).removeprefix(BOM_UTF8).lstrip()[:1] == b"["
            from mpo.data.mixture_file import has_sources

            if not self.is_array and has_sources(self.path):
                raise ValueError(f"{self.path} lists files of records, and is none. Give one of them.")
        self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115
        self.state = _state(os.fstat(self._file.fileno()))
        self._starts, self._ends = array("Q"), array("Q")
        self._blank: list[int] = []  # the records before which blank lines stand
        self._items: list[Any] = []
        self._rows_of = lru_cache(maxsize=2)(lambda number: [line for _, line in self._shards[number].lines()])
        self._progress, self._hash = threading.Condition(), ""
        self._error: Exception | None = None
        self._done = False
        self.plain = self.suffix in LINES and not self.is_array
        if self.plain:
            threading.Thread(target=self._index, daemon=True).start()
            if self.wait(0) == 0:
                raise ValueError(f"{self.path} is empty. Give a file of records.")
        else:
            self._load()

    def _index(self) -> None:
        import numpy as np

        try:
            digest, start, place = hashlib.blake2b(digest_size=20), 0, 0
            while block := os.pread(self._file.fileno(), BLOCK, place):
                digest.update(block)
                data = np.frombuffer(block, np.uint8)
                starts = np.flatnonzero(data == ord("\n")) + 1
                heads = data[starts[:-1]]
                starts = np.concatenate([[start], starts + place])
                self._add(starts, np.flatnonzero(np.isin(heads, BLANKS)) + 1)
                start, place = int(starts[-1]), place + len(block)
            self._add(np.array([start, place + 1]), ())
            self._hash = digest.hexdigest()
        except Exception as error:  # it is raised where the index is waited for
            self._error = error
        with self._progress:
            self._done = True
            self._progress.notify_all()

    def _add(self, edges: Any, odd: Any) -> None:
        import numpy as np

        starts, ends = edges[:-1], edges[1:] - 1
        if len(starts):
            blank = [at for at in (0, *odd) if self._is_blank(int(starts[at]), int(ends[at]))]
            self._blank += [len(self._starts) + at - before for before, at in enumerate(blank)]
            starts, ends = (np.delete(one, blank).astype(np.uint64) for one in (starts, ends))
        with self._progress:
            self._starts.frombytes(starts.tobytes())
            self._ends.frombytes(ends.tobytes())
            self._progress.notify_all()

    def _is_blank(self, start: int, end: int) -> bool:
        if os.pread(self._file.fileno(), min(end - start, 64), start).removeprefix(BOM_UTF8).strip():
            return False
        return not os.pread(self._file.fileno(), end - start, start).removeprefix(BOM_UTF8).strip()

    def _load(self) -> None:
        from mpo.data.files import open_files
        from mpo.data.shards import DAMAGE, ArrayShard, LinesShard, ParquetShard, damaged, opened

        shards: list[Any] = list(open_files(str(self.path)))
        if not all(isinstance(shard, ArrayShard | LinesShard | ParquetShard) for shard in shards):
            raise ValueError(f"{self.path} is neither JSONL, nor a JSON array, nor Parquet. Convert it first (mpo data convert).")
        self._shards = shards
        if self.suffix == ".parquet":
            self._items = [(number, row) for number, shard in enumerate(self._shards) for row in range(shard.size)]
        elif self.is_array:
            # As text, which takes less memory than what it says.
            self._items = [text.encode() for shard in shards for _, _, text in shard.elements()]
        else:
            try:
                with opened(str(self.path)) as file:
                    self._items = [line for line in file if line.strip() not in (b"", BOM_UTF8)]
            except DAMAGE as error:
                raise damaged(str(self.path), error) from error
        if not self._items:
            raise ValueError(f"{self.path} is empty. Give a file of records.")
        self._hash, self._done = self._content(), True

    def _content(self) -> str:
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=20)).hexdigest()

    def wait(self, place: int | None = None) -> int:
        """Wait until the index has reached a record, or its end (None). Returns the number of records it has."""
        with self._progress:
            self._progress.wait_for(lambda: self._done or (place is not None and len(self._starts) > place))
        if self._error is not None:
            raise self._error
        return len(self._starts) if self.plain else len(self._items)

    @property
    def ready(self) -> bool:
        """Whether the index is complete."""
        return self._done

    def __len__(self) -> int:
        return self.wait()

    @property
    def content(self) -> str:
        """The hash of the file's bytes."""
        self.wait()
        return self._hash

    def check(self) -> None:
        """Raise Changed if the file has another content than when it was opened. Another time alone is none."""
        try:
            state = _state(os.stat(self.path))
        except FileNotFoundError:
            raise Changed(f"{self.path} is gone. Put it back; no decision is lost.") from None
        if state != self.state:
            if self._content() != self.content:
                raise Changed(f"{self.path} has changed since it was opened. Open it again: decisions follow their records.")
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115
            self.state = state

    def raw(self, place: int) -> bytes:
        """The bytes of a line that the index has reached, with its line break if it has one."""
        if not self.plain:
            item = self._items[place]
            return item if isinstance(item, bytes) else b""  # of Parquet
        start, end = self._starts[place], self._ends[place]
        return os.pread(self._file.fileno(), end + 1 - start, start)

    def holding(self, words: Iterable[bytes]) -> set[int]:
        """The lines with any of some bytes in lower case, of a JSONL file; the case of ASCII letters does not matter."""
        found, place, count = set(), 0, self.wait()
        while place < count:
            start, first = self._starts[place], place
            place = max(place + 1, bisect_right(self._starts, start + BLOCK, first))
            text = os.pread(self._file.fileno(), self._ends[place - 1] - start, start).lower()
            for word in words:
                at = text.find(word)
                while at >= 0:
                    one = bisect_right(self._starts, start + at, first) - 1
                    found.add(one)
                    at = text.find(word, self._ends[one] - start)
        return found

    def line(self, place: int) -> dict[str, Any]:
        """A record, parsed. Raises BadRecord for a line that is none, and IndexError beyond the last."""
        if place < 0 or self.wait(place) <= place:
            raise IndexError(place)
        with bad_record(self.where(place)):
            if not self.plain and self.suffix == ".parquet":
                number, row = self._items[place]
                if isinstance(found := self._rows_of(number)[row], BadRecord):
                    raise found
                return dict(found)
            if self.plain and self._ends[place] - self._starts[place] > MAX_LINE_BYTES:
                raise ValueError(f"a line of more than {MAX_LINE_BYTES >> 20} MiB. Write one JSON object per line.")
            found = parse_json(self.raw(place), "the line")
            if not isinstance(found, dict):
                raise ValueError("it is not a JSON object. Write one object per line.")
            return found

    def where(self, place: int) -> str:
        """The name of a record for messages."""
        return f"{self.path}:{place + 1 + bisect_right(self._blank, place)}" if self.plain else f"{self.path}#{place + 1}"

    def find(self, given: Any, kind: str, *, of_job: bool) -> str:
        """The path of an image or a video inside the root; of a job's record, it is relative to its file. ValueError: not there."""
        from mpo.data.paths import inside

        path = os.path.join(self.path.parent, given) if of_job and isinstance(given, str) else given
        return inside(self.image_root, path, kind, setting="--image-root")


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def plain(value: Any) -> Any:
    """A value as JSON has it, for what Parquet holds besides: bytes by their number, dates as text."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, bytes | bytearray):
        return f"{len(value):,} bytes"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)
