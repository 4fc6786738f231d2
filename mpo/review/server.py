"""The server of the page: records, images and decisions, for those who have the link."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

from mpo.io import BadRecord, parse_json, read_json_lines
from mpo.review.agreement import summary
from mpo.review.corrections import opened
from mpo.review.documents import Document, at, corrected, new_value, read_line, refused
from mpo.review.facets import NAMES, Facets, key_of_bad
from mpo.review.files import Changed, Records, plain
from mpo.review.log import ACTIONS, Event, Log, NotSaved, label, log_of

PAGE = Path(__file__).parent / "page"
TYPES = {"index.html": "text/html", "app.js": "text/javascript", "text.js": "text/javascript", "style.css": "text/css"}
MAX_BODY = 4 * 2**20
"""Maximum bytes of a request."""
BODY_SECONDS = 30
MAX_EDITS = 1000
MAX_SIDE = 4096
"""Maximum pixels of a side of an image that has to be converted for the page."""
FRAMES = 16
"""Maximum number of frames of a video."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Refused(Exception):
    """A request that is not done: its status, and what to tell."""

    def __init__(self, status: int, reason: str, **more: Any) -> None:
        super().__init__(reason)
        self.status, self.reason, self.more = status, reason, more


class Review:
    """A file under review.

    Args:
        path: the file.
        image_root: as in `Records`.
        reviewers: their names; each has a token of their own.
        others: logs whose decisions are added.

    Raises:
        ValueError: as `Records` and `Log`.
    """

    def __init__(
        self, path: str | Path, *, image_root: str | Path | None = None, reviewers: Sequence[str], others: Sequence[Path] = ()
    ) -> None:
        self._given = path, image_root
        self.records = Records(path, image_root)
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
        with self._write:
            records = Records(*self._given)
            lost = opened(records, self.log)
            self.facets.stop()
            self.records, self.lost, self.facets = records, lost, Facets(records)
            self.document.cache_clear()

    # What the page asks for

    def _document(self, place: int) -> tuple[dict[str, Any], Document, str]:
        line = self.records.line(place)
        document = read_line(line)
        key = document.key()
        if document.kind == "answers":
            self._add_question(line, document)
        return line, document, key

    def _add_question(self, line: Mapping[str, Any], document: Document) -> None:
        """Add what was asked to the answers of an evaluation: it stands in the output of their job."""
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
        done = self.facets.ready
        stack = self.log.stacks.get(by) or [{}]
        decided = len({event["place"] for event in self.log.stacks.get(by, ()) if event["place"] >= 0})
        return {
            "file": self.records.path.name,
            "reviewer": by,
            "records": self.records.wait(0),
            "counted": self.records.ready,
            "facets": self.facets.counts if done else None,
            "read": self.facets.read,
            "undo": stack[-1].get("uid"),
            "decided": decided,
            "unmatched": self.lost,
            "recovered": self.log.recovered,
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
        others: list[dict[str, Any]] = []
        if mine is not None and mine["action"] != "skip":
            labels = self.log.labels_of(place)
            disagreeing = self.log.final(place, labels) is None
            others = [_told(event) for name, event in labels.items() if name != by and disagreeing]
        else:
            disagreeing = False
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
            "others": others,
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
            if isinstance(given, Mapping) and given.get("bytes") is not None:
                data = bytes(given["bytes"])
            else:
                path = given.get("path") if isinstance(given, Mapping) else given
                of_job = document.kind in ("responses", "answers")
                data = given if isinstance(given, bytes) else Path(self.records.find(path, kind, of_job=of_job)).read_bytes()
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
                return known
            try:
                line, document, key = self.document(place)
            except IndexError:
                raise Refused(404, f"There is no record {place + 1}.") from None
            except BadRecord as error:
                if action not in ("reject", "skip"):
                    raise Refused(422, f"This line is no record: {error.reason} It can be rejected or skipped.") from None
                line, document, key = {}, Document("unknown"), key_of_bad(self.records, place)
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


def _told(event: Event) -> dict[str, Any]:
    names = ("uid", "by", "at", "action", "edits", "reason")
    return {"label": label(event), **{name: event[name] for name in names if name in event}}


def _encoded(image: Any) -> tuple[bytes, str]:
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    to = BytesIO()
    image.save(to, format="png")
    return to.getvalue(), "image/png"


def application(review: Review, host: str, port: int) -> Any:
    """The ASGI application for a review at an address."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def answered(work: Callable[[Request, str], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                by = reviewer(request)
                request.state.body = await body(request) if request.method == "POST" else {}
                found = await run_in_threadpool(work, request, by)
            except Refused as error:
                return JSONResponse({"error": error.reason, **error.more}, error.status)
            except Changed as error:
                return JSONResponse({"error": str(error), "changed": True}, 409)
            except NotSaved as error:
                return JSONResponse({"error": f"Not saved: {error.strerror or error}.", "unsaved": True}, 507)
            except ValueError as error:
                return JSONResponse({"error": str(error)}, 422)
            except Exception as error:  # the page tells it, where a server's bare 500 would tell nothing
                traceback.print_exc()
                reason = f"{type(error).__name__}: {error}. This is a fault of mpo review, whose output has more."
                return JSONResponse({"error": reason}, 500)
            # In ASCII, as a text may have half a character.
            return found if isinstance(found, Response) else Response(json.dumps(found), media_type="application/json")

        return answer

    def reviewer(request: Request) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        name = ""
        for known, by in review.tokens.items():
            if scheme == "Bearer" and hmac.compare_digest(token.encode(), known.encode()):
                name = by
        if not name:
            raise Refused(401, "This page needs the link that mpo review has printed, with its token.")
        return name

    async def body(request: Request) -> Mapping[str, Any]:
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refused(415, "Expected application/json.")
        read = bytearray()

        async def all_of_it() -> None:
            async for part in request.stream():
                read.extend(part)
                if len(read) > MAX_BODY:
                    raise Refused(413, f"The request has more than {MAX_BODY >> 20} MiB.")

        try:
            await asyncio.wait_for(all_of_it(), BODY_SECONDS)
            found = parse_json(bytes(read), "the request")
        except TimeoutError:
            raise Refused(408, "The request came too slowly.") from None
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if not isinstance(found, dict):
            raise Refused(400, "Expected a JSON object.")
        return found

    def queue(request: Request, by: str) -> Response:
        review.ready()
        asked = {name: request.query_params[name] for name in (*NAMES, "state", "search", "order") if name in request.query_params}
        import numpy as np

        places = review.facets.queue(asked, review.log, by, f"{review.log.seed}/{by}")
        return Response(np.array(places, "<u4").tobytes(), media_type="application/octet-stream")

    def image(request: Request, by: str) -> Response:
        given = request.path_params
        frame = request.query_params.get("frame", "0")
        data, media = review.image(given["place"], given["kind"], given["number"], int(frame) if frame.isdecimal() else 0)
        return Response(data, media_type=media)

    def decide(request: Request, by: str) -> Any:
        try:
            event = review.decide(by, request.state.body)
        except Refused as error:
            place = request.state.body.get("place")
            if error.status == 409 and isinstance(place, int):
                error.more["record"] = review.view(place, by)
            raise
        return {"saved": event["uid"], **review.state(by)}

    def reload(request: Request, by: str) -> Any:
        review.reload()
        return review.state(by)

    async def static(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name == "favicon.ico":  # which browsers ask for by themselves
            return Response(status_code=204)
        return Response((PAGE / name).read_bytes(), media_type=TYPES[name]) if name in TYPES else Response("", 404)

    routes = [
        Route("/", static),
        Route("/{name}", static),
        Route("/api/state", answered(lambda request, by: review.state(by))),
        Route("/api/records/{place:int}", answered(lambda request, by: review.view(request.path_params["place"], by))),
        Route("/api/queue", answered(queue)),
        Route("/api/images/{place:int}/{kind}/{number:int}", answered(image)),
        Route("/api/report", answered(lambda request, by: report(review, by))),
        Route("/api/decide", answered(decide), methods=["POST"]),
        Route("/api/undo", answered(lambda request, by: review.undo(by, request.state.body)), methods=["POST"]),
        Route("/api/reload", answered(reload), methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), host, port)


def report(review: Review, by: str) -> dict[str, Any]:
    """Progress, agreement and position bias, of what the reviewer may know: numbers, but no one else's labels."""
    found = summary(review.log)
    bias = found["position_bias"]
    return {**found, "disagreements": len(found["disagreements"]), "position_bias": {by: bias[by]} if by in bias else {}}


class Guard:
    """Refuses requests under another name or of another page, and gives every response the headers that keep the page closed.

    A page of another site can make its name mean this address (DNS rebinding): hence no names but those of this machine.
    """

    def __init__(self, app: Any, host: str, port: int) -> None:
        self.app, self.port = app, port
        self.names = {"localhost", "127.0.0.1", "[::1]", host.lower()}
        self.any_address = not _is_loopback(host)
        if self.any_address:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == "host"]
        origins = [value for name, value in headers if name == "origin"]
        sites = [value for name, value in headers if name == "sec-fetch-site"]
        wrong = (
            len(hosts) != 1
            or not self._is_here(hosts[0])
            or any(one != f"http://{hosts[0]}" for one in origins)
            or (scope["method"] == "POST" and not origins)
            or any(one not in ("same-origin", "none") for one in sites if scope["path"] != "/")
        )
        if wrong:
            await with_headers({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await with_headers({"type": "http.response.body", "body": b"This request does not come from the page of mpo review."})
            return
        await self.app(scope, receive, with_headers)

    def _is_here(self, given: str) -> bool:
        name, colon, port = given.rpartition(":") if not given.endswith("]") else (given, "", "")
        name = (name if colon else given).lower()
        if (port if colon else "80") != str(self.port):
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return self.any_address


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Server:
    """A review on a port.

    Args:
        review: the review.
        host: the address to listen at.
        port: the port; 0 for a free one.

    Raises:
        ValueError: for an address that cannot be listened at.
    """

    def __init__(self, review: Review, host: str = "127.0.0.1", port: int = 0) -> None:
        import uvicorn

        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.socket = socket.socket(family[0], socket.SOCK_STREAM)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(family[4])
            self.socket.listen(128)  # a link that is printed can be opened
        except OSError as error:
            raise ValueError(
                f"--host {host} --port {port} cannot be used ({error.strerror}). Give another --port, or none."
            ) from None
        self.review, self.host, self.port = review, host, self.socket.getsockname()[1]
        self.is_local = _is_loopback(host)
        self.server = uvicorn.Server(
            uvicorn.Config(
                application(review, host, self.port),
                log_level="critical",
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                limit_concurrency=64,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=2,
                h11_max_incomplete_event_size=32 * 2**10,
            )
        )

    def links(self) -> dict[str, str]:
        """The link of each reviewer. The token is in the part that browsers send to nobody."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host
        host = f"[{host}]" if ":" in host else host
        return {name: f"http://{host}:{self.port}/#{token}" for token, name in self.review.tokens.items()}

    def run(self) -> None:
        """Serve until Ctrl-C."""
        sys.setswitchinterval(0.0005)  # an answer does not wait for the threads that count
        try:
            self.server.run(sockets=[self.socket])
        finally:
            self.review.close()
