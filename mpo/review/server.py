"""The server of the page: records, images and decisions, for those who have the link."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from errno import EADDRINUSE
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpo.io import parse_json
from mpo.review.facets import NAMES
from mpo.review.files import Changed
from mpo.review.log import NotSaved
from mpo.review.review import Refused, Review

PAGE = Path(__file__).parent / "page"
TYPES = {"index.html": "text/html", "app.js": "text/javascript", "text.js": "text/javascript", "style.css": "text/css"}
MAX_BODY = 4 * 2**20
"""Maximum bytes of a request."""
BODY_SECONDS = 30
UNREAD_SECONDS = 5
"""Maximum seconds that a response waits for the rest of a request that is refused before it was read."""
UNREAD = "mpo.unread"
"""The entry of a request's scope that says whether its response waits so: its connection may be closed for another."""
HEAD_SECONDS = 10
"""Maximum seconds from the first byte of a request, or from the connection, to the end of its head."""
CONNECTIONS = 48
"""Maximum number of connections. One more closes the one that has been idle for longest."""
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


def application(review: Review, host: str, port: int) -> Any:
    """The ASGI application for a review at an address."""
    routes = [Route("/", _static), Route("/{name}", _static)]
    for method, works in WORKS.items():
        routes += [Route(f"/api/{path}", partial(_answer, review, work), methods=[method]) for path, work in works.items()]
    return Guard(Starlette(routes=routes), host, port)


async def _static(request: Request) -> Response:
    # No StaticFiles: a header with many ranges holds that of older releases up (CVE-2025-62727).
    name = request.path_params.get("name", "index.html")
    if name == "favicon.ico":  # which browsers ask for by themselves
        return Response(status_code=204)
    return Response((PAGE / name).read_bytes(), media_type=TYPES[name]) if name in TYPES else Response("", 404)


async def _answer(review: Review, work: Work, request: Request) -> Response:
    try:
        by = _reviewer(review, request)
        request.state.body = await _body(request) if request.method == "POST" else {}
        found = await run_in_threadpool(work, review, request, by)
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


def _reviewer(review: Review, request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    found = [by for known, by in review.tokens.items() if hmac.compare_digest(token.encode(), known.encode())]
    if scheme != "Bearer" or not found:
        raise Refused(401, "This page needs the link that mpo review has printed, with its token.")
    return found[0]


async def _body(request: Request) -> Mapping[str, Any]:
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise Refused(415, "Expected application/json.")
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                read.extend(part)
                if len(read) > MAX_BODY:
                    raise Refused(413, f"The request has more than {MAX_BODY >> 20} MiB.")
        found = parse_json(bytes(read), "the request")
    except (TimeoutError, ClientDisconnect):
        raise Refused(408, "The request came too slowly, or not whole.") from None
    except ValueError as error:
        raise Refused(400, str(error)) from None
    if not isinstance(found, dict):
        raise Refused(400, "Expected a JSON object.")
    return found


def _queue(review: Review, request: Request, by: str) -> Response:
    review.ready()
    asked = {name: request.query_params[name] for name in (*NAMES, "state", "search", "order") if name in request.query_params}
    import numpy as np

    places = review.facets.queue(asked, review.log, by, f"{review.log.seed}/{by}")
    return Response(np.array(places, "<u4").tobytes(), media_type="application/octet-stream")


def _image(review: Review, request: Request, by: str) -> Response:
    given = request.path_params
    frame = request.query_params.get("frame", "0")
    data, media = review.image(given["place"], given["kind"], given["number"], int(frame) if frame.isdecimal() else 0)
    return Response(data, media_type=media)


def _decide(review: Review, request: Request, by: str) -> Any:
    try:
        event = review.decide(by, request.state.body)
    except Refused as error:
        place = request.state.body.get("place")
        if error.status == 409 and isinstance(place, int):
            error.more["record"] = review.view(place, by)
        raise
    return {"saved": event["uid"], **review.state(by)}


def _reload(review: Review, request: Request, by: str) -> Any:
    review.reload()
    return review.state(by)


Work = Callable[[Review, Request, str], Any]
WORKS: dict[str, dict[str, Work]] = {
    "GET": {
        "state": lambda review, request, by: review.state(by),
        "records/{place:int}": lambda review, request, by: review.view(request.path_params["place"], by),
        "queue": _queue,
        "images/{place:int}/{kind}/{number:int}": _image,
        "report": lambda review, request, by: review.report(by),
    },
    "POST": {
        "decide": _decide,
        "undo": lambda review, request, by: review.undo(by, request.state.body),
        "reload": _reload,
    },
}
"""What each address of the page's requests does for a reviewer, by method."""


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
        """Handle a request: `Server` sends nothing else."""
        unread = True

        async def reading() -> Any:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                # A connection that is closed with unread bytes is reset, and its client never sees why it was refused.
                scope[UNREAD] = unread
                size = 0
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(UNREAD_SECONDS):
                        while unread and size <= MAX_BODY:
                            size += len((await reading()).get("body", b""))
                scope[UNREAD] = False
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        hosts, origins, sites = map(Headers(scope=scope).getlist, ("host", "origin", "sec-fetch-site"))
        wrong = (
            len(hosts) != 1
            or not self._is_here(hosts[0])
            or any(one != f"http://{hosts[0]}" for one in origins)
            or (scope["method"] == "POST" and not origins)
            or any(one not in ("same-origin", "none") for one in sites if scope["path"] != "/")
        )
        refusal = PlainTextResponse("This request does not come from the page of mpo review.", 403)
        await (refusal if wrong else self.app)(scope, reading, with_headers)

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


class Connection(H11Protocol):
    """A connection that cannot keep others out: one without a whole request is closed in time, and at once if its place is needed.

    Browsers open a new one by themselves, as for any that was closed while idle.
    """

    def connection_made(self, transport: Any) -> None:
        """Begin, if need be in the place of another."""
        super().connection_made(transport)
        self.since, self.deadline = self.loop.time(), self.loop.call_later(HEAD_SECONDS, self.close_idle)
        idle = [one for one in self.connections if isinstance(one, Connection) and one is not self and one.is_idle()]
        if len(self.connections) > CONNECTIONS and idle:
            min(idle, key=lambda one: one.since).close_idle()

    def data_received(self, data: bytes) -> None:
        """Let a request's head take no longer than `HEAD_SECONDS`, however its bytes come."""
        was_idle = self.is_idle() and self.timeout_keep_alive_task is None
        super().data_received(data)
        if not self.is_idle():
            self.deadline.cancel()
        elif not was_idle:
            self.since, self.deadline = self.loop.time(), self.loop.call_later(HEAD_SECONDS, self.close_idle)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since = self.loop.time()
        super().on_response_complete()

    def is_idle(self) -> bool:
        """Whether no request is being answered, but for one that is refused and whose rest does not come."""
        return self.cycle is None or self.cycle.response_complete or bool(self.cycle.scope.get(UNREAD))

    def close_idle(self) -> None:
        """Close it, unless a request is being answered."""
        if self.is_idle():
            self.connections.discard(self)
            self.transport.abort()


class Server:
    """A review on a port, 0 for a free one. Raises ValueError for an address that cannot be listened at."""

    def __init__(self, review: Review, host: str = "127.0.0.1", port: int = 0) -> None:
        try:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self.socket = socket.socket(family[0], socket.SOCK_STREAM)
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.socket.bind(family[4])
            self.socket.listen(128)  # a link that is printed can be opened
        except OSError as error:
            other = (
                "another --port, or none"
                if isinstance(error, PermissionError) or error.errno == EADDRINUSE
                else "an address of this machine"
            )
            raise ValueError(f"--host {host} --port {port} cannot be used ({error.strerror}). Give {other}.") from None
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
                http=Connection,
                limit_concurrency=2 * CONNECTIONS,
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
