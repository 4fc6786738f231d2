"""How records flow through steps: many at a time, each model asked ahead, results in the order of the records."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mpo.generation.calling import CALLING, CallingThread, no_stop
from mpo.generation.generator import GenerationError, Request, Response, checked_requests, first_error, whole_number
from mpo.io import StoreError
from mpo.pipelines.ledger import NO_KEY, Ledger, copied, key_of, request_hash

if TYPE_CHECKING:
    from mpo.pipelines.step import Step

Record = dict[str, Any]
"""A record of a pipeline: at least its ``id``, unique in its data set."""
CONCURRENCY = 32
"""Requests at the same time to a generator that does not say how many it takes (`concurrency`)."""
RECORDS_PER_REQUEST = 2
"""Records in hand at the same time, for each request at the same time: the next ones are ready when a response comes."""
SAMPLES_PER_ITEM = 64
"""Samples of a request that are asked for together: of more, those that have come are kept, and Ctrl-C waits for no others."""
MAX_HELD = 4096
"""Maximum number of finished records that wait for an earlier one, so that memory does not grow with the data set."""

log = logging.getLogger(__name__)


class Dropped(Exception):
    """Raised by a step that has no output for a record, with the reason, and further fields of its line among the dropped ones."""

    def __init__(self, reason: str = "", **details: Any) -> None:
        super().__init__(reason)
        self.details = details


class BadStep(TypeError, ValueError):
    """A step that is not written as `mpo.pipelines.step.Step` says: no record is to blame, so that the job stops."""


@dataclass
class Result:
    """What became of a record. Those without an output, it or some made of it, are `dropped`, with the step and the reason."""

    outputs: list[Record] = field(default_factory=list)  # what the last step made of it
    dropped: list[Record] = field(default_factory=list)  # id, input_id, step, reason and record of each
    counts: Counter[str] = field(default_factory=Counter)  # of its records and responses by step, as in `mpo.pipelines.report`
    used: list[int] = field(default_factory=list)  # the first 64 bits of the key of each response's line in the ledger
    failed: bool = False  # it has no output for a reason other than a step's `Dropped`


class _Asked:
    """A request with its responses so far, by sample."""

    def __init__(self, request: Request, about: dict[str, Any], found: list[Response | None], keys: list[str]) -> None:
        self.request, self.about, self.found, self.keys = request, about, found, keys
        self.missing = tuple(sample for sample, response in enumerate(found) if response is None)
        self.left = len(self.missing)
        self.errors: dict[int, GenerationError] = {}
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Flow:
    """Sends records through steps. Responses are kept in the `ledger`, and found again there by what each step is `asked_with`.

    The `concurrency` is the largest number of requests at the same time to each generator; None for its own.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        ledger: Ledger | None = None,
        asked_with: Mapping[str, Any] | None = None,
        concurrency: int | None = None,
    ) -> None:
        self.names, self._asked_with = step_names(steps), asked_with or {}
        self.steps = list(steps)
        self._ledger, self._concurrency = ledger, whole_number("concurrency", concurrency, optional=True)
        self._used = usage(steps)
        self._asking = [(name, step) for name, step in zip(self.names, self.steps, strict=True) if step.generator is not None]
        asked = [getattr(step.generator, "concurrency", CONCURRENCY) for _, step in self._asking]
        self._at_once = RECORDS_PER_REQUEST * (concurrency or max(asked, default=1))
        self._queues: dict[str, asyncio.Queue[_Asked | None]] = {}
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self._calling = CallingThread()
        self._finishing = ThreadPoolExecutor(1, "finish")  # its threads start with its first task

    def run(self, records: Iterable[Record], emit: Callable[[Result], None]) -> None:
        """Send records through the steps; `emit` is called with each result, in the order of the records, from another thread.

        Raises ConnectionError for a server that cannot be used, and KeyboardInterrupt after Ctrl-C, when the responses that were on
        their way have come; a second Ctrl-C does not wait.
        """
        try:
            # a notebook's own thread has a loop already
            with self._interrupts(), ThreadPoolExecutor(1) as pool, self._finishing:
                running = pool.submit(asyncio.run, self._run(records, emit))
                wait: Callable[[Future[None]], object] = self._calling.wait
                raised: BaseException | None = None
                while not running.done():
                    try:
                        wait(running)
                    except BaseException as error:  # of the model, or of a signal's handler, at any place, such as a second Ctrl-C
                        raised, wait = raised or error, Future.exception  # no call is run any more
                        self._stopping = True
                        self._soon(lambda task: task.cancel())
                if raised is not None:
                    raise raised
                try:
                    running.result()
                except BaseExceptionGroup as group:
                    raise first_error(group) from None
        finally:
            with suppress(OSError):  # of a full disk, which has raised its own
                self._keep()
        if self._stopping:
            raise KeyboardInterrupt

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Where a signal raises KeyboardInterrupt, the first one does not: what a model works on in this thread is finished."""

        def stop(*_: Any) -> None:
            if self._stopping:
                raise KeyboardInterrupt
            self._stopping = True
            self._soon(lambda _: self._close())

        in_first = threading.current_thread() is threading.main_thread()
        both = [one for one in (signal.SIGINT, signal.SIGTERM) if in_first and signal.getsignal(one) is signal.default_int_handler]
        for one in both:
            signal.signal(one, stop)
        try:
            yield
        finally:
            for one in both:
                signal.signal(one, signal.default_int_handler)

    def _soon(self, do: Callable[[asyncio.Task[None]], object]) -> None:
        if self._task is not None:
            with suppress(RuntimeError):  # it has ended
                self._task.get_loop().call_soon_threadsafe(do, self._task)

    async def _run(self, records: Iterable[Record], emit: Callable[[Result], None]) -> None:
        self._task = asyncio.current_task()
        CALLING.set(self._calling)
        self._queues = {name: asyncio.Queue() for name, _ in self._asking}
        held: dict[int, Result] = {}
        started = emitted = 0
        active, room = asyncio.Semaphore(self._at_once), asyncio.Semaphore(self._at_once + MAX_HELD)

        async def one(number: int, record: Record) -> None:
            nonlocal emitted
            try:
                held[number] = await self._through(record)
            except asyncio.CancelledError:
                room.release()
                raise
            finally:
                active.release()
            while emitted in held:
                emit(held.pop(emitted))
                emitted += 1
                room.release()

        async with asyncio.TaskGroup() as asking:
            for name, step in self._asking:
                asking.create_task(self._ask_all(step, self._queues[name]))
            async with asyncio.TaskGroup() as working:
                for record in records:
                    await room.acquire()
                    await active.acquire()
                    if self._stopping:
                        break
                    working.create_task(one(started, record))
                    started += 1
            self._close()
        if emitted < started and not self._stopping:
            raise RuntimeError(f"{started - emitted} records got neither responses nor an error from their generator.")

    def _close(self) -> None:
        for queue in self._queues.values():
            queue.put_nowait(None)

    async def _through(self, record: Record) -> Result:
        result = Result(counts=Counter(records=1))
        current = [record]
        for name, step in zip(self.names, self.steps, strict=True):
            result.counts[f"{name}/in"] += len(current)
            found = await asyncio.gather(*(self._apply(name, step, one, result) for one in current))
            following: list[Record] = []
            for given, outputs in zip(current, found, strict=True):
                if isinstance(outputs, Exception):
                    reason = str(outputs) or type(outputs).__name__
                    why = {"step": name, "reason": reason, **getattr(outputs, "details", {})}
                    result.dropped.append({"id": given["id"], "input_id": record["id"], **why, "record": given})
                    result.counts[f"{name}/dropped"] += 1
                    result.failed |= not isinstance(outputs, Dropped)
                    continue
                following += [{**output, "input_id": record["id"]} for output in outputs]
                if step.measure is not None:
                    values = [float(output[step.measure]) for output in outputs if output.get(step.measure) is not None]
                    result.counts[f"{name}/{step.measure}/sum"] += sum(values)  # type: ignore[assignment]
                    result.counts[f"{name}/{step.measure}/number"] += len(values)
            result.counts[f"{name}/out"] += len(following)
            current = following
        result.outputs = current
        result.failed &= not current
        result.counts["output" if current else "dropped"] += 1
        return result

    async def _apply(self, name: str, step: Step, record: Record, result: Result) -> list[Record] | Exception:
        try:
            requests = requests_of(step, record)
            asked = (self._ask(name, step, record["id"], place, request, result) for place, request in enumerate(requests))
            responses: list[Any] = await asyncio.gather(*asked, return_exceptions=True)  # each counts, also where another one fails
            if error := next((one for one in responses if isinstance(one, BaseException)), None):
                raise error
            if step.slow:
                loop = asyncio.get_running_loop()  # which it must not hold up
                return await loop.run_in_executor(self._finishing, no_stop, finished, step, record, responses)
            return finished(step, record, responses)
        except (BadStep, StoreError):
            raise
        except (Dropped, GenerationError, ValueError) as error:
            return error
        except Exception as error:
            error.add_note(f"in step {name!r}, for record {record['id']!r}")
            raise

    async def _ask(self, name: str, step: Step, record_id: str, number: int, request: Request, result: Result) -> list[Response]:
        about: dict[str, Any] = {"record": record_id, "step": name, "number": number}
        if step.generator is None:
            raise BadStep(f"Step {name!r} has requests and no generator.")
        found: list[Response | None] = [None] * step.sampling.get("n", 1)
        keys: list[str] = []
        if self._ledger is not None:
            about["request"] = request_hash(request, self._asked_with.get(name))
            for sample in range(len(found)):
                own, shared = (key_of(whose, name, number, about["request"], sample) for whose in (record_id, ""))
                kept = self._ledger.get(own) or self._ledger.get(shared)
                keys.append(kept[0] if kept else own)
                found[sample] = kept[1] if kept else None
        asked = _Asked(request, about, found, keys)
        if asked.missing:
            if self._stopping:  # nobody takes it any more
                raise asyncio.CancelledError
            self._queues[name].put_nowait(asked)
            await asked.done
        whole = [response for response in asked.found if response is not None]
        result.used += [int(key[:16], 16) for key, one in zip(keys, asked.found, strict=bool(keys)) if one is not None]
        result.counts[f"{name}/responses"] += len(whole)
        for response in whole:
            result.counts[f"{name}/finish_reason/{response.finish_reason}"] += 1
        if asked.errors:
            raise asked.errors[min(asked.errors)]
        return whole

    def _keep(self, answer: Response | None = None, key: str = NO_KEY, about: Mapping[str, Any] | None = None) -> None:
        """Append a response to the ledger with what the generators have used since the one before, or only that, if anything."""
        if self._ledger is None:
            return
        used = usage(self.steps)
        if answer is not None or used != self._used:
            self._ledger.append(key, about or {}, answer, used - self._used)
        self._used = used

    async def _ask_all(self, step: Step, queue: asyncio.Queue[_Asked | None]) -> None:
        """Send the requests of a queue to the step's generator until the queue ends, and keep every response as it comes."""
        pending: dict[int, tuple[_Asked, set[int]]] = {}  # what an item of the stream asks, and the samples that have not come
        begun: set[_Asked] = set()
        first = await queue.get()
        if first is None:  # nothing is asked, for which no server is needed
            return

        async def items() -> AsyncIterator[tuple[Request, Sequence[int]]]:
            number = 0
            asked: _Asked | None = first
            while asked is not None:
                begun.add(asked)
                for start in range(0, len(asked.missing), SAMPLES_PER_ITEM):
                    if self._stopping:
                        return
                    samples = asked.missing[start : start + SAMPLES_PER_ITEM]
                    pending[number] = asked, {*samples}
                    yield asked.request, samples
                    number += 1
                asked = await queue.get()

        assert step.generator is not None
        settings = {"concurrency": self._concurrency, **step.sampling}
        try:
            async for number, sample, answer in step.generator.stream(items(), **settings):
                asked, samples = pending[number]
                samples.remove(sample)
                if not samples:
                    del pending[number]
                self._take(asked, sample, answer)
                if not asked.left:
                    begun.remove(asked)
        except asyncio.CancelledError as error:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise
            raise RuntimeError(f"The generator of step {step.verb!r} has cancelled itself.") from error  # not to wait forever
        for asked in begun:
            asked.done.cancel()
        while not queue.empty():
            if (left := queue.get_nowait()) is not None:
                left.done.cancel()

    def _take(self, asked: _Asked, sample: int, answer: Response | GenerationError) -> None:
        if isinstance(answer, Response):
            # before anything else: what is paid for is on disk when the next one is asked
            self._keep(answer, asked.keys[sample] if asked.keys else NO_KEY, {**asked.about, "sample": sample})
            asked.found[sample] = answer
        else:
            asked.errors[sample] = answer
        asked.left -= 1
        if not asked.left and not asked.done.done():  # nobody waits after an error elsewhere
            asked.done.set_result(None)


def requests_of(step: Step, record: Record) -> list[Request]:
    """What a step asks about a copy of a record. Raises BadStep for anything but a request or several."""
    found = step.requests(copied(record))
    try:
        return [found] if isinstance(found, Request) else checked_requests(found)
    except ValueError as error:
        raise BadStep(f"Step {step.verb!r} must return a list of requests: {error}") from None


def finished(step: Step, record: Record, responses: Sequence[Sequence[Response]]) -> list[Record]:
    """What a step makes of a copy of a record, with ids: the record's own or, if there may be several, ``ID/0``, ``ID/1``, ...

    Raises what the step raises, and BadStep for outputs of another type than it says, and a measure that is no finite number.
    """
    found = step.finish(copied(record), responses)
    each = found if isinstance(found, list) else [found]
    if isinstance(found, list) != step.many or not each or not all(isinstance(one, dict) for one in each):
        expected = "a list of records" if step.many else "one record"
        raise BadStep(f"Step {step.verb!r} must return {expected} or raise Dropped with the reason; got {found!r:.80}.")
    for value in [one.get(step.measure) for one in each if step.measure is not None]:
        if value is not None and not _is_number(value):
            raise BadStep(
                f"Step {step.verb!r} measures {step.measure!r}, which is {value!r:.80} for record {record['id']!r}. Expected a "
                "finite number, a boolean, or None, which is not counted."
            )
    return [{**one, "id": f"{record['id']}/{place}" if step.many else record["id"]} for place, one in enumerate(each)]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, str | bytes) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def step_names(steps: Sequence[Step]) -> list[str]:
    """Name steps by their verbs; of several with the same verb, the later ones are numbered. Raises ValueError for bad ones."""
    if not isinstance(steps, Sequence) or not steps:
        raise ValueError(f"Expected a list of one step or more; got {steps!r:.80}.")
    verbs: list[Any] = [getattr(step, "verb", None) for step in steps]
    for step, verb in zip(steps, verbs, strict=True):
        if isinstance(step, type) or not hasattr(step, "finish"):
            raise BadStep(f"Expected a step, an instance of a subclass of Step; got {step!r:.80}.")
        if not isinstance(verb, str) or not verb or "/" in verb:
            raise BadStep(f"The step {type(step).__name__} has the verb {verb!r}. Give it a word without a slash.")
    names = [f"{verb}_{number}" if (number := verbs[:at].count(verb) + 1) > 1 else verb for at, verb in enumerate(verbs)]
    if len({*names}) < len(names):
        raise BadStep(f"Two of the steps {', '.join(names)} have the same name. Give one another verb.")
    return names


def usage(steps: Sequence[Step]) -> Counter[str]:
    """What the generators of steps have used in this process so far."""
    total: Counter[str] = Counter()
    for one in {id(step.generator): getattr(step.generator, "usage", None) for step in steps}.values():
        for name in ("requests", "responses", "prompt_tokens", "completion_tokens", "cost", "unknown", "lost"):
            if value := getattr(one, name, None):
                total[name] += value
    return total
