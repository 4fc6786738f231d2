"""A range of a job's records in a folder of its own: its ledger, its output so far, and how far it is."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image

from mpo.io import BadRecord, atomic_write, read_json_object, write_text
from mpo.pipelines.flow import Flow, Record, Result, log
from mpo.pipelines.ledger import Ledger, content_hash, json_line, plain, write_all
from mpo.pipelines.report import count_reason
from mpo.pipelines.step import Step

LEDGER, OUTPUT, DROPPED, USED, PROGRESS = "ledger.jsonl", "output.jsonl", "dropped.jsonl", ".job.used", "progress.json"
FILES = (OUTPUT, DROPPED, USED)
"""Of each part; the last one has the first 64 bits of the key of each response that was used."""
LEDGERS = "ledger*.jsonl"
Show = Callable[[dict[str, Any]], None]
SHARDS = "shards"
"""Folder of the parts of a job that has several."""
SYNC_SECONDS = 0.5
"""Between two flushes to disk: what a power failure can cost."""
_EMPTY: dict[str, Any] = {"records": 0, "sizes": [0, 0, 0], "digests": ["", "", ""], "counts": {}, "spent": {}}


class InUse(BlockingIOError):
    """Another process holds what is to be worked on."""


@contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold what a name says of a folder, which is created; it is free again when this process ends, however it ends.

    Raises InUse if another process holds it, naming that.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder} is a file, or lies in one. Give the path of a folder.") from None
    lock, owner = FileLock(folder / f".{name}.lock"), folder / f".{name}.owner"
    try:
        lock.acquire(blocking=False)
    except Timeout:
        who = owner.read_text() if owner.is_file() else "another process"
        raise InUse(f"{folder} is in use by {who}. Wait for it, stop it, or give another folder.") from None
    try:
        write_text(owner, f"process {os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


class Part:
    """A range of records (`size` of them). Its files are a function of the records, the steps and the responses.

    In the folder `images` of the job are encoded images of records, which JSON cannot hold. The `last` part counts what was spent
    before the job had several.
    """

    def __init__(self, folder: Path, size: int, images: Path, *, last: bool = False) -> None:
        self.folder, self.size, self.images, self.last = folder, size, images, last

    def progress(self) -> dict[str, Any]:
        """How far it is: numbers of finished records and bytes, ``counts`` (`mpo.pipelines.report`), what was ``spent``, and
        how many responses are ``kept``.
        """
        try:
            found = read_json_object(self.folder / PROGRESS)
            if found.pop("checksum", None) == _digest(json.dumps(found).encode()).hexdigest() and len(found["sizes"]) == len(FILES):
                return found
        except (FileNotFoundError, BadRecord):
            pass
        return {**_EMPTY}  # everything follows from the ledger

    @property
    def finished(self) -> bool:
        """Whether all its records are."""
        return bool(self.progress()["records"] == self.size)

    def check(self) -> None:
        """Have the output made again if it is not what was written: cut, edited or gone."""
        now = self.progress()
        for name, size, digest in zip(FILES, now["sizes"], now["digests"], strict=True):
            path = self.folder / name
            length = path.stat().st_size if path.is_file() else 0
            whole = length == size if now["records"] == self.size else length >= size
            if now["records"] and not (whole and path.is_file() and _digest_of(path, size).hexdigest() == digest):
                log.warning("%s is not what was written; it is made again from the ledger", path)
                self.forget()

    def used(self) -> array[int]:
        """The first 64 bits of the key of each response in the ledger that its records have used."""
        return array("Q", (self.folder / USED).read_bytes())

    def forget(self, *, share: bool = False) -> None:
        """Have all records go through the steps again, with the responses of the ledger, which other parts may `share`."""
        (self.folder / PROGRESS).unlink(missing_ok=True)
        job = self.images.parent
        if share and self.folder != job and (self.folder / LEDGER).is_file():
            with locked(self.folder, "part"):
                (self.folder / LEDGER).rename(job / f"ledger-{len([*job.glob(LEDGERS)])}.jsonl")

    def run(
        self,
        steps: Sequence[Step],
        records: Iterable[Record],
        *,
        asked_with: Mapping[str, Any],
        base: Ledger | None,
        shared: bool,
        concurrency: int | None,
        max_failures: int,
        proven: Callable[[], bool],
        show: Show,
    ) -> None:
        """Send the records that are left through the steps. Arguments and errors are those of `Flow` and `Job.run`, and:

        Args:
            records: the records of this part, from its first one.
            base: `base_ledger` of the job, if it has several parts.
            shared: responses to the same requests about other records are taken.
            max_failures: how many records may fail before any succeeds.
            proven: whether records of another part have succeeded.
            show: called with the progress as it grows.
        """
        with locked(self.folder, "part"):
            if self.finished:
                return
            ledger = Ledger(self.folder / LEDGER, base, shared=shared)
            while base is not None and self.last:
                ledger.spent, ledger.kept, base = ledger.spent + base.spent, ledger.kept + base.kept, base.base
            if ledger.cut:
                log.warning("%s: an unfinished line of %d bytes at its end was cut off", ledger.path, ledger.cut)
            with _Writing(self, ledger, max_failures, proven, show) as writing:
                flow = Flow(steps, ledger=ledger, asked_with=asked_with, concurrency=concurrency)
                flow.run((record for place, record in enumerate(records) if place >= writing.done), writing.emit)
                writing.end()


def base_ledger(job: Path, *, shared: bool) -> Ledger | None:
    """The responses of a job from when it had other parts; None if it had none. All its parts may use it, one after another."""
    base = None
    for path in sorted(job.glob(LEDGERS)):
        base = Ledger(path, base, shared=shared)
    if base is not None:
        base.close()
    return base


def total(parts: Iterable[Mapping[str, Any]]) -> tuple[Counter[str], Counter[str]]:
    """Add up the counts of parts, and what was spent on them."""
    counts, spent = Counter[str](), Counter[str]()
    for part in parts:
        counts.update(part["counts"])
        spent.update(part["spent"])
    return counts, spent


class _Writing:
    """The files of a part that is being worked on, flushed to disk from a thread of its own."""

    def __init__(self, part: Part, ledger: Ledger, max_failures: int, proven: Callable[[], bool], show: Show) -> None:
        self._part, self._ledger = part, ledger
        self._max_failures, self._proven, self._show = max_failures, proven, show
        paths = [part.folder / name for name in FILES]
        self._files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644) for path in paths]
        part.check()
        before = part.progress()
        self._sizes = list(before["sizes"])
        self._digests = [_digest_of(path, size) for path, size in zip(paths, self._sizes, strict=True)]
        for file, size in zip(self._files, self._sizes, strict=True):
            os.ftruncate(file, size)
        self.done: int = before["records"]
        self._counts: Counter[str] = Counter(before["counts"])
        self._waiting: list[Result] = []
        self._lock, self._ending = threading.Lock(), threading.Event()
        self._error: OSError | None = None
        self._written: str | None = None
        self._thread = threading.Thread(target=self._sync_always, daemon=True)

    def __enter__(self) -> _Writing:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._ending.set()
        self._thread.join()
        try:
            with suppress(*[OSError] if kind else []):  # it has its error already
                self._sync()
            self._show(self._progress())
        finally:
            for file in self._files:
                os.close(file)
            self._ledger.close()

    def emit(self, result: Result) -> None:
        """Write a result; failures before the first success wait for it."""
        if self._error is not None:
            raise self._error
        self._waiting.append(result)
        if not result.failed or self.done:
            self._write_waiting()
        elif len(self._waiting) >= self._max_failures:
            self.end()

    def end(self) -> None:
        """Write the failures that wait, or refuse a part in which everything fails."""
        if self._waiting and not self._proven():
            first = self._waiting[0].dropped[0]
            raise ValueError(
                f"The first {len(self._waiting)} records all fail, so that the job stops; {first['id']!r}: {first['reason']} "
                "Fix the cause, and run the same command to continue."
            )
        self._write_waiting()

    def _write_waiting(self) -> None:
        while self._waiting:
            self._write(self._waiting.pop(0))

    def _write(self, result: Result) -> None:
        for one in result.dropped:
            count_reason(result.counts, one["step"], one["reason"])
        lines = [b"".join(json_line(one, self._plain) for one in records) for records in (result.outputs, result.dropped)]
        lines.append(array("Q", result.used).tobytes())
        for file, data in zip(self._files, lines, strict=True):
            write_all(file, data)
        with self._lock:
            self._sizes = [size + len(data) for size, data in zip(self._sizes, lines, strict=True)]
            for digest, data in zip(self._digests, lines, strict=True):
                digest.update(data)
            self._counts.update(result.counts)
            self.done += 1

    def _progress(self) -> dict[str, Any]:
        with self._lock:
            digests = [digest.hexdigest() for digest in self._digests]
            now = {"records": self.done, "sizes": [*self._sizes], "digests": digests, "counts": {**self._counts}}
            return {**now, "spent": {**self._ledger.spent}, "kept": self._ledger.kept}

    def _sync_always(self) -> None:
        while not self._ending.wait(SYNC_SECONDS):
            try:
                self._sync()
            except OSError as error:
                self._error = error
                return
            self._show(self._progress())

    def _sync(self) -> None:
        self._ledger.sync()
        now = self._progress()
        text = json.dumps({**now, "checksum": _digest(json.dumps(now).encode()).hexdigest()})
        if text != self._written:
            for file in self._files:
                os.fsync(file)
            write_text(self._part.folder / PROGRESS, text, durable=True)
            self._written = text

    def _plain(self, value: Any) -> Any:
        if isinstance(value, Image.Image):
            png = BytesIO()
            value.save(png, format="PNG")
            value = png.getvalue()
        if isinstance(value, bytes | bytearray | memoryview):
            path = self._part.images / f"{content_hash(value)}.{_ending(value)}"
            if not path.exists():
                with atomic_write(path, "wb") as file:
                    file.write(value)
            return f"{path.parent.name}/{path.name}"
        return plain(value)


def _ending(data: Any) -> str:
    try:
        with Image.open(BytesIO(data)) as image:
            return "jpg" if image.format in ("JPEG", "MPO") else str(image.format).lower()
    except OSError:
        return "bin"


_digest = partial(hashlib.blake2b, digest_size=16)


def _digest_of(path: Path, size: int) -> Any:
    digest = _digest()
    with open(path, "rb") as file:
        while size > 0 and (block := file.read(min(size, 2**20))):
            digest.update(block)
            size -= len(block)
    return digest
