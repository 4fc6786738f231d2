"""Run a model in the thread that waits for its responses."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class CallingThread:
    """A thread that waits for an event loop in another one, and in the meantime runs a model that the loop's tasks ask.

    In a program's first thread glibc keeps the memory of a batch for the next one; that of other threads, in blocks of 64 MiB, it
    returns to the system whenever a block is empty, and each page is then given and cleared anew (up to 5 % of the time of small
    models). CUDA's current device is that of the calling thread, too. It runs the calls of the first ``model`` that asks: several
    generate at the same time, in threads of their own.
    """

    def __init__(self) -> None:
        self.model: object = None
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()

    def wait(self, running: Future[Any]) -> None:
        """Return when a future is done. What is no Exception is raised here, such as Ctrl-C, also while a model works."""
        running.add_done_callback(lambda _: self._calls.put(None))
        while (call := self._calls.get()) is not None:
            call()

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """Have the thread call a function."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(put: Callable[[Any], None], outcome: Any) -> None:
            if not future.done():  # cancelled meanwhile
                put(outcome)

        def call() -> None:
            if future.cancelled():
                return
            put: Callable[[Any], None] = future.set_result
            try:
                outcome: Any = function(*args)
            except Exception as error:
                put, outcome = future.set_exception, error
            # Not a concurrent future, which logs what a signal's handler raises meanwhile and goes on.
            loop.call_soon_threadsafe(settle, put, outcome)

        self._calls.put(call)
        return await future


CALLING: ContextVar[CallingThread | None] = ContextVar("CALLING", default=None)
"""Of the tasks of an event loop: the thread that waits for it."""


def no_stop(function: Callable[..., T], *args: Any) -> T:
    """Call a function. Raises RuntimeError for a StopIteration, which a future cannot hold: who waits for it would wait forever."""
    try:
        return function(*args)
    except StopIteration as error:
        raise RuntimeError("The model or the step raised StopIteration.") from error


async def run_model(model: object, function: Callable[..., T], *args: Any) -> T:
    """Call a function of a model in the thread that waits for this event loop, or else in one of its own."""
    thread, function = CALLING.get(), partial(no_stop, function)
    if thread is None or thread.model not in (None, model):
        return await asyncio.to_thread(function, *args)
    thread.model = model
    return await thread.run(function, *args)
