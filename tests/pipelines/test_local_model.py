"""Steps that ask a model in this process: it generates in the thread that calls them."""

import asyncio
import os
import signal
import threading
import time

import pytest
import torch
from stub_server import StubServer

from mpo.generation.generator import Request
from mpo.generation.local import LocalGenerator
from mpo.generation.server import ServerGenerator
from mpo.io import read_json_lines
from mpo.pipelines.flow import Flow
from mpo.pipelines.job import Job
from mpo.pipelines.sample import Sample

RECORDS = [{"id": f"q{number}", "messages": [{"role": "user", "content": f"What is {number}?"}]} for number in range(6)]
SETTINGS = {"max_new_tokens": 4, "seed": 3}


class Watched(LocalGenerator):
    """A generator that calls `before` in each batch, before its model."""

    before = staticmethod(lambda: None)

    def _batch(self, *args):
        self.before()
        return super()._batch(*args)


@pytest.fixture
def generator(internvl, processor):
    return Watched(internvl, processor, responses_per_batch=2)


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def said(records):
    return [one["text"] for record in records for one in record["responses"]]


def directly(generator):
    return [one.text for (one,) in generator.generate([Request(one["messages"]) for one in RECORDS], **SETTINGS)]


def test_the_model_runs_in_the_calling_thread(generator, interruptible):
    """Also where that has an event loop, as in a notebook, and where it is not the first one; Ctrl-C is as before afterwards."""
    expected, threads = directly(generator), []
    generator.before = lambda: threads.append(threading.current_thread())

    async def cell():
        return Sample(generator, **SETTINGS)(RECORDS)

    assert said(Sample(generator, **SETTINGS)(RECORDS)) == expected == said(asyncio.run(cell()))
    assert {*threads} == {threading.main_thread()} and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    threads.clear()
    other = threading.Thread(target=Sample(generator, **SETTINGS), args=(RECORDS,))
    other.start()
    other.join()
    assert {*threads} == {other}


def test_a_server_is_asked_while_the_model_works(generator):
    """The second batch of the model waits for the response of the server to a record of the first."""
    batches, waited = [], []

    def before():
        batches.append(None)
        if len(batches) == 2:
            waited.append(stub.came.wait(60))

    generator.before = before
    with StubServer() as stub:
        stub.came = threading.Event()
        stub.poison = lambda body: stub.came.set()
        steps = [Sample(generator, **SETTINGS), Sample(ServerGenerator(stub.url, "tiny"))]
        found = []
        Flow(steps).run(RECORDS, found.append)
    assert waited == [True] and all(one.outputs for one in found) and len(found) == len(RECORDS)


def test_two_models_work_at_the_same_time(generator, internvl, processor):
    """The first batch of the second waits for the second batch of the first; only the first is in the calling thread."""
    other, meeting = Watched(type(internvl)(internvl.config), processor, responses_per_batch=2), threading.Barrier(2)
    threads = {"first": [], "second": []}

    def before(name, meets):
        threads[name].append(threading.current_thread())
        if len(threads[name]) == meets:
            meeting.wait(60)

    generator.before, other.before = (lambda: before("first", 2)), (lambda: before("second", 1))
    found = []
    Flow([Sample(generator, **SETTINGS), Sample(other, **SETTINGS)]).run(RECORDS, found.append)
    assert {*threads["first"]} == {threading.main_thread()} and threading.main_thread() not in threads["second"]
    assert len(found) == len(RECORDS) and all(one.outputs for one in found)


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_while_the_model_works(generator, tmp_path, interruptible, signals):
    """After one, the batch is finished and kept; after two, it is given up at once. Nothing that is kept is asked again."""
    passes, interrupted = [], []

    def hook(*_):
        passes.append(None)
        if generator.usage.responses and len(interrupted) < signals:
            interrupted.append((generator.usage.responses, len(passes)))
            os.kill(os.getpid(), signal.SIGINT)

    handle = generator.model.register_forward_pre_hook(hook)
    job = Job([Sample(generator, **SETTINGS)], RECORDS, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        job.run(progress=False)
    handle.remove()
    kept, (answered, at) = len(read_json_lines(tmp_path / "ledger.jsonl")), interrupted[-1]
    assert kept == generator.usage.responses
    assert kept > answered if signals == 1 else (kept, len(passes)) == (answered, at)
    assert torch.is_grad_enabled() and kept < len(RECORDS)
    report = job.run(progress=False)
    assert report["output"] == len(RECORDS) and generator.usage.responses == len(RECORDS)
    assert said(read_json_lines(tmp_path / "output.jsonl")) == directly(generator)


def test_an_error_of_the_model_is_raised(generator, tmp_path):
    def fail():
        raise RuntimeError("out of memory")

    generator.before = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        Job([Sample(generator, **SETTINGS)], RECORDS, tmp_path).run(progress=False)


@pytest.mark.parametrize("error", [SystemExit, StopIteration, asyncio.CancelledError])
@pytest.mark.parametrize("place", ["the model", "a second model", "the records", "a signal's handler"])
def test_nothing_that_is_raised_is_waited_for_forever(generator, internvl, processor, tmp_path, error, place):
    """What comes first is raised; what was kept is not asked again."""
    second = Watched(type(internvl)(internvl.config), processor, responses_per_batch=2)
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 2:
            raise error("here")

    def records():
        for one in RECORDS:
            if place == "the records":
                fail()
            elif place == "a signal's handler" and one is RECORDS[-1] and not calls:
                calls.append(None)
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(1)  # while the calling thread waits
            yield one

    before = signal.signal(signal.SIGUSR1, fail)
    generator.before = fail if place == "the model" else lambda: None
    second.before = fail if place == "a second model" else lambda: None
    try:
        with pytest.raises((error, RuntimeError)):
            Flow([Sample(generator, **SETTINGS), Sample(second, **SETTINGS)]).run(records(), lambda _: None)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(calls) == 2 and torch.is_grad_enabled()
