"""Which server a request goes to, what is repeated and when, whose fault a failure is, and how servers go on from a prefix."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from mpo.generation.endpoint import CHAT, COMPLETIONS, Endpoint, FailedError, RefusedError, SettingsError, WrongModelError
from mpo.generation.generator import Decoding, GenerationError, Request
from mpo.generation.wire import Choice, Kind, chat_fields, check_understood, decoding_fields, read_choices, read_usage

if TYPE_CHECKING:
    from mpo.generation.server import ServerGenerator

T = TypeVar("T")
Attempt = Callable[[Endpoint, float], Awaitable[T]]
POOL = 16
"""Connections of one client: a request's cost grows with them, since httpx looks through all of its pool."""
LONGEST_WAIT = 30.0
"""In seconds, between two attempts, unless the server asks for a longer one."""
MOST_FAILURES = 8
"""That count as much as requests at the same time: a server that recovers is asked again when the others are busy."""
CONTINUES = {"flag": "goes on from a prefix with continue_final_message", "itself": "goes on from a prefix by itself"}
"""The ways of servers that go on from a prefix, as they are reported."""
_PROBE = "Answer: yes."
"""A prefix whose tokens are twice as many when it is there twice, on two lines."""
BLOCKED: set[asyncio.AbstractEventLoop] = set()
"""Event loops that wait for a call that was made in them, as in a notebook: what runs there cannot end before it."""


class Slots:
    """A bound on what runs at the same time, whatever its event loop and thread; who waits first is first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken: Counter[asyncio.AbstractEventLoop] = Counter()
        self._waiting: deque[tuple[int, asyncio.AbstractEventLoop, Future[None]]] = deque()

    def __reduce__(self) -> Any:  # another process has its own
        return Slots, ()

    @asynccontextmanager
    async def one(self, most: int) -> AsyncIterator[None]:
        """Wait until fewer than `most` are taken, but for those of `BLOCKED` loops, and take one."""
        turn: Future[None] = Future()
        loop = asyncio.get_running_loop()
        with self._lock:
            self._waiting.append((most, loop, turn))
        self._admit()
        try:
            if not turn.done():
                await asyncio.wrap_future(turn)
            yield
        finally:
            if not turn.cancel():  # it was given
                self._admit({loop: 1})

    def _admit(self, ended: Mapping[asyncio.AbstractEventLoop, int] = MappingProxyType({})) -> None:
        with self._lock:
            self._taken -= Counter(ended)
            while self._waiting and sum(self._taken[loop] for loop in self._taken.keys() - BLOCKED) < self._waiting[0][0]:
                _, loop, turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    self._taken[loop] += 1
                    turn.set_result(None)


class Dispatch:
    """The servers as one stream of a generator uses them: its clients, which belong to an event loop, and its settings.

    A server that refuses or fails at what others serve is left out, and that is said once. A request that one refuses which answers
    others is at fault itself; a plain request tells, where no other has. The stack closes the clients.
    """

    def __init__(self, generator: ServerGenerator, decoding: Decoding, most: int, stack: AsyncExitStack) -> None:
        self.generator, self.decoding, self.most, self.stack = generator, decoding, most, stack
        self.endpoints = list(generator.endpoints)
        self.left_out: dict[Endpoint, Exception] = {}
        self.clients: dict[Endpoint, list[Any]] = {endpoint: [] for endpoint in self.endpoints}
        self.running: Counter[Endpoint] = Counter()
        self.asking = {endpoint: asyncio.Lock() for endpoint in self.endpoints}  # what it can do
        self.judging = asyncio.Lock()
        self.answered: dict[Endpoint, float] = {}  # when each did last
        self.refused: dict[Endpoint, float] = {}

    @classmethod
    async def start(cls, generator: ServerGenerator, decoding: Decoding, most: int, stack: AsyncExitStack) -> Dispatch:
        """Connect to the servers. Raises ConnectionError if none can be used, and ValueError for settings that one would ignore."""
        run = cls(generator, decoding, most, stack)
        for endpoint in generator.endpoints:
            try:
                if not endpoint.known:
                    generator.name = await endpoint.introduce(await run._client(endpoint), generator.name, generator.kind)
            except WrongModelError:
                raise
            except (ConnectionError, FailedError) as error:
                run._leave_out(endpoint, error)
        for endpoint in run._usable():
            check_understood(endpoint.kind, endpoint.shown, decoding, generator.max_tiles)
        return run

    async def answer(self, attempt: Attempt[T], samples: Sequence[int] = (0,)) -> T:
        """Make attempts at a request, on one server or another, until one succeeds; each is given the seconds it may take.

        Raises GenerationError where the request is at fault, ConnectionError where the servers are, SettingsError for the settings.
        """
        generator = self.generator
        attempts, waits, last = 0, 0, "no server is free"
        avoid: dict[Endpoint, float] = {}
        async with generator.slots.one(self.most):
            end = time.monotonic() + generator.total_timeout
            while True:
                endpoint = await self._free(avoid, end)
                if endpoint is None or attempts >= generator.attempts:
                    await self._check_others(last)
                    raise GenerationError(f"{last} Given up after {attempts or waits} attempts.")
                try:
                    return await self._attempted(attempt, endpoint, end, samples)
                except FailedError as error:
                    if error.final:
                        raise GenerationError(f"{error}") from None
                    last = f"{error}"
                    endpoint.failures += 1
                    attempts += not error.limited
                    wait = error.after if error.after is not None else min(0.5 * 2**waits, LONGEST_WAIT)
                    waits += 1
                    avoid[endpoint] = time.monotonic() + wait
                    if error.limited or error.unreachable:  # for other requests as well
                        endpoint.rests_until = max(endpoint.rests_until, avoid[endpoint])
                except (ConnectionError, SettingsError) as error:
                    self._leave_out(endpoint, error)
                except GenerationError:
                    raise
                except ValueError as error:  # of an image
                    raise GenerationError(f"{error}") from error

    async def _attempted(self, attempt: Attempt[T], endpoint: Endpoint, end: float, samples: Sequence[int]) -> T:
        begun = time.monotonic()
        self.running[endpoint] += 1
        try:
            found = await attempt(endpoint, min(max(end - begun, 0.1), self.generator.timeout))
        except RefusedError as error:
            raise await self._fault(endpoint, error, begun, samples) from None
        except (FailedError, asyncio.CancelledError) as error:
            self.generator.usage.lost += getattr(error, "lost", True)
            raise
        finally:
            self.running[endpoint] -= 1
        self.answered[endpoint], endpoint.failures = time.monotonic(), 0
        return found

    def _usable(self) -> list[Endpoint]:
        """The servers that were not left out. Raises what left them out if there are none, with all reasons."""
        if self.endpoints:
            return self.endpoints
        errors = [*self.left_out.values()]
        text = " ".join(["No server can be used."] * (len(errors) > 1) + [*map(str, errors)])
        if all(isinstance(error, SettingsError) for error in errors):
            raise SettingsError(text, refused=any(getattr(error, "refused", False) for error in errors))
        raise ConnectionError(text)

    def _leave_out(self, endpoint: Endpoint, error: Exception) -> None:
        if endpoint in self.endpoints:
            self.endpoints.remove(endpoint)
            self.left_out[endpoint] = error
            if self.endpoints:
                self.generator.notice(f"{error} The others are asked.", about=endpoint.shown)

    async def _free(self, avoid: Mapping[Endpoint, float], end: float) -> Endpoint | None:
        """The server with the fewest requests and recent failures, among those that need not be left alone; None before `end`."""
        while True:
            now = time.monotonic()
            free = {endpoint: max(endpoint.rests_until, avoid.get(endpoint, 0.0)) for endpoint in self._usable()}
            first = min(free.values())
            if max(first, now) >= end:
                return None
            if first <= now:
                ready = [endpoint for endpoint in free if free[endpoint] <= now]
                return min(ready, key=lambda one: self.running[one] + min(one.failures, MOST_FAILURES))
            await asyncio.sleep(first - now)

    async def _fault(self, endpoint: Endpoint, error: RefusedError, begun: float, samples: Sequence[int]) -> Exception:
        async with self.judging:
            if endpoint in self.left_out:
                return self.left_out[endpoint]
            last = self.answered.get(endpoint, -1.0)
            alone = len(self.endpoints) == 1
            known = last >= begun or (alone and last > self.refused.get(endpoint, 0.0))
            if not known and (other := await self._probe(endpoint, samples)):
                return other
            self.refused[endpoint] = time.monotonic()
        return error.of_request()

    async def _check_others(self, reason: str) -> None:
        """Return if a server answers another request, so that the one that was given up is at fault; raise what is if none does."""
        async with self.judging:
            for endpoint in sorted(self._usable(), key=lambda endpoint: endpoint.rests_until):
                error = await self._probe(endpoint, (0,), max_tokens=1)
                if error is None:
                    return
                if not isinstance(error, FailedError):
                    self._leave_out(endpoint, error)
            self._usable()
        raise ConnectionError(f"{reason} No other request is answered either.")

    async def _probe(self, endpoint: Endpoint, samples: Sequence[int], **fields: Any) -> Exception | None:
        """Ask a plain request with the same settings. Returns the server's error if it is not answered."""
        path, body = await self.body(endpoint, Request.ask("Say yes."), samples)
        most = self.generator.max_tiles
        if most is not None and endpoint.kind.tiles == "mm_processor_kwargs":  # with images alone otherwise
            body["mm_processor_kwargs"] = {"max_dynamic_patch": most}
        try:
            self.checked(endpoint, await self.send(endpoint, path, {**body, **fields}), 0)
        except (RefusedError, FailedError, ConnectionError, SettingsError) as error:
            return error.of_server() if isinstance(error, RefusedError) else error
        self.answered[endpoint] = time.monotonic()
        return None

    # What is sent, and what comes back

    async def _client(self, endpoint: Endpoint) -> Any:
        clients, place = self.clients[endpoint], max(self.running[endpoint] - 1, 0) // POOL
        if place >= len(clients):
            clients.append(await self.stack.enter_async_context(endpoint.client()))
        return clients[min(place, len(clients) - 1)]

    async def send(self, endpoint: Endpoint, path: str, body: Mapping[str, Any], limit: float | None = None) -> Any:
        """As `Endpoint.send`."""
        return await endpoint.send(await self._client(endpoint), path, body, limit)

    async def chunks(self, endpoint: Endpoint, body: tuple[str, Mapping[str, Any]], limit: float) -> AsyncGenerator[Any, None]:
        """As `Endpoint.chunks`, and the model checked."""
        async with aclosing(endpoint.chunks(await self._client(endpoint), *body, limit)) as chunks:
            async for chunk in chunks:
                self._check_model(endpoint, chunk.get("model"))
                yield chunk

    async def body(self, endpoint: Endpoint, request: Request, samples: Sequence[int]) -> tuple[str, dict[str, Any]]:
        """The path and fields that ask for consecutive samples of a request. Raises ValueError for one that cannot be asked."""
        kind, generator = endpoint.kind, self.generator
        body = {"model": generator.name, **decoding_fields(kind, self.decoding, first=samples[0], count=len(samples))}
        way = await self.way(endpoint, request) if request.prefix else "flag"
        if way == "template":
            generator.template = load_template(generator.template)
            body |= {"prompt": rendered(request, generator.template), **({"logprobs": 1} if self.decoding.logprobs else {})}
            return COMPLETIONS, body | generator.extra
        body |= chat_fields(kind, request, max_tiles=generator.max_tiles, continued=way == "flag")
        if self.decoding.logprobs:
            body["logprobs"] = True
        return CHAT, body | generator.extra

    async def way(self, endpoint: Endpoint, request: Request) -> str:
        """How this server goes on from this request's prefix: ``flag``, ``itself``, or ``template``."""
        generator = self.generator

        async def ask(fields: Mapping[str, Any]) -> Any:
            data = await self.send(endpoint, CHAT, {"model": generator.name, **fields})
            generator.usage.add(0, *read_usage(data))
            return data

        async with self.asking[endpoint]:
            if endpoint.prefix is None:
                endpoint.prefix = await try_prefix(ask, endpoint.kind)
                generator.notice(f"{endpoint.shown} {CONTINUES.get(endpoint.prefix, endpoint.prefix)}.")
        if endpoint.prefix in CONTINUES:
            return endpoint.prefix
        shows = bool(request.images or request.videos)
        if generator.template is not None and not shows:
            return "template"
        remedy = "Use vLLM, SGLang or LMDeploy."
        if not shows:
            remedy += " Or give template=, the model's tokenizer or its folder: prompts without images are then rendered here."
        raise SettingsError(f"{endpoint.shown} {endpoint.prefix}. {remedy}")

    def checked(self, endpoint: Endpoint, data: Any, wanted: int) -> list[Choice]:
        """All choices of a response, of which some are wanted. Its tokens are counted, also those of a response that is no use.

        Raises FailedError if it is broken, RefusedError if it had no room, ConnectionError for that of another model, and
        SettingsError for one without the log-probs that were asked for.
        """
        tokens, kept = read_usage(data), 0
        try:
            choices = self.choices(endpoint, data)
            self._check_model(endpoint, data.get("model"))
            for choice in choices:
                if choice.finish_reason in ("error", "abort"):
                    raise FailedError(f"{endpoint.shown} ended a response with {choice.finish_reason!r}.", lost=tokens[0] is None)
                if not choice.text and choice.finish_reason == "length" and tokens[1] == 0:
                    raise RefusedError(f"{endpoint.shown} has no room for a response in its context")
                if self.decoding.logprobs and choice.logprobs is None and wanted:
                    raise SettingsError(f"{endpoint.shown} returns no log-probs, and logprobs=True. Leave it out.")
            kept = min(len(choices), wanted)
            return choices
        finally:
            if kept or tokens[0] is not None:
                self.generator.usage.add(kept, *tokens)

    def choices(self, endpoint: Endpoint, data: Any) -> list[Choice]:
        """As `read_choices`. Raises FailedError for a broken response."""
        try:
            return read_choices(data)
        except ValueError as error:
            said = endpoint.clean(f"{endpoint.shown} has sent a broken response: {error}.")
            raise FailedError(said, lost=read_usage(data)[0] is None) from None

    def _check_model(self, endpoint: Endpoint, said: Any) -> None:
        asked = str(self.generator.name)
        if isinstance(said, str) and said and said.lower() not in asked.lower() and asked.lower() not in said.lower():
            raise ConnectionError(
                f"{endpoint.shown} was asked for the model {asked!r} and answers as {said!r}. Give the name of the one that it "
                "has, or start it with the other."
            )


# How a server goes on from a prefix of the response


async def try_prefix(ask: Callable[[Mapping[str, Any]], Awaitable[Any]], kind: Kind) -> str:
    """Find out, by the tokens of prompts, whether a server goes on from a prefix.

    A turn that is closed has the tokens that close it, and those that open the next one. With P(x) tokens for the prefix x,
    2 P(x) - P(x x) - P() is their number; and where the flag is understood, the prompt with it is shorter than without.

    `ask` sends the fields of a chat request, and returns the response. Returns a key of `CONTINUES`, or why it does not.
    """

    async def tokens(prefix: str | None, *, flag: bool = False) -> int | None:
        fields = chat_fields(kind, Request.ask("Is it?", prefix=prefix), continued=flag)
        return read_usage(await ask({**fields, "max_tokens": 1, "temperature": 0.0}))[0]

    try:
        flagged = await tokens(_PROBE, flag=True)
    except RefusedError:  # an unknown field
        flagged = None
    try:
        plain = await tokens(_PROBE)
        if flagged is not None and plain is not None and flagged < plain:
            return "flag"
        counts = [await tokens(None), plain, await tokens(f"{_PROBE}\n{_PROBE}")]
    except RefusedError as error:
        return f"takes no prefix ({error})"
    if None in counts:
        return "does not say how many tokens a prompt has, so whether it goes on from a prefix is not known"
    none, once, twice = (count or 0 for count in counts)
    return "itself" if 2 * once - twice - none <= 0 else "closes a prefix and starts another turn"


def rendered(request: Request, template: Any) -> str:
    """The prompt of a request without images, with its prefix, by the model's tokenizer or processor."""
    from mpo.batching.logprobs import prompt_record
    from mpo.encoding.turns import render
    from mpo.models.control_tokens import added_start

    text = render(prompt_record(request, "the request"), template, sides=()).prompt
    tokenizer = getattr(template, "tokenizer", template)
    # Servers add the tokens that begin a text, which the template has written already.
    return text.removeprefix(tokenizer.bos_token or "") if added_start(tokenizer) else text


def load_template(template: Any) -> Any:
    """A tokenizer or processor, or that of a folder or name. Raises SettingsError if it holds none."""
    if not isinstance(template, str | os.PathLike):
        return template
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(template)
    except (OSError, ValueError) as error:
        raise SettingsError(f"template={template} holds no tokenizer ({error}). Give the model's folder.") from error
