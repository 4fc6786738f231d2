"""What the records of a file are filtered and ordered by, read by a thread while the first ones are reviewed."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Mapping
from typing import Any

from mpo.io import BadRecord
from mpo.review.documents import SOURCES, TYPES, read_line, shaped
from mpo.review.files import Records
from mpo.review.log import Log

ORDERS = ("file", "random", "hardest", "longest")
STATES = ("all", "unreviewed", "reviewed", "accept", "swap", "edit", "reject", "skip", "disagreeing")
NAMES = ("source", "verdict", "type")
BAD = "cannot be read"
"""Verdict of a line that is no record."""
FIRST_SECONDS = 5
"""For so long at most the reading waits until the first record is shown (`Facets.begin`), which it would slow down."""
MOST = 200
"""Number of values of a facet that are listed."""


class Facets:
    """Source, verdict, type, length and difficulty of every record; complete when `wait` returns."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.counts: dict[str, list[tuple[str, int]]] = {}
        self._rows: list[tuple[str, str, str, float, int]] = []  # of `NAMES`, how hard, and the length
        self._done, self.begin = threading.Event(), threading.Event()
        self._stopped = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        self.begin.wait(FIRST_SECONDS)
        try:
            for place in range(len(self.records)):
                if self._stopped:
                    return
                source, verdict, kind, hard, length = "", BAD, "", 0.0, 0
                try:
                    if self.records.plain:  # duplicate keys are refused where a record is read
                        raw = self.records.raw(place)
                        line, length = json.loads(raw), len(raw)
                    else:
                        line = self.records.line(place)
                        length = sum(len(str(part.get("text", part.get("value")))) for part in read_line(line).texts())
                    if isinstance(line, Mapping):
                        source, verdict, kind, hard = facets(line)
                except (ValueError, RecursionError):
                    pass
                self._rows.append((sys.intern(source), sys.intern(verdict), sys.intern(kind), hard, length))
        finally:
            self.counts = self._counted()
            self._done.set()
        from mpo.data import records  # noqa: F401  its imports take a second, which the first edit need not wait for

    @property
    def ready(self) -> bool:
        """Whether every record is read."""
        return self._done.is_set()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True

    def wait(self) -> None:
        """Wait until every record is read. Raises ValueError if the file was opened anew meanwhile."""
        self.begin.set()
        self._done.wait()
        if self._stopped:
            raise ValueError("The file was reloaded. Filter again.")

    def _counted(self) -> dict[str, list[tuple[str, int]]]:
        """The values of each facet with their numbers of records, the most frequent first; one that tells nothing is left out."""
        found = {}
        for at, name in enumerate(NAMES):
            counted = Counter(str(row[at]) for row in self._rows)
            if len(counted) > 1 or any(counted):
                found[name] = counted.most_common(MOST)
        return found

    def queue(self, asked: Mapping[str, str], log: Log, by: str, seed: str) -> array[int]:
        """The places of the records that are asked for, in order.

        `asked` has ``source``, ``verdict``, ``type``, ``state`` (of `STATES`), ``search`` and ``order`` (of `ORDERS`). ``state``
        means the decisions of the reviewer; ``disagreeing``: that differ from others' and that nothing has settled.
        """
        order, state = asked.get("order") or "file", asked.get("state") or "all"
        if order not in ORDERS or state not in STATES:
            raise ValueError(f"Expected an order of {', '.join(ORDERS)} and a state of {', '.join(STATES)}; got {order}, {state}.")
        chosen: Any = range(len(self.records))
        wanted = {at: asked[name] for at, name in enumerate(NAMES) if asked.get(name) is not None}
        if wanted or order in ("hardest", "longest"):
            self.wait()
        for at, value in wanted.items():
            chosen = [place for place in chosen if self._rows[place][at] == value]
        if state == "disagreeing":
            there = {place for place, own in log.labels().items() if by in own and log.final(place, own) is None}
            chosen = [place for place in chosen if place in there]
        elif state != "all":
            chosen = [place for place in chosen if _is(state, log.decision(by, place))]
        if asked.get("search"):
            chosen = self._search(chosen, asked["search"])
        if order == "random":
            chosen = list(chosen)
            random.Random(seed).shuffle(chosen)
        elif order != "file":
            at = 3 if order == "hardest" else 4
            chosen = sorted(chosen, key=lambda place: -float(self._rows[place][at]))
        return array("L", chosen)

    def _search(self, places: Any, text: str) -> list[int]:
        """The records with a text in what is shown of them, or in their id; the case of letters does not matter."""
        wanted = text.casefold()
        if self.records.plain and all(one.isascii() or one.lower() == one.upper() for one in text):
            # A line that lacks the text as JSON writes it, in either way, is not parsed.
            as_json = {
                json.dumps(text.lower(), ensure_ascii=ascii)[1:-1].lower().encode("utf-8", "replace") for ascii in (True, False)
            }
            there = self.records.holding(as_json)
            places = [place for place in places if place in there]
        found = []
        for place in places:
            try:
                document = read_line(self.records.line(place))
            except BadRecord:
                continue
            said = [document.id, *(str(part.get("text", part.get("value"))) for part in document.texts())]
            if any(wanted in one.casefold() for one in (*said, json.dumps(document.about, default=str, ensure_ascii=False))):
                found.append(place)
        return found


def _is(state: str, event: Mapping[str, Any] | None) -> bool:
    if event is None or state in ("unreviewed", "reviewed"):
        return (state == "unreviewed") == (event is None)
    return state == event["action"] or (state == "edit" and bool(event["edits"]))


def key_of(records: Records, place: int) -> str:
    """Identify a record by its content, and a line that is none, which can be rejected, by its bytes."""
    try:
        return read_line(records.line(place)).key()
    except BadRecord:
        return hashlib.blake2b(records.raw(place), digest_size=12).hexdigest()


def keys(records: Records) -> dict[str, list[int]]:
    """The places of each record's key."""
    found: dict[str, list[int]] = {}
    for place in range(len(records)):
        found.setdefault(key_of(records, place), []).append(place)
    return found


@shaped()
def facets(line: Mapping[str, Any]) -> tuple[str, str, str, float]:
    """The source, verdict and type of a line, and how hard it is, from 0 to 1.

    The last is the fraction of wrong responses; for a pair with a margin, less for a larger one; 0 where nothing is known.
    """
    inner = line.get("metadata")
    inner = inner if isinstance(inner, Mapping) else {}
    places = (line, inner)
    source = next((str(own[name]) for own in places for name in SOURCES if own.get(name)), "")
    kind = next((str(own[name]) for own in places for name in TYPES if isinstance(own.get(name), str) and own[name]), "")
    accuracy, margin = line.get("accuracy", inner.get("accuracy")), line.get("margin")
    verdict = ""
    responses = line.get("responses")
    if isinstance(responses, list) and responses and any(isinstance(one, Mapping) and one.get("verdict") for one in responses):
        right = sum(isinstance(one, Mapping) and one.get("verdict") == "correct" for one in responses)
        verdict = "all right" if right == len(responses) else "mixed" if right else "all wrong"
        accuracy = right / len(responses)
    elif isinstance(line.get("greedy"), list):
        scores = [float(one.get("score") or 0) for one in line["greedy"] if isinstance(one, Mapping)]
        verdict = "dropped" if not scores else "right" if min(scores) == 1 else "wrong" if max(scores) == 0 else "partly right"
        accuracy = sum(scores) / len(scores) if scores else None
    elif isinstance(line.get("rejected_meta"), Mapping):
        verdict = str(line["rejected_meta"].get("verdict") or line["rejected_meta"].get("negative") or "")
    if isinstance(accuracy, int | float) and not isinstance(accuracy, bool):
        return source, verdict, kind, 1.0 - float(accuracy)
    if isinstance(margin, int | float) and not isinstance(margin, bool):
        return source, verdict, kind, 1 / (1 + abs(float(margin)))
    return source, verdict, kind, 0.0
