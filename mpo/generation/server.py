"""Generate text with a model on OpenAI-compatible servers: vLLM, SGLang, LMDeploy, `transformers serve`, or a paid API."""

import asyncio
import logging
import os
import re
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AsyncExitStack, aclosing, suppress
from itertools import groupby
from typing import Any, TypeVar

from mpo.generation.dispatch import BLOCKED, Dispatch, Slots
from mpo.generation.endpoint import Endpoint, FailedError, SettingsError
from mpo.generation.generator import (
    Decoding,
    GenerationError,
    Item,
    OnText,
    Request,
    Response,
    Usage,
    checked_requests,
    first_error,
    numbered,
    whole_number,
)
from mpo.generation.wire import KINDS, MAX_CHOICES, OWN_FIELDS, Choice, read_usage

logger = logging.getLogger(__name__)
T = TypeVar("T")
CONCURRENCY = 32
"""Requests at the same time, unless told otherwise."""


class ServerGenerator:
    """Ask a model on one or several servers, many requests at a time.

    What may succeed later is repeated, on another server if there is one: 429 (after the time that the server asks for), 5xx,
    connections that break, responses that are cut short or garbled, timeouts. What a server refuses is not, unless it refuses all:
    then it is left out, which is said once, and the others are asked (`mpo.generation.dispatch`).

    A server has its ways (`mpo.generation.wire`), which are known by what it says of itself, or by `kind`: samples that it does
    not count are asked for one by one; settings that it would ignore are refused; what it finds in a checkpoint's
    generation_config.json is overruled, so that a response is a sample of the model's own distribution. The response with sample
    number i has the seed ``seed + i``; whether a server repeats it in another batch is its matter.

    Args:
        urls: the server's address up to ``/v1``, or several of servers with the same model.
        model: its name; None for the first one that the first server lists.
        concurrency: the largest number of requests at the same time, over all servers and all calls.
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
        self.endpoints = [Endpoint(url, key_variable, timeout) for url in given]
        self.name = model
        self.concurrency: int = whole_number("concurrency", concurrency)
        self.attempts: int = whole_number("attempts", attempts)
        self.max_tiles: int | None = whole_number("max_tiles", max_tiles, optional=True)
        self.timeout, self.total_timeout, self.kind, self.template = timeout, total_timeout, kind, template
        self.extra = dict(extra or {})
        self.usage = Usage(_prices(prices))
        self.notices: list[str] = []
        self.samples_differ = False
        self.slots = Slots()
        self._said: set[str] = set()

    def generate(self, requests: Sequence[Request], **settings: Any) -> list[list[Response]]:
        """Sample responses; see `mpo.generation.generator.Generator.generate`.

        Settings that a server would ignore are refused, and an image that is gone is named before anything is asked. The first
        request that fails for good is raised, with its number; the others are not awaited.
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
        count = whole_number("concurrency", concurrency, optional=True) or self.concurrency
        found: asyncio.Queue[Any] = asyncio.Queue(2 * count)
        items = numbered(requests)
        taking = asyncio.Lock()
        async with AsyncExitStack() as stack:
            run = await Dispatch.start(self, decoding, count, stack)

            async def work() -> None:
                while True:
                    async with taking:
                        taken = await anext(items, None)
                    if taken is None:
                        return
                    number, item = taken
                    request, samples = decoding.samples_of(item)
                    await self._samples(run, number, request, samples, found)
                    await found.join()  # what is paid for is in the caller's hands before anything else is asked

            async def finish() -> None:
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(count):
                            group.create_task(work())
                except BaseExceptionGroup as errors:
                    await found.put(first_error(errors))
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
        """Ask one question and stream its response. What may succeed later is repeated as long as no text has come.

        `on_text` is called with each new part of the text. Raises ConnectionError also for servers that refuse the request.
        """
        decoding = Decoding(**settings)

        def show(text: str) -> None:
            if on_text is not None and text:
                try:
                    on_text(text)
                except Exception as error:  # is the caller's
                    raise GenerationError("") from error

        def ask(run: Dispatch) -> Awaitable[Response]:
            return run.answer(lambda endpoint, limit: self._streamed(run, endpoint, limit, request, show))

        try:
            return _run(lambda: self._connected(decoding, ask))
        except GenerationError as error:
            raise error.__cause__ or ConnectionError(error.reason) from None
        except SettingsError as error:
            raise (ConnectionError(f"{error}") if error.refused else error) from None

    def identity(self) -> dict[str, Any]:
        """The model's name, and what else of this generator decides about its responses."""
        if self.name is None:
            _run(lambda: self._connected(Decoding(), lambda run: asyncio.sleep(0)))
        return {"model": self.name, "max_tiles": self.max_tiles, "extra": self.extra}

    def check_prefix(self, *, images: bool = False) -> None:
        """Find out whether the servers go on from the prefix of a response, which `Request` may have, before anything is asked.

        Raises ValueError for one that does not, with what to do, and ConnectionError for a server that cannot be used.
        """
        request = Request.ask("Is it?", images=[b""] if images else (), prefix="Answer: yes.")

        async def check(run: Dispatch) -> None:
            for endpoint in run.endpoints:
                await run.way(endpoint, request)

        _run(lambda: self._connected(Decoding(), check))

    async def _connected(self, decoding: Decoding, ask: Callable[[Dispatch], Awaitable[T]]) -> T:
        async with AsyncExitStack() as stack:
            return await ask(await Dispatch.start(self, decoding, self.concurrency, stack))

    def notice(self, text: str, *, about: str | None = None) -> None:
        """Say what was found out, once; with `about`, whatever else is said about that."""
        if (about or text) not in self._said:
            self._said.add(about or text)
            self.notices.append(text)
            logger.warning(text)

    async def _samples(
        self, run: Dispatch, number: int, request: Request, samples: Sequence[int], found: asyncio.Queue[Any]
    ) -> None:
        """Put the samples of a request into the queue, as they come; those that cannot be had as errors."""
        texts: dict[int, str] = {}

        async def part(numbers: Sequence[int]) -> None:
            async def attempt(endpoint: Endpoint, limit: float) -> tuple[Endpoint, Any, list[Choice]]:
                data = await run.send(endpoint, *await run.body(endpoint, request, numbers), limit)
                return endpoint, data, run.checked(endpoint, data, len(numbers))

            endpoint, data, choices = await run.answer(attempt, numbers)
            for sample, choice in zip(numbers, choices, strict=False):
                response = _response(run.decoding, choice, data, of_several=len(choices) > 1)
                texts[sample] = response.text
                await found.put((number, sample, response))
            if missing := numbers[len(choices) :]:
                endpoint.ignores_n = True
                self.notice(
                    f"{endpoint.shown} ignores n: {len(choices)} of {len(numbers)} responses came. They are asked for one by one, "
                    "with the seeds seed + i."
                )
                await _all(part([one]) for one in missing)

        counts = all(endpoint.kind.takes_n and not endpoint.ignores_n for endpoint in run.endpoints)
        try:
            await _all(map(part, _runs(samples) if counts else [[sample] for sample in samples]))
        except GenerationError as error:
            for sample in samples:
                if sample not in texts:
                    await found.put((number, sample, error))
        else:
            self._compare(run.decoding, list(texts.values()))

    def _compare(self, decoding: Decoding, texts: Sequence[str]) -> None:
        if decoding.temperature == 0 or len(texts) < 2 or self.samples_differ:
            return
        self.samples_differ = len(set(texts)) > 1
        if not self.samples_differ:
            self.notice(
                f"All {len(texts)} samples of a request are the same at temperature={decoding.temperature}. If that goes on, "
                "the server does not sample. transformers serve needs generation_config='{\"do_sample\": true}' in the request "
                "(kind='transformers' sends it), or \"do_sample\": true in the generation_config.json of the model's folder."
            )

    async def _streamed(self, run: Dispatch, endpoint: Endpoint, limit: float, request: Request, show: OnText) -> Response:
        text, finish, shown = "", None, 0
        logprobs: list[float] = []
        whole: dict[str, Any] = {"choices": []}
        held = max(map(len, run.decoding.stop), default=1) - 1
        try:
            async with aclosing(run.chunks(endpoint, await run.body(endpoint, request, (0,)), limit)) as chunks:
                async for chunk in chunks:
                    whole |= {name: chunk[name] for name in ("model", "usage") if chunk.get(name)}
                    for choice in run.choices(endpoint, chunk) if chunk["choices"] else ():
                        finish = choice.finish_reason or finish
                        text += choice.text
                        logprobs += choice.logprobs or ()
                        ready = run.decoding.before_stop(text)[: len(text) - held]
                        show(ready[shown:])
                        shown = max(shown, len(ready))
            if finish is None:
                raise FailedError(f"{endpoint.shown} ended its response early, or sent none.", lost=True)
            said = {"content": [{"logprob": logprob} for logprob in logprobs]} if logprobs else None
            whole["choices"] = [{"text": text, "finish_reason": finish, "logprobs": said}]
            (choice,) = run.checked(endpoint, whole, 1)
        except FailedError as error:
            error.final = bool(text)
            raise
        response = _response(run.decoding, choice, whole)
        show(response.text[shown:])
        return response


def _response(decoding: Decoding, choice: Choice, data: Any, *, of_several: bool = False) -> Response:
    prompt_tokens, tokens = read_usage(data)
    if of_several:  # of which a server says the sum alone
        tokens = decoding.max_new_tokens if choice.finish_reason == "length" else None
    text = decoding.before_stop(choice.text)
    finish = "stop" if text != choice.text else choice.finish_reason
    return Response(text, finish, prompt_tokens, tokens, choice.logprobs if decoding.logprobs else None)


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


def _prices(given: Any) -> tuple[float, float] | None:
    if given is None:
        return None
    keyed = isinstance(given, Mapping)
    values: list[Any] = [given.get("prompt"), given.get("completion")] if keyed else list(given)
    if len(given) != 2 or not all(isinstance(value, int | float) and 0 <= value < float("inf") for value in values):
        raise ValueError(f"Expected prices of a million prompt tokens and a million completion tokens; got prices={given!r}.")
    return float(values[0]), float(values[1])


def _run(function: Callable[[], Awaitable[T]]) -> T:
    try:
        blocked = asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(function())  # type: ignore[arg-type]
    outer = asyncio.current_task()
    cancelled = outer.cancelling() if outer else 0
    loop = asyncio.new_event_loop()
    task: asyncio.Task[T] = loop.create_task(function())  # type: ignore[arg-type]

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(asyncio.wait([task]))

    BLOCKED.add(blocked)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            while wait([running], 0.1).not_done:
                if outer and outer.cancelling() > cancelled:  # by Ctrl-C, under asyncio.run
                    raise asyncio.CancelledError
        except BaseException:  # Ctrl-C: nothing more is sent
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            BLOCKED.discard(blocked)
    return task.result()
