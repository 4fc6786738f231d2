"""One OpenAI-compatible server: what it says of itself, one attempt at a request, and its errors, sorted."""

import asyncio
import json
import os
import re
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from mpo.generation.generator import GenerationError
from mpo.generation.wire import KINDS, Kind, kind_of

CHAT, COMPLETIONS = "/chat/completions", "/completions"
NO_KEY = "none"
_TOO_LONG = re.compile(r"context|maximum.{0,20}(length|tokens)|too (long|many tokens)|session_len", re.IGNORECASE)
MODELS_SECONDS = 30.0
"""That a server may take to list its models: one that hangs holds up the others."""


@dataclass(eq=False)
class FailedError(Exception):
    """An attempt that may succeed if it is repeated."""

    reason: str
    after: float | None = None  # seconds to wait, if the server says
    limited: bool = False  # a rate limit has turned the request away
    unreachable: bool = False  # there was no response at all
    lost: bool = False  # the server may have responded, and charge for it
    final: bool = False  # it must not be repeated, since a part of the response was passed on

    def __str__(self) -> str:
        return self.reason


class SettingsError(ValueError):
    """Settings that a server would ignore, or has `refused` to a request: no request can be answered with them."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class RefusedError(Exception):
    """A request that a server will not answer, however often it is asked: its own fault or, if it refuses all, the server's.

    The `remedy` is what to do if it says so to every request; empty for other settings.
    """

    def __init__(self, reason: str, status: int = 400, remedy: str = "") -> None:
        super().__init__(reason)
        self.status, self.remedy = status, remedy

    def of_request(self) -> GenerationError:
        """The error if the request is at fault."""
        return GenerationError(explained(f"{self}"))

    def of_server(self) -> ConnectionError | SettingsError:
        """The error if it refuses every request."""
        if self.remedy:
            return ConnectionError(f"{self}. {self.remedy}")
        return SettingsError(f"{explained(f'{self}')} So is every request with these settings.", refused=True)


class WrongModelError(ConnectionError):
    """A server that has another model than the one asked for."""


@dataclass(eq=False)
class Endpoint:
    """A server, as far as it is known. Every method takes the client of the event loop that it runs in."""

    url: str  # up to /v1
    key_variable: str  # of the environment, with the key
    timeout: float  # seconds that a response may take
    kind: Kind = KINDS["other"]  # its ways, once it is `known`
    known: bool = False
    rests_until: float = 0.0  # do not ask it before this time (`time.monotonic`)
    failures: int = 0  # attempts in a row that failed: it is asked after servers with fewer requests and failures
    ignores_n: bool = False  # it has answered with fewer responses than were asked for
    prefix: str | None = None  # how it goes on from a prefix: `flag`, `itself`, or why it does not; None until tried

    def __post_init__(self) -> None:
        self.shown = shown_address(self.url)
        self.key()

    def __repr__(self) -> str:
        return f"Endpoint({self.shown!r})"

    def key(self) -> str:
        """The key in the environment, or `NO_KEY`. Raises SettingsError for one that no header can hold, naming the variable."""
        key = os.environ.get(self.key_variable) or NO_KEY
        if not re.fullmatch(r"[!-~]+", key):
            raise SettingsError(
                f"The key in the environment variable {self.key_variable} has a character other than visible ASCII, such as a "
                "space or the end of a line. Set it to the key alone."
            )
        return key

    def client(self) -> Any:
        """A client for the event loop that is running, an asynchronous context manager."""
        import openai

        http = openai.DefaultAsyncHttpxClient(base_url=self.url, timeout=self.timeout, verify=_certificates())
        return openai.AsyncOpenAI(base_url=self.url, api_key=self.key(), max_retries=0, timeout=self.timeout, http_client=http)

    async def introduce(self, client: Any, model: str | None, kind: str | None) -> str:
        """Ask it for its models, and find its ways; returns the model's name.

        Raises FailedError if it cannot be reached, WrongModelError if it has another model, ConnectionError for another reason.
        """
        try:
            data = await self._listed(client, optional=model is not None)
            models = sorted(data["data"], key=lambda one: one.get("status") != {"value": "loaded"})
            names = [str(one["id"]) for one in models]
        except (AttributeError, KeyError, TypeError):
            raise ConnectionError(f"{self.shown} is not an OpenAI-compatible server: it lists no models.") from None
        found = KINDS[kind] if kind else kind_of(models[0]) if models else KINDS["other" if "missing" in data else "transformers"]
        name = model or next(iter(names), None)
        if name is None:
            raise ConnectionError(f"{self.shown} has no model. Give the name of one that it can load.")
        if names and name not in names and found.name != "transformers":  # which loads others when they are asked for
            listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise WrongModelError(f"{self.shown} has no model {name!r}; it has {listed}. Give the name of one of them.")
        self.kind, self.known = found, True
        return name

    async def _listed(self, client: Any, *, optional: bool) -> Any:
        for last in (False, False, True):
            try:
                return await self.send(client, "/models", None, min(self.timeout, MODELS_SECONDS))
            except RefusedError as error:
                if optional and error.status == 404:
                    return {"data": [], "missing": True}
                raise ConnectionError(f"{error}. {error.remedy}".strip()) from None
            except FailedError as error:
                if last or error.unreachable:
                    raise
                await asyncio.sleep(min(error.after or 0.5, 10.0))
        raise AssertionError

    async def send(self, client: Any, path: str, body: Mapping[str, Any] | None, timeout: float | None = None) -> Any:
        """Make one attempt; returns the JSON of the response.

        Raises FailedError for what may succeed later, RefusedError for what will not, and ConnectionError for a server that cannot
        be used: a wrong address, model or key.
        """
        seconds = timeout or self.timeout
        with self._errors(seconds):
            async with asyncio.timeout(seconds):  # the client's own limit is of each read
                text = await (client.get(path, cast_to=str) if body is None else client.post(path, body=body, cast_to=str))
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise FailedError(self.clean(f"{self.shown} has sent something that is not JSON: {text[:200]!r}."), lost=True) from None

    async def chunks(self, client: Any, path: str, body: Mapping[str, Any], timeout: float) -> AsyncGenerator[Any, None]:
        """Make one attempt at a streamed response; yields its chunks, each with a list of choices. Errors as in `send`."""
        import openai

        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        stream_class: Any = openai.AsyncStream[object]
        with self._errors(timeout):
            async with asyncio.timeout(timeout), AsyncExitStack() as stack:
                begun = await client.post(path, body=body, cast_to=object, stream=True, stream_cls=stream_class)
                try:
                    async for chunk in await stack.enter_async_context(begun):
                        if not isinstance(chunk, Mapping) or not isinstance(chunk.get("choices"), list):
                            raise FailedError(self.clean(f"{self.shown} failed while it responded: {str(chunk)[:200]}."), lost=True)
                        yield chunk
                except (ValueError, RecursionError):
                    raise FailedError(f"{self.shown} has sent a part of a response that is not JSON.", lost=True) from None

    @contextmanager
    def _errors(self, timeout: float) -> Iterator[None]:
        import openai

        url = self.shown
        try:
            yield
        except openai.APIStatusError as error:
            said = self.clean(str(error.response.text).strip()[:500] or str(error.message))
            raise self._of_status(error.status_code, said, error.response.headers.get("retry-after")) from None
        except (openai.APITimeoutError, TimeoutError):
            raise FailedError(f"{url} gives no response in {timeout:.3g} s.", lost=True) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            if not type(cause).__name__.startswith("Connect"):  # the request may be what breaks the connection
                raise FailedError(self.clean(f"the connection to {url} broke ({cause})."), lost=True) from None
            reason = self.clean(f"{url} cannot be reached ({cause}). Is the server running?")
            raise FailedError(reason, unreachable=True) from None
        except openai.OpenAIError as error:
            raise FailedError(self.clean(f"{url} fails ({error})."), lost=True) from None
        except Exception as error:  # a broken stream raises the error of the client's HTTP library, which depends on its version
            if not type(error).__module__.startswith("http"):
                raise
            raise FailedError(self.clean(f"{url} failed while it responded ({error})."), lost=True) from None

    def _of_status(self, status: int, said: str, after: str | None) -> Exception:
        url = self.shown
        if status == 401:
            return ConnectionError(f"{url} refuses the key (401: {said}). Set {self.key_variable} to a valid key.")
        if status == 403:
            remedy = f"Set {self.key_variable} to a key that may use the model."
            return RefusedError(f"{url} refuses the key or the request (403: {said})", status, remedy)
        if status == 404:
            return RefusedError(f"{url} has no such endpoint or model (404: {said})", status, "The address usually ends in /v1.")
        if status == 402 or (status == 429 and "insufficient_quota" in said):
            return ConnectionError(f"{url} requires payment ({status}: {said}). Add credit to the account of the key.")
        if status in (408, 409, 425, 429) or status >= 500:
            return FailedError(f"{url} fails ({status}: {said}).", after=retry_after(after), limited=status == 429)
        return RefusedError(f"{url} refuses the request ({status}: {said})", status)

    def clean(self, text: str) -> str:
        """A message without the key, which some servers repeat, and without the address's password."""
        for secret in (os.environ.get(self.key_variable), urlsplit(self.url).password):
            text = text.replace(secret, "***") if secret else text
        return text


@cache
def _certificates() -> Any:
    """The SSL context of the client's HTTP library, httpx or httpx2: made once, since that takes 60 ms."""
    import openai

    origin = next(kind.__module__ for kind in openai.DefaultAsyncHttpxClient.__mro__ if kind.__module__.startswith("httpx"))
    return import_module(origin.split(".")[0]).create_ssl_context()


def explained(reason: str) -> str:
    """A refusal, with what to do about it where that is known."""
    if "mm_processor_kwargs" in reason or "trust-request-mm" in reason:
        return f"{reason}. Start vLLM with --trust-request-mm-kwargs, or leave max_tiles out."
    if _TOO_LONG.search(reason):
        return (
            f"{reason}. The prompt and its response do not fit in the server's context: lower max_new_tokens, use fewer or smaller "
            "images, or start the server with a longer context."
        )
    return f"{reason}."


def retry_after(header: str | None) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None without one.

    >>> retry_after("1.5"), retry_after(None), retry_after("soon")
    (1.5, None, None)
    """
    try:
        return max(float(header or ""), 0.0)
    except ValueError:
        pass
    try:
        return max(parsedate_to_datetime(header or "").timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def shown_address(url: Any) -> str:
    """An address for messages: without user, password and query. Raises ValueError for anything but the address of a server.

    >>> shown_address("http://me:secret@localhost:8000/v1?key=1")
    'http://localhost:8000/v1'
    """
    try:
        parts = urlsplit(url)
        valid = parts.scheme.lower() in ("http", "https") and parts.hostname and parts.port != 0
    except (AttributeError, TypeError, ValueError):  # of the port, or the brackets of an IPv6 address
        valid = False
    if not valid:
        shown = re.sub(r"//[^/@]*@", "//", str(url))
        raise ValueError(f"Expected the address of a server, such as http://localhost:8000/v1; got {shown!r}.")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
