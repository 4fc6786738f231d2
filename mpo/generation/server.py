"""Generate text with a model on OpenAI-compatible servers: vLLM, SGLang, LMDeploy, `transformers serve`, or a paid API."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from itertools import groupby
from typing import Any, TypeVar

from mpo.generation.endpoint import CHAT, COMPLETIONS, Endpoint, FailedError, RefusedError, SettingsError, explained
from mpo.generation.generator import (
    Decoding,
    GenerationError,
    Item,
    OnText,
    Request,
    Response,
    Usage,
    checked_concurrency,
    checked_requests,
    numbered,
)
from mpo.generation.wire import (
    KINDS,
    MAX_CHOICES,
    OWN_FIELDS,
    Choice,
    chat_fields,
    check_understood,
    decoding_fields,
    read_choices,
    read_usage,
)

logger = logging.getLogger(__name__)
T = TypeVar("T")
Tokens = tuple[int | None, int | None]
"""Numbers of prompt and completion tokens, as far as a server says them."""
CONCURRENCY = 32
"""Requests at the same time, unless told otherwise."""
POOL = 16
"""Connections of one client: a request's cost grows with them, since httpx looks through all of its pool."""
LONGEST_WAIT = 30.0
"""In seconds, between two attempts, unless the server asks for a longer one."""


class ServerGenerator:
    """Ask a model on one or several servers, many requests at a time.

    What may succeed later is repeated, on another server if there is one: 429 (after the time that the server asks for), 5xx,
    connections that break, responses that are cut short or garbled, timeouts. What the server refuses is not. Of what fails for
    good, the request's own fault is told from the server's by a request that any server answers.

    A server has its ways (`mpo.generation.wire`), which are known by what it says of itself, or by `kind`: samples that it does
    not count are asked for one by one; settings that it would ignore are refused; what it finds in a checkpoint's
    generation_config.json is overruled, so that a response is a sample of the model's own distribution. The response with sample
    number i has the seed ``seed + i``; whether a server repeats it in another batch is its matter.

    Args:
        urls: the server's address up to ``/v1``, or several of servers with the same model.
        model: its name; None for the first one that the first server lists.
        concurrency: the largest number of requests at the same time, over all servers.
        timeout: seconds that a response may take.
        total_timeout: seconds that a request may take with all attempts.
        attempts: the largest number of attempts of a request, without those that a rate limit (429) turned away.
        max_tiles: the largest number of tiles of an image; None for the server's own limit.
        template: the model's tokenizer or processor, or its folder or name: it renders prompts of requests that have a prefix and
            no image, for servers that cannot go on from a prefix otherwise.
        prices: of a million prompt tokens and a million completion tokens, for `usage`.
        kind: ``vllm``, ``sglang``, ``lmdeploy``, ``transformers`` or ``other``, where a server does not say what it is.
        key_variable: the environment variable with the key; a server without one needs none.
        extra: further fields of every request, as the server takes them.

    Attributes:
        usage: requests, tokens and cost so far.
        notices: what was found out about the servers, each also logged once.

    Raises:
        ValueError: for an invalid argument, and a package that is not installed.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        model: str | None = None,
        *,
        concurrency: int = CONCURRENCY,
        timeout: float = 600.0,
        total_timeout: float = 3600.0,
        attempts: int = 8,
        max_tiles: int | None = None,
        template: Any = None,
        prices: Sequence[float] | Mapping[str, float] | None = None,
        kind: str | None = None,
        key_variable: str = "OPENAI_API_KEY",
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import openai  # noqa: F401
        except ModuleNotFoundError:
            raise ValueError("A server needs the package openai: pip install 'mpo-trainer[server]'.") from None
        given = list(urls) if isinstance(urls, Sequence) and not isinstance(urls, str) else [urls]
        if not given or len(set(given)) < len(given):
            raise ValueError(f"Expected the address of a server, or several different ones; got {len(given)} of {len(set(given))}.")
        if model is not None and (not isinstance(model, str) or not model):
            raise ValueError(f"Expected the model's name, or None for the server's first; got model={model!r}.")
        if extra is not None and (not isinstance(extra, Mapping) or (taken := sorted(OWN_FIELDS & set(extra)))):
            found = extra if not isinstance(extra, Mapping) else ", ".join(taken)
            raise ValueError(f"Expected fields in extra that the generator does not set itself; got {found}. Use its own settings.")
        if kind is not None and kind not in KINDS:
            raise ValueError(f"Expected kind to be one of {', '.join(KINDS)}; got kind={kind!r}.")
        if not isinstance(key_variable, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key_variable):
            raise ValueError("key_variable is the name of an environment variable, such as OPENAI_API_KEY, not the key itself.")
        for name, value in (("timeout", timeout), ("total_timeout", total_timeout)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"Expected {name} to be a number of seconds above 0; got {name}={value!r}.")
        for name, whole in (("concurrency", concurrency), ("attempts", attempts), ("max_tiles", max_tiles)):
            if (whole is not None or name != "max_tiles") and (isinstance(whole, bool) or not isinstance(whole, int) or whole < 1):
                raise ValueError(f"Expected {name} to be a whole number of 1 or more; got {name}={whole!r}.")
        self.endpoints = [Endpoint(url, key_variable, timeout) for url in given]
        self.name = model
        self.concurrency, self.timeout, self.total_timeout, self.attempts = concurrency, timeout, total_timeout, attempts
        self.max_tiles, self.kind, self.template = max_tiles, kind, template
        self.extra = dict(extra or {})
        self.usage = Usage(_prices(prices))
        self.notices: list[str] = []
        self.samples_differ = False

    def generate(self, requests: Sequence[Request], **settings: Any) -> list[list[Response]]:
        """Sample responses; see `mpo.generation.generator.Generator.generate`.

        Raises:
            ValueError: for invalid arguments, settings that a server would ignore, and an image that is gone (before anything is
                asked).
            GenerationError: for the first request that fails for good, with its number; the others are not awaited.
            ConnectionError: for a server that cannot be reached or used at all.
        """
        decoding, requests = Decoding(**settings), checked_requests(requests)
        for number, request in enumerate(requests):
            for image in (*request.images, *request.videos):
                if isinstance(image, str | os.PathLike) and not os.path.isfile(image):
                    raise ValueError(f"request {number}: there is no file {os.fspath(image)!r}. Give the path of an image.")
        found: list[list[Any]] = [[None] * decoding.n for _ in requests]

        async def collect() -> None:
            async with aclosing(self.stream(requests, **settings)) as responses:
                async for number, sample, response in responses:
                    if isinstance(response, GenerationError):
                        raise GenerationError(f"request {number}: {response.reason}")
                    found[number][sample] = response

        if requests:
            _run(collect)
        return found

    async def stream(
        self, requests: Iterable[Item] | AsyncIterable[Item], *, concurrency: int | None = None, **settings: Any
    ) -> AsyncGenerator[tuple[int, int, Response | GenerationError], None]:
        """Sample responses as they are asked for; see `mpo.generation.generator.Generator.stream`."""
        decoding = Decoding(**settings)
        count = checked_concurrency(concurrency) or self.concurrency
        found: asyncio.Queue[Any] = asyncio.Queue(2 * count)
        items = numbered(requests)
        taking = asyncio.Lock()
        async with AsyncExitStack() as stack:
            run = await _Run.start(self, decoding, count, stack)

            async def work() -> None:
                while True:
                    async with taking:
                        taken = await anext(items, None)
                    if taken is None:
                        return
                    number, item = taken
                    request, samples = decoding.samples_of(item)
                    await run.ask(number, request, samples, found)
                    await found.join()  # what is paid for is in the caller's hands before anything else is asked

            async def finish() -> None:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(count):
                            group.create_task(work())
                except BaseExceptionGroup as errors:
                    await found.put(_first(errors))
                else:
                    await found.put(None)

            worker = asyncio.create_task(finish())
            try:
                while (one := await found.get()) is not None:
                    if isinstance(one, BaseException):
                        raise one
                    yield one
                    found.task_done()
            finally:
                worker.cancel()
                await asyncio.gather(worker, return_exceptions=True)

    def ask(self, request: Request, *, on_text: OnText | None = None, **settings: Any) -> Response:
        """Ask one question, once, and stream its response.

        Args:
            request: what to ask.
            on_text: called with each new part of the response's text.
            settings: those of `generate`, without `n`.

        Raises:
            ValueError: for invalid arguments, and for an image that cannot be opened.
            ConnectionError: for a server that cannot be reached or refuses the request, with its reason.
        """
        decoding = Decoding(**settings)

        async def ask() -> Response:
            async with AsyncExitStack() as stack:
                run = await _Run.start(self, decoding, 1, stack)
                return await run.streamed(request, on_text)

        return _run(ask)

    def identity(self) -> dict[str, Any]:
        """The model's name, and what else of this generator decides about its responses."""
        if self.name is None:
            _run(self._connect)
        return {"model": self.name, "max_tiles": self.max_tiles, "extra": self.extra}

    async def _connect(self) -> None:
        async with AsyncExitStack() as stack:
            await _Run.start(self, Decoding(), 1, stack)

    def notice(self, text: str) -> None:
        """Say what was found out, once."""
        if text not in self.notices:
            self.notices.append(text)
            logger.warning(text)


class _Run:
    """One stream of a generator: its clients, which belong to an event loop, and its settings."""

    def __init__(self, generator: ServerGenerator, decoding: Decoding, concurrency: int, stack: AsyncExitStack) -> None:
        self.generator, self.decoding, self.stack = generator, decoding, stack
        self.endpoints: list[Endpoint] = []
        self.clients: dict[Endpoint, list[Any]] = {}
        self.slots = asyncio.Semaphore(concurrency)
        self.proven = False  # a request with these settings was answered
        self.judging = asyncio.Lock()

    @classmethod
    async def start(cls, generator: ServerGenerator, decoding: Decoding, concurrency: int, stack: AsyncExitStack) -> _Run:
        """Connect to the servers.

        Raises:
            ConnectionError: if none can be reached, or one has another model.
            ValueError: for settings that one of them would ignore.
        """
        run = cls(generator, decoding, concurrency, stack)
        failures = []
        for endpoint in generator.endpoints:
            run.clients[endpoint] = []
            endpoint.running, endpoint.probing = 0, asyncio.Lock()
            try:
                if endpoint.kind is None:
                    generator.name = await endpoint.introduce(await run._client(endpoint), generator.name, generator.kind)
                run.endpoints.append(endpoint)
            except FailedError as error:
                failures.append(f"{error}")
        if not run.endpoints:
            raise ConnectionError(failures[0])
        for failure in failures:
            generator.notice(f"{failure} The others are asked.")
        for endpoint in run.endpoints:
            check_understood(endpoint.kind or KINDS["other"], endpoint.shown, decoding, generator.max_tiles)
        return run

    async def _client(self, endpoint: Endpoint) -> Any:
        """A client with few enough requests."""
        clients, place = self.clients[endpoint], max(endpoint.running - 1, 0) // POOL
        if place >= len(clients):
            clients.append(await self.stack.enter_async_context(endpoint.client()))
        return clients[min(place, len(clients) - 1)]

    async def ask(self, number: int, request: Request, samples: Sequence[int], found: asyncio.Queue[Any]) -> None:
        """Put the samples of a request into the queue, as they come; those that cannot be had as errors."""
        texts: dict[int, str] = {}

        async def part(numbers: Sequence[int]) -> None:
            endpoint, choices, (prompt_tokens, completion_tokens) = await self._answered(request, numbers)
            self.generator.usage.add(min(len(choices), len(numbers)), prompt_tokens, completion_tokens)
            limit = self.decoding.max_new_tokens
            for sample, choice in zip(numbers, choices, strict=False):
                # Of several choices a server says the sum alone.
                several = limit if choice.finish_reason == "length" else None
                response = self._response(endpoint, choice, prompt_tokens, completion_tokens if len(choices) == 1 else several)
                texts[sample] = response.text
                await found.put((number, sample, response))
            if missing := numbers[len(choices) :]:
                endpoint.ignores_n = True
                self.generator.notice(
                    f"{endpoint.shown} ignores n: {len(choices)} of {len(numbers)} responses came. They are asked for one by one, "
                    "with the seeds seed + i."
                )
                await _all(part([one]) for one in missing)

        counts = all(endpoint.kind is not None and endpoint.kind.takes_n and not endpoint.ignores_n for endpoint in self.endpoints)
        try:
            await _all(map(part, _runs(samples) if counts else [[sample] for sample in samples]))
        except GenerationError as error:
            for sample in samples:
                if sample not in texts:
                    await found.put((number, sample, error))
        else:
            self._compare(list(texts.values()))

    def _response(self, endpoint: Endpoint, choice: Choice, prompt_tokens: int | None, tokens: int | None) -> Response:
        if self.decoding.logprobs and choice.logprobs is None:
            raise SettingsError(f"{endpoint.shown} returns no log-probs, and logprobs=True. Leave it out.")
        text = self.decoding.before_stop(choice.text)
        finish = "stop" if text != choice.text else choice.finish_reason
        return Response(text, finish, prompt_tokens, tokens, choice.logprobs if self.decoding.logprobs else None)

    def _compare(self, texts: Sequence[str]) -> None:
        """Say so once if all samples of a request are equal, unless those of another one were not."""
        generator = self.generator
        if self.decoding.temperature == 0 or len(texts) < 2 or generator.samples_differ:
            return
        generator.samples_differ = len(set(texts)) > 1
        if not generator.samples_differ:
            generator.notice(
                f"All {len(texts)} samples of a request are the same at temperature={self.decoding.temperature}. If that goes on, "
                "the server does not sample. transformers serve needs generation_config='{\"do_sample\": true}' in the request "
                "(kind='transformers' sends it), or \"do_sample\": true in the generation_config.json of the model's folder."
            )

    async def _answered(self, request: Request, samples: Sequence[int]) -> tuple[Endpoint, list[Choice], Tokens]:
        """Ask for consecutive samples, until there is a response: the server, all choices that it sent, and their tokens.

        Raises:
            GenerationError: when the request is at fault.
            ConnectionError: when the servers are.
            SettingsError: when the settings are.
        """
        generator = self.generator
        end = time.monotonic() + generator.total_timeout
        attempts, waits, last = 0, 0, "no server is free"
        avoid: dict[Endpoint, float] = {}
        async with self.slots:
            while True:
                endpoint = await self._free(avoid, end)
                if endpoint is None or attempts >= generator.attempts:
                    await self._judge(last, refused=False)
                    raise GenerationError(f"{last} Given up after {attempts or waits} attempts.")
                endpoint.running += 1
                try:
                    path, body = await self._body(endpoint, request, samples)
                    limit = min(max(end - time.monotonic(), 0.1), generator.timeout)
                    data = await endpoint.send(await self._client(endpoint), path, body, limit)
                    choices = self._checked(endpoint, data)
                    self.proven = True
                    return endpoint, choices, read_usage(data)
                except RefusedError as error:
                    await self._judge(f"{error}", refused=True)
                    raise GenerationError(explained(f"{error}")) from None
                except FailedError as error:
                    last = f"{error}"
                    attempts += not error.limited
                    wait = error.after if error.after is not None else min(0.5 * 2**waits, LONGEST_WAIT)
                    waits += 1
                    avoid[endpoint] = time.monotonic() + wait
                    if error.limited or error.unreachable:  # for other requests as well
                        endpoint.rests_until = max(endpoint.rests_until, avoid[endpoint])
                except ConnectionError as error:  # this server cannot be used, and others may
                    if endpoint in self.endpoints:
                        if len(self.endpoints) == 1:
                            raise
                        self.endpoints.remove(endpoint)
                        generator.notice(f"{error} The others are asked.")
                except SettingsError:
                    raise
                except ValueError as error:  # of an image
                    raise GenerationError(f"{error}") from None
                finally:
                    endpoint.running -= 1

    async def _free(self, avoid: Mapping[Endpoint, float], end: float) -> Endpoint | None:
        """The server with the fewest requests, among those that need not be left alone; None if there is none before `end`."""
        while True:
            now = time.monotonic()
            free = {endpoint: max(endpoint.rests_until, avoid.get(endpoint, 0.0)) for endpoint in self.endpoints}
            first = min(free.values())
            if max(first, now) >= end:
                return None
            if first <= now:
                return min((endpoint for endpoint in free if free[endpoint] <= now), key=lambda endpoint: endpoint.running)
            await asyncio.sleep(first - now)

    def _choices(self, endpoint: Endpoint, data: Any) -> list[Choice]:
        try:
            return read_choices(data)
        except ValueError as error:
            raise FailedError(endpoint.clean(f"{endpoint.shown} has sent a broken response: {error}.")) from None

    def _checked(self, endpoint: Endpoint, data: Any) -> list[Choice]:
        choices = self._choices(endpoint, data)
        self._check_model(endpoint, data.get("model"))
        for choice in choices:
            if choice.finish_reason in ("error", "abort"):
                raise FailedError(f"{endpoint.shown} ended a response with {choice.finish_reason!r}.")
            if not choice.text and choice.finish_reason == "length" and read_usage(data)[1] == 0:
                raise RefusedError(f"{endpoint.shown} has no room for a response in its context")
        return choices

    def _check_model(self, endpoint: Endpoint, said: Any) -> None:
        asked = str(self.generator.name)
        if isinstance(said, str) and said and said.lower() not in asked.lower() and asked.lower() not in said.lower():
            raise ConnectionError(
                f"{endpoint.shown} was asked for the model {asked!r} and answers as {said!r}. Give the name of the one that it "
                "has, or start it with the other."
            )

    async def _judge(self, reason: str, *, refused: bool) -> None:
        """Find out whose fault it is that a request fails for good: return if it is the request's.

        Raises:
            ConnectionError: if the servers answer nothing else either.
            SettingsError: if they refuse the settings.
        """
        async with self.judging:
            if self.proven and refused:
                return
            for endpoint in sorted(self.endpoints, key=lambda endpoint: endpoint.rests_until):
                path, body = await self._body(endpoint, Request.ask("Say yes."), (0,))
                most, kind = self.generator.max_tiles, endpoint.kind
                if most is not None and kind is not None and kind.tiles == "mm_processor_kwargs":  # with images alone otherwise
                    body["mm_processor_kwargs"] = {"max_dynamic_patch": most}
                if not refused:  # otherwise the length of the response may be what is refused
                    body["max_tokens"] = 1
                try:
                    self._checked(endpoint, await endpoint.send(await self._client(endpoint), path, body))
                    self.proven = True
                    return
                except RefusedError as error:
                    raise SettingsError(f"{explained(f'{error}')} So is every request with these settings.") from None
                except FailedError:
                    continue
        raise ConnectionError(f"{reason} No other request is answered either.")

    # What is sent

    async def _body(self, endpoint: Endpoint, request: Request, samples: Sequence[int]) -> tuple[str, dict[str, Any]]:
        kind = endpoint.kind or KINDS["other"]
        body = {"model": self.generator.name, **decoding_fields(kind, self.decoding, first=samples[0], count=len(samples))}
        way = await self._way(endpoint, request) if request.prefix else "flag"
        if way == "template":
            body |= {"prompt": self._rendered(request), **({"logprobs": 1} if self.decoding.logprobs else {})}
            return COMPLETIONS, body | self.generator.extra
        body |= chat_fields(kind, request, max_tiles=self.generator.max_tiles, continued=way == "flag")
        if self.decoding.logprobs:
            body["logprobs"] = True
        return CHAT, body | self.generator.extra

    async def _way(self, endpoint: Endpoint, request: Request) -> str:
        """How this server goes on from this request's prefix: ``flag``, ``itself``, or ``template``.

        Raises:
            SettingsError: if it does not.
        """
        async with endpoint.probing:
            if endpoint.prefix is None:
                endpoint.prefix = await endpoint.try_prefix(await self._client(endpoint), str(self.generator.name))
                ways = {"flag": "goes on from a prefix with continue_final_message", "itself": "goes on from a prefix by itself"}
                self.generator.notice(f"{endpoint.shown} {ways.get(endpoint.prefix, endpoint.prefix)}.")
        if endpoint.prefix in ("flag", "itself"):
            return endpoint.prefix
        shows = bool(request.images or request.videos)
        if self.generator.template is not None and not shows:
            return "template"
        remedy = "Use vLLM, SGLang or LMDeploy."
        if not shows:
            remedy += " Or give template=, the model's tokenizer or its folder: prompts without images are then rendered here."
        raise SettingsError(f"{endpoint.shown} {endpoint.prefix}. {remedy}")

    def _rendered(self, request: Request) -> str:
        """The prompt of a request without images, with its prefix, by the template."""
        from transformers import AutoTokenizer

        from mpo.batching.logprobs import prompt_record
        from mpo.encoding.turns import render
        from mpo.models.control_tokens import added_start

        template = self.generator.template
        if isinstance(template, str | os.PathLike):
            try:
                template = self.generator.template = AutoTokenizer.from_pretrained(template)
            except (OSError, ValueError) as error:
                raise SettingsError(f"template={template} holds no tokenizer ({error}). Give the model's folder.") from error
        text = render(prompt_record(request, "the request"), template, sides=()).prompt
        tokenizer = getattr(template, "tokenizer", template)
        # Servers add the tokens that begin a text, which the template has written already.
        return text.removeprefix(tokenizer.bos_token or "") if added_start(tokenizer) else text

    async def streamed(self, request: Request, on_text: OnText | None) -> Response:
        """Ask once, and pass on the text as it comes."""
        endpoint = self.endpoints[0]
        text, finish, shown = "", None, 0
        logprobs: list[float] = []
        whole: dict[str, Any] = {"choices": []}
        held = max(map(len, self.decoding.stop), default=1) - 1
        try:
            path, body = await self._body(endpoint, request, (0,))
            limit = min(self.generator.timeout, self.generator.total_timeout)
            async with aclosing(endpoint.chunks(await self._client(endpoint), path, body, limit)) as chunks:
                async for chunk in chunks:
                    whole |= {name: chunk[name] for name in ("model", "usage") if chunk.get(name)}
                    self._check_model(endpoint, chunk.get("model"))
                    for choice in self._choices(endpoint, chunk) if chunk["choices"] else ():
                        finish = choice.finish_reason or finish
                        text += choice.text
                        logprobs += choice.logprobs or ()
                        ready = self.decoding.before_stop(text)[: len(text) - held]
                        if on_text is not None and len(ready) > shown:
                            on_text(ready[shown:])
                            shown = len(ready)
            if finish is None:
                raise FailedError(f"{endpoint.shown} broke off its response, or sent none.")
            whole["choices"] = [{"text": text, "finish_reason": finish}]
            self._checked(endpoint, whole)
        except FailedError as error:
            raise ConnectionError(f"{error}") from None
        except RefusedError as error:
            raise ConnectionError(explained(f"{error}")) from None
        counts = read_usage(whole)
        self.generator.usage.add(1, *counts)
        response = self._response(endpoint, Choice(text, finish, tuple(logprobs) or None), *counts)
        if on_text is not None and len(response.text) > shown:
            on_text(response.text[shown:])
        return response


async def _all(tasks: Iterable[Awaitable[None]]) -> None:
    """Wait for all of them; then raise the first error, if any, one of the whole server before one of a request."""
    errors = [error for error in await asyncio.gather(*tasks, return_exceptions=True) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, GenerationError)):
        raise error


def _runs(samples: Sequence[int]) -> list[list[int]]:
    """Consecutive sample numbers, together up to `MAX_CHOICES`.

    >>> _runs([0, 1, 3, 4, 6])
    [[0, 1], [3, 4], [6]]
    """
    runs = [[one for _, one in group] for _, group in groupby(enumerate(sorted(samples)), key=lambda pair: pair[1] - pair[0])]
    return [run[first : first + MAX_CHOICES] for run in runs for first in range(0, len(run), MAX_CHOICES)]


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _prices(given: Any) -> tuple[float, float] | None:
    if given is None:
        return None
    keyed = isinstance(given, Mapping)
    values: list[Any] = [given.get("prompt"), given.get("completion")] if keyed else list(given)
    if len(given) != 2 or not all(isinstance(value, int | float) and 0 <= value < float("inf") for value in values):
        raise ValueError(f"Expected prices of a million prompt tokens and a million completion tokens; got prices={given!r}.")
    return float(values[0]), float(values[1])


def _run(function: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine to its end, also where an event loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(function())  # type: ignore[arg-type]
    outer = asyncio.current_task()
    cancelled = outer.cancelling() if outer else 0
    loop = asyncio.new_event_loop()
    task: asyncio.Task[T] = loop.create_task(function())  # type: ignore[arg-type]

    async def result() -> None:
        await asyncio.wait([task])

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(result())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
            if outer and outer.cancelling() > cancelled:  # by Ctrl-C, under asyncio.run
                raise asyncio.CancelledError
    except BaseException:  # Ctrl-C: nothing more is sent
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
        raise
    return task.result()
