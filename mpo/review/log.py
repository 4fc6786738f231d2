"""The log of a review: a JSONL file that only grows, each decision on disk before anyone is told that it is saved."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mpo.io import BadRecord, flush, json_kind, parse_json

Event = dict[str, Any]
ACTIONS = ("accept", "swap", "reject", "skip")
FIELDS: dict[str, dict[str, type]] = dict.fromkeys(ACTIONS, {"place": int, "key": str, "edits": list})
FIELDS |= {"undo": {"undoes": str}, "file": {"content": str, "seed": str}}
VERSION = 1
SUM = b', "sum": "'  # before the checksum of a line, which ends it; older versions wrote none
GONE = -1
"""Place of a decision whose record the file does not have any more."""


class InUse(ValueError):
    """Another process reviews the file."""


class NotSaved(OSError):
    """What the disk did not take; the log is as before."""


def log_of(path: Path) -> Path:
    """The log of a file."""
    return path.with_name(f"{path.name}.review.jsonl")


def read_events(path: Path) -> tuple[list[Event], int]:
    """Read a log: its events, and the number of bytes of what is whole.

    A last line that is not whole was being written when its process was killed, or the disk was full: nobody was told that it is
    saved, and it does not count.

    Raises:
        BadRecord: for any other line that is no event, and for one that is missing: nothing of a damaged log is guessed.
    """
    events: list[Event] = []
    if not path.is_file():
        raise ValueError(f"{path} is no regular file. Remove it, or give the log of a review.")
    size, data = 0, path.read_bytes()
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            event = parse_json(line, "the line")
            if not isinstance(event, dict):
                raise ValueError(f"expected an object, got {json_kind(event)}.")
            _check(event)
            head, mark, _ = line.rpartition(SUM)
            if mark and event.pop("sum", "") != f"{zlib.crc32(head):08x}":
                raise ValueError("its text has changed since it was written (checksum).")
            if event["n"] != len(events):
                raise ValueError(f"it is event {event['n']} where {len(events)} is expected: lines are missing or were moved.")
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            reason = error.reason if isinstance(error, BadRecord) else str(error)
            raise BadRecord(f"{path}:{number}", f"{reason} mpo review has not written this line. Restore the log.") from None
        if not line.endswith(b"\n"):
            break
        events.append(event)
        size += len(line)
    if events and events[0].get("action") != "file":
        raise BadRecord(f"{path}:1", "a log of mpo review begins with the name of its file. Give the log of a review.")
    return events, size


def hold(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a file and hold it until it is closed. Raises InUse while another process does."""
    file = os.open(path, flags, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if flags == os.O_RDONLY and not isinstance(error, BlockingIOError):
            return file  # NFS locks none that is only read
        os.close(file)
        told = "Use its page, or stop it; several people can share one (--reviewer, once for each)."
        raise InUse(f"{path} is in use: another mpo review has this file open. {told}") from None
    return file


def _check(event: Event) -> None:
    own = FIELDS.get(str(event.get("action")))
    if own is None:
        raise ValueError(f"unknown action {event.get('action')!r:.40}.")
    for name, kind in {"action": str, "uid": str, "by": str, "n": int, **own}.items():
        if not isinstance(event.get(name), kind) or isinstance(event.get(name), bool):
            raise ValueError(f"{name!r} is {json_kind(event.get(name))}.")
    for edit in event.get("edits", ()):
        paths = edit.get("paths") if isinstance(edit, dict) else None
        if (
            not isinstance(paths, list)
            or not all(isinstance(one, list) and one for one in paths)
            or not {"old", "value"} <= {*edit}
        ):
            raise ValueError("an edit has no paths, or no old and new value.")


class Log:
    """The decisions of a file's reviewers. The `owner` holds the log and writes to it.

    Raises:
        InUse: if another process holds it.
        BadRecord: as `read_events`.
        NotSaved: where the log cannot be written.
    """

    def __init__(self, path: Path, *, owner: bool = False) -> None:
        self.path, self.mutex = path, threading.RLock()
        self.recovered, self._size, self._file = 0, 0, -1
        self.lost: list[Event] = []
        self.events: list[Event] = self._open(path) if owner else read_events(path)[0] if path.exists() else []
        self._by_uid = {event["uid"]: event for event in self.events}
        self._settle()

    def _open(self, path: Path) -> list[Event]:
        try:
            self._file = hold(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        except OSError as error:
            raise NotSaved(
                error.errno, f"{path} cannot be written ({error.strerror}): reviews are kept next to their file"
            ) from None
        events, self._size = read_events(path)
        self.recovered = os.fstat(self._file).st_size - self._size
        if self.recovered:
            os.ftruncate(self._file, self._size)
            os.fsync(self._file)
        flush(path.parent)
        return events

    def close(self) -> None:
        """Let the log go."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _settle(self) -> None:
        self.stacks: dict[str, list[Event]] = {}
        self._own: dict[tuple[str, int], list[Event]] = {}
        self._settled: dict[int, list[Event]] = {}
        self._told: set[tuple[str, int]] = set()
        for event in self.events:
            self._count(event)

    def _count(self, event: Event) -> None:
        if event["action"] == "undo":
            undone = self._by_uid.get(event["undoes"])
            stack = self.stacks.get(event["by"], [])
            if undone is None or not stack or stack[-1] is not undone:
                return
            stack.pop()
            self._like(undone).remove(undone)
        elif event["action"] in ACTIONS:
            self.stacks.setdefault(event["by"], []).append(event)
            self._like(event).append(event)
            labels = self.labels_of(event["place"]) if event["place"] != GONE else {}
            if event.get("settle") or len(labels) > 1 and not all(same(event, one) for one in labels.values()):
                self._told |= {(by, event["place"]) for by in labels}

    def _like(self, event: Event) -> list[Event]:
        place = event["place"]
        return self._settled.setdefault(place, []) if event.get("settle") else self._own.setdefault((event["by"], place), [])

    def append(self, **event: Any) -> Event:
        """Add an event, which is on disk when this returns.

        Raises:
            NotSaved: for a full disk, or any other error of it: the log is as before.
        """
        with self.mutex:
            known = self._by_uid.get(event.get("uid", ""))
            if known is not None:  # asked again, as its answer was lost
                return known
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            event = {"n": len(self.events), "uid": secrets.token_hex(8), "at": now, "by": "", **event}
            if (event["by"], event.get("place")) in self._told and event["action"] in ACTIONS and "of" not in event:
                event["informed"] = True  # of what others decided
            _check(event)
            if self._file >= 0:
                data = json.dumps(event)[:-1].encode()  # in ASCII, which holds any text
                self._write(data + SUM + b'%08x"}\n' % zlib.crc32(data))
            self.events.append(event)
            self._by_uid[event["uid"]] = event
            self._count(event)
            return event

    def _write(self, data: bytes) -> None:
        if not self.path.exists() or os.stat(self.path).st_ino != os.fstat(self._file).st_ino:
            raise NotSaved(errno.ENOENT, f"{self.path} was removed or replaced while it was open. Restart mpo review")
        try:
            os.ftruncate(self._file, self._size)  # half a line that an error has left: nothing may follow it
            left = data
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise NotSaved(error.errno, f"{self.path} was not written ({error.strerror}). Make room, and try again") from error
        self._size += len(data)

    # What holds

    def fits(self, state: Sequence[int]) -> bool:
        """Whether places are surely those of a file with this state: nothing else was ever reviewed, or nothing at all."""
        files = [event for event in self.events if event["action"] == "file"]
        return not self.events or (len({event["content"] for event in files}) == 1 and files[-1].get("state") == [*state])

    def open_file(self, content: str, name: str, keys: Callable[[], Mapping[str, list[int]]], state: Sequence[int] = ()) -> int:
        """Begin with a file: note the hash of its content, and let decisions about another content follow their records.

        `keys` gives the places of each key of its records; `state` has numbers that change when the file is written to, by which it
        is known again before it is read. Returns the number of decisions whose record it has no more; they stay in the log.
        """
        with self.mutex:
            last = next((event for event in reversed(self.events) if event["action"] == "file"), None)
            if {event["content"] for event in self.events if event["action"] == "file"} - {content}:
                self._follow(content, keys())
                self._settle()
            if last is None or last["content"] != content or last.get("state", []) != [*state]:
                seed = last["seed"] if last else secrets.token_hex(8)
                self.append(action="file", version=VERSION, file=name, content=content, seed=seed, state=[*state])
            return sum(event["place"] == GONE for stack in self.stacks.values() for event in stack)

    def _eras(self) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {}
        era: list[Event] = []
        for event in self.events:
            if event["action"] == "file":
                era = found.setdefault(event["content"], [])
            elif event["action"] in ACTIONS:
                era.append(event)
        return found

    def _follow(self, content: str, places: Mapping[str, list[int]]) -> None:
        for about, events in self._eras().items():
            if about == content:
                for event in events:
                    event["place"] = _placed(event)
                continue
            now = _matched(events, places)
            for event in events:
                event.setdefault("placed", event["place"])  # in the file as it was; not in the log
                event["place"] = now[event["key"], event["placed"]]

    def by_content(self) -> Log:
        """Let places be numbers of contents instead, which are the same for every content that the file has had."""
        eras = [*self._eras().values()]
        ranked = [
            {(key, place): (key, rank) for key, before in _places_of(events).items() for rank, place in enumerate(before)}
            for events in eras
        ]
        numbers = {one: number for number, one in enumerate(sorted({one for own in ranked for one in own.values()}))}
        for events, own in zip(eras, ranked, strict=True):
            for event in events:
                event.setdefault("placed", event["place"])
                event["place"] = numbers[own[event["key"], event["placed"]]]
        self._settle()
        return self

    @property
    def seed(self) -> str:
        """What decides on which side the chosen completion of a record stands."""
        return next((str(event["seed"]) for event in self.events if event["action"] == "file"), "")

    def decision(self, by: str, place: int) -> Event | None:
        """The decision of a reviewer on a record that holds; None without one."""
        return next(reversed(self._own.get((by, place), ())), None)

    def known(self, uid: str) -> Event | None:
        """The event with a number; None without one."""
        return self._by_uid.get(uid)

    def labels_of(self, place: int) -> dict[str, Event]:
        """The decisions that hold on a record, but for skipping it, by reviewer."""
        found = {by: event for by in sorted(self.stacks) if (event := self.decision(by, place))}
        return {by: event for by, event in found.items() if event["action"] != "skip"}

    def settled(self, place: int) -> Event | None:
        """The decision that settled a disagreement; None without one."""
        return next(reversed(self._settled.get(place, ())), None)

    def labels(self, *, blind: bool = False) -> dict[int, dict[str, Event]]:
        """The decisions that hold, but for skipped records, by place and reviewer.

        With `blind` the last ones instead, undone or not, that were made before others' decisions were told.
        """
        own: Mapping[tuple[str, int], list[Event]] = self._own
        if blind:
            made: dict[tuple[str, int], list[Event]] = {}
            undone = {event["undoes"] for event in self.events if event["action"] == "undo"}
            for event in self.events:
                key = (event["by"], event.get("place", GONE))
                if event["action"] in ACTIONS and not (event.get("settle") or event.get("informed")):
                    if event["uid"] not in undone or key in self._told:
                        made.setdefault(key, []).append(event)
            own = made
        found: dict[int, dict[str, Event]] = {}
        for (by, place), events in list(own.items()):
            if events and events[-1]["action"] != "skip" and place != GONE:
                found.setdefault(place, {})[by] = events[-1]
        return found

    def final(self, place: int, labels: Mapping[str, Event]) -> Event | None:
        """What becomes of a record: the decision that settled it, or the one that all reviewers made; None for a disagreement."""
        if (settled := self.settled(place)) is not None:
            return settled
        found = list(labels.values())
        return found[-1] if found and all(same(found[0], one) for one in found) else None

    def take(self, other: Log, places: Mapping[str, list[int]], of: str) -> None:
        """Add the decisions that hold in another log, named `of`, of this file (with the places of its keys) or of a copy.

        Those whose record this file does not have are in `lost`.
        """
        events = sorted((event for stack in other.stacks.values() for event in stack), key=lambda event: str(event.get("at")))
        uids = {event["uid"] for event in self.events}
        now = _matched(events, places)
        for event in events:
            if event["uid"] in uids:
                continue
            place = now[event["key"], _placed(event)]
            if place == GONE:
                self.lost.append({**event, "place": GONE})
            newer = self.decision(event["by"], place)
            if place == GONE or (newer and not event.get("settle") and str(newer.get("at")) > str(event.get("at"))):
                continue
            kept = {name: value for name, value in event.items() if name not in ("n", "place", "placed")}
            self.append(**kept, place=place, of=of)


def _placed(event: Event) -> int:
    return int(event["placed"] if "placed" in event else event["place"])


def _matched(events: Iterable[Event], places: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], int]:
    """Where the records of decisions are in another file, by their keys and places before; no two are in one place.

    Of equal records, if there are more than were decided on, one whose place has its content yet keeps its decision.
    """
    now = {}
    for key, before in _places_of(events).items():
        there = places.get(key, ())
        free = (place for place in there if place not in before)
        for rank, place in enumerate(before):
            now[key, place] = there[rank] if len(before) == len(there) else place if place in there else next(free, GONE)
    return now


def _places_of(events: Iterable[Event]) -> dict[str, list[int]]:
    found: dict[str, set[int]] = {}
    for event in events:
        found.setdefault(event["key"], set()).add(_placed(event))
    return {key: sorted(places) for key, places in found.items()}


def same(one: Event, other: Event) -> bool:
    """Whether two decisions make the same of a record."""
    mine, yours = (
        {json.dumps([edit["paths"], edit["value"]]) for edit in event["edits"]} if event["action"] != "reject" else set()
        for event in (one, other)
    )
    return one["action"] == other["action"] and mine == yours


def label(event: Event) -> str:
    """The label of a decision, of those that agreement is measured over."""
    return "edit" if event["action"] == "accept" and event["edits"] else str(event["action"])
