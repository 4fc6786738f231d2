"""A file under review: what the page shows of its records, and the decisions on them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from mpo.io import BadRecord, read_json_lines
from mpo.review.agreement import rows, summary
from mpo.review.corrections import corrected, new_value, opened, refused
from mpo.review.documents import Document, at, read_line
from mpo.review.facets import Facets, key_of
from mpo.review.files import Records, plain
from mpo.review.log import ACTIONS, Event, Log, hold, label, log_of

MAX_EDITS = 1000
MAX_SIDE = 4096
"""Maximum pixels of a side of an image that has to be converted for the page."""
FRAMES = 16
"""Maximum number of frames of a video."""


class Refused(Exception):
    """A request that is not done: its status, and what to tell."""

    def __init__(self, status: int, reason: str, **more: Any) -> None:
        super().__init__(reason)
        self.status, self.reason, self.more = status, reason, more


class Review:
    """A file under review, each of its reviewers with a token; `others` are logs whose decisions are added."""

    def __init__(
        self, path: str | Path, *, image_root: str | Path | None = None, reviewers: Sequence[str], others: Sequence[Path] = ()
    ) -> None:
        self._given = path, image_root
        self.records = Records(path, image_root)
        self._held = os.fdopen(hold(self.records.path))  # which may have other names, and a log at each
        self.log = Log(log_of(self.records.path), owner=True)
        self.tokens = {secrets.token_urlsafe(24): name for name in reviewers}
        self.facets = Facets(self.records)
        self.lost = 0
        self._questions: dict[Path, dict[str, Any]] = {}
        self._ready, self._failed = threading.Event(), ""
        self._shows = self.log.fits(self.records.state)  # what is decided is known before the whole file is read
        self._write = threading.Lock()
        self.document = lru_cache(maxsize=32)(self._document)
        if others:
            self._open(others)
            if self._failed:
                raise ValueError(self._failed)
        else:
            threading.Thread(target=self._open, args=((),), daemon=True).start()

    def _open(self, others: Sequence[Path]) -> None:
        try:
            self.lost = opened(self.records, self.log, others)
        except (ValueError, OSError) as error:
            self._failed = str(error)
        self._ready.set()

    def close(self) -> None:
        """End its threads, and let the log go."""
        self.facets.stop()
        self._ready.wait()
        self._held.close()
        self.log.close()

    def ready(self, *, to_show: bool = False) -> None:
        """Wait until the log is at the places that records have now."""
        if to_show and self._shows and not self._failed:
            return
        self._ready.wait()
        if self._failed:
            raise Refused(409, self._failed)

    def reload(self) -> None:
        """Open the file as it is now; decisions follow their records."""
        self._ready.wait()
        with self._write:
            records = Records(*self._given)
            lost = opened(records, self.log)
            self.facets.stop()
            self.records, self.lost, self.facets, self._failed = records, lost, Facets(records), ""
            self.document.cache_clear()
            self._held.close()
            self._held = os.fdopen(hold(records.path))

    # What the page asks for

    def _document(self, place: int) -> tuple[dict[str, Any], Document, str]:
        line = self.records.line(place)
        document = read_line(line)
        key = document.key()
        if document.kind == "answers":
            self._add_question(line, document)
        return line, document, key

    def _add_question(self, line: Mapping[str, Any], document: Document) -> None:
        # Named as in mpo.evaluation.run, whose imports take seconds.
        given = (str(line.get(name)) for name in ("model", "benchmark", "mode"))
        names = [re.sub(r"[^\w.@-]+", "-", name).strip("-.") or "-" for name in given]
        output = self.records.path.parent.joinpath("jobs", *names, "output.jsonl")
        if output not in self._questions:
            self._questions[output] = {one["id"]: one for one in read_json_lines(output)} if output.is_file() else {}
        asked = read_line({"responses": [], **self._questions[output].get(document.id, {})})
        for own in asked.files.values():
            own[:] = [os.path.join(output.parent, one) if isinstance(one, str) else one for one in own]
        for part in (part for turn in asked.turns for part in turn["parts"]):
            part["paths"] = []  # it is not this record's
        document.turns, document.files = asked.turns, asked.files

    def state(self, by: str) -> dict[str, Any]:
        """The file, the reviewer, and how far both are."""
        stack = self.log.stacks.get(by) or [{}]
        decided = len({event["place"] for event in self.log.stacks.get(by, ()) if event["place"] >= 0})
        return {
            "file": self.records.path.name,
            "reviewer": by,
            "records": self.records.wait(0),
            "counted": self.records.ready,
            "facets": self.facets.counts if self.facets.ready else None,
            "undo": stack[-1].get("uid"),
            "decided": decided,
            "unmatched": self.lost,
        }

    def view(self, place: int, by: str) -> dict[str, Any]:
        """A record as the page shows it to a reviewer. Where others differ is told after deciding, too."""
        self.ready(to_show=True)
        self.records.check()
        try:
            _, document, key = self.document(place)
            bad = None
        except IndexError:
            raise Refused(404, f"There is no record {place + 1}. The file has {len(self.records):,}.") from None
        except BadRecord as error:
            document, key, bad = Document("unknown"), "", error.reason
        mine, settled = self.log.decision(by, place), self.log.settled(place)
        labels = self.log.labels_of(place) if mine is not None and mine["action"] != "skip" else {}
        disagreeing = bool(labels) and self.log.final(place, labels) is None
        shown = {
            "place": place,
            "where": self.records.where(place).rpartition("/")[2],
            "id": document.id,
            "kind": document.kind,
            "key": key,
            "turns": document.turns,
            "completions": document.completions,
            "details": document.details,
            "images": self._images(place, document),
            "about": plain(document.about),
            "left": self.left(place, by),
            "decision": mine and _told(mine),
            "base": self._base(by, place),
            "others": [_told(event) for name, event in labels.items() if name != by and disagreeing],
            "disagreeing": disagreeing,
            "settled": _told(settled) if settled is not None and mine is not None else None,
            "bad": bad,
        }
        self.records.check()
        self.facets.begin.set()
        return shown

    def _base(self, by: str, place: int) -> str:
        """What a decision on a record replaces, by which one that was made without knowing of another is noticed."""
        mine, settled = self.log.decision(by, place), self.log.settled(place)
        return ".".join(str(event["uid"]) for event in (mine, settled) if event is not None)

    def left(self, place: int, by: str) -> str:
        """The completion that stands on the left: at random, but the same for a record and a reviewer."""
        coin = hashlib.blake2b(f"{self.log.seed}/{by}/{place}".encode("utf-8", "replace"), digest_size=1).digest()[0] & 1
        return ("chosen", "rejected")[coin]

    def _images(self, place: int, document: Document) -> list[dict[str, Any]]:
        shown: list[dict[str, Any]] = [
            {"id": f"{place}/image/{at}", "name": f"image {at + 1}"} for at in range(len(document.files["image"]))
        ]
        for number, _ in enumerate(document.files["video"]):
            try:
                frames, failed = len(self._frames(document, number)), ""
            except ValueError as error:
                frames, failed = 0, str(error)
            if not frames:
                shown.append({"id": None, "name": f"video {number + 1}", "failed": failed})
            shown += [
                {"id": f"{place}/video/{number}?frame={at}", "name": f"video {number + 1}, frame {at + 1}"} for at in range(frames)
            ]
        return shown

    def _frames(self, document: Document, number: int) -> list[Any]:
        from mpo.data.video import frames_of

        path = self.records.find(document.files["video"][number], "video", of_job=document.kind in ("responses", "answers"))
        return frames_of(path, max_frames=FRAMES)

    def image(self, place: int, kind: str, number: int, frame: int) -> tuple[bytes, str]:
        """The bytes of an image, or of a frame of a video, and their media type: of no other file than those of a record."""
        from mpo.data.images import media_type, open_image

        try:
            document = self.document(place)[1]
            given = document.files[kind][number]
            if kind == "video":
                from mpo.data.video import open_frames

                one = self._frames(document, number)[frame]
                return _encoded(open_frames(one.path, [one])[0])
            data = given.get("bytes") if isinstance(given, Mapping) else given
            if not isinstance(data, bytes):
                path = given.get("path") if isinstance(given, Mapping) else given
                of_job = document.kind in ("responses", "answers")
                data = Path(self.records.find(path, kind, of_job=of_job)).read_bytes()
            found = media_type(data)
            return (data, found) if found else _encoded(open_image(data))
        except (KeyError, IndexError):
            raise Refused(404, f"Record {place + 1} has no such {kind}.") from None
        except (ValueError, TypeError, OSError) as error:
            raise Refused(404, f"{error}") from None

    def decide(self, by: str, asked: Mapping[str, Any]) -> Event:
        """Save a decision. When this returns it is on disk."""
        self.ready()
        place, action = asked.get("place"), asked.get("action")
        if isinstance(place, bool) or not isinstance(place, int) or action not in ACTIONS:
            raise Refused(400, f"Expected a place and an action of {', '.join(ACTIONS)}; got {place!r:.40}, {action!r:.40}.")
        uid, reason = asked.get("uid"), asked.get("reason") or ""
        if not isinstance(uid, str) or not re.fullmatch(r"[0-9a-f]{16,64}", uid) or not isinstance(reason, str):
            raise Refused(400, "Expected a uid of 16 hexadecimal digits or more, and a reason as text.")
        self.records.check()
        with self._write:
            if (known := self.log.known(uid)) is not None:
                if (known["by"], known["action"], known.get("place")) != (by, action, place):
                    raise Refused(409, "Not saved: this is the uid of another decision. Reload the page.")
                return known
            try:
                line, document, key = self.document(place)
            except IndexError:
                raise Refused(404, f"There is no record {place + 1}.") from None
            except BadRecord as error:
                if action not in ("reject", "skip"):
                    raise Refused(422, f"This line is not a record: {error.reason} It can be rejected or skipped.") from None
                line, document, key = {}, Document("unknown"), key_of(self.records, place)
            if asked.get("base") != self._base(by, place) or asked.get("key") not in (key, ""):
                raise Refused(
                    409, "This record was decided in another tab in the meantime: nothing was saved. This is how it is now."
                )
            settle = bool(asked.get("settle"))
            if settle and self.log.decision(by, place) is None:
                raise Refused(409, "A disagreement is settled by someone who has decided on the record. Decide first.")
            edits = self._edits(line, document, asked.get("edits") or [], action) if action in ("accept", "swap") else []
            event: Event = {"uid": uid, "by": by, "action": action, "place": place, "id": document.id, "key": key, "edits": edits}
            if action == "reject":
                event["reason"] = reason[:2000]
            if len(document.completions) == 2 and document.kind == "pair":
                event["left"] = self.left(place, by)
                event["hidden"] = bool(asked.get("hidden"))
            if isinstance(asked.get("seconds"), int | float) and 0 <= asked["seconds"] < 1e6:
                event["seconds"] = round(float(asked["seconds"]), 1)
            if settle:
                event["settle"] = True
            self.records.check()
            return self.log.append(**event)

    def _edits(self, line: Mapping[str, Any], document: Document, asked: Any, action: str) -> list[dict[str, Any]]:
        """Check edits: only of what can be edited, and only to a line that can be read as what it was."""
        if not isinstance(asked, list) or len(asked) > MAX_EDITS:
            raise Refused(400, f"Expected a list of at most {MAX_EDITS} edits.")
        known = {json.dumps(one["paths"]): one for one in document.texts()}
        edits: list[dict[str, Any]] = []
        for one in asked:
            paths = one.get("paths") if isinstance(one, Mapping) else None
            shown = known.get(json.dumps(paths))
            if shown is None:
                raise Refused(400, f"{paths!r:.80} is not among what can be edited of this record.")
            old = at(line, shown["paths"][0])
            if any(at(line, path) != old for path in shown["paths"]):
                raise Refused(422, "This text stands in two places of the record that differ.")
            try:
                new = new_value(old, one.get("value"))
            except ValueError as error:
                raise Refused(422, f"{'/'.join(map(str, shown['paths'][0]))}: {error}") from None
            empty = new in ("", []) and old is None
            if new != old and not empty:
                edits.append({"paths": [list(path) for path in shown["paths"]], "old": plain(old), "value": new})
        if edits or action == "swap":
            try:
                reason = refused(line, corrected(line, action, edits))
            except ValueError as error:
                reason = str(error)
            if reason:
                raise Refused(422, f"Not saved: so changed, the record could not be read: {reason}")
        return edits

    def undo(self, by: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Take back the last decision of a reviewer that holds. Returns its place."""
        self.ready()
        with self._write:
            stack = self.log.stacks.get(by)
            if not stack:
                raise Refused(409, "There is nothing to undo.")
            if asked.get("undoes") != stack[-1]["uid"]:
                raise Refused(409, "Another decision was made in another tab in the meantime: nothing was undone.")
            last = stack[-1]
            self.log.append(action="undo", by=by, undoes=last["uid"])
            return {"place": last["place"], "undo": stack[-1]["uid"] if stack else None}

    def report(self, by: str) -> dict[str, Any]:
        """Progress, agreement and position bias, of what the reviewer may know: of others the number of decisions alone."""
        found, labels = summary(self.log), self.log.labels()
        for name, own in found["reviewers"].items():
            if name != by:
                found["reviewers"][name] = {"decided": sum(own.values())}
        found["position_bias"] = {name: one for name, one in found["position_bias"].items() if name == by}
        found["agreement"] = [one for one in found["agreement"] if by in one["reviewers"]]
        found["disagreements"] = sum(by in labels[place] for place in found["disagreements"])
        return {**found, "rows": [*rows(found), ("to settle", f"{found['disagreements']:,} disagreements")]}


def _told(event: Event) -> dict[str, Any]:
    names = ("uid", "by", "at", "action", "edits", "reason")
    return {"label": label(event), **{name: event[name] for name in names if name in event}}


def _encoded(image: Any) -> tuple[bytes, str]:
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    to = BytesIO()
    image.save(to, format="png")
    return to.getvalue(), "image/png"
