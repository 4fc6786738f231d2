"""A job against the stub server, for processes that tests kill."""

import multiprocessing
import resource
import signal
import sys
from pathlib import Path

from mpo.generation.server import ServerGenerator
from mpo.pipelines.job import Job
from mpo.pipelines.sample import Sample
from mpo.pipelines.step import Dropped, Step

PROCESSES = multiprocessing.get_context("forkserver")
# What this file imports: the server of forks does not find the folder of tests, and leaves out what it does not find.
IMPORTED = [
    "openai.resources.chat",
    "anyio._backends._asyncio",
    "mpo.generation.server",
    "mpo.pipelines.job",
    "mpo.pipelines.sample",
]
PROCESSES.set_forkserver_preload(IMPORTED)
CONCURRENCY = 4
FILES = ("output.jsonl", "dropped.jsonl", "report.json", "report.html")


class Judge(Step):
    """Drop questions without an odd digit among their final answers, and measure how many are odd."""

    verb, measure = "judge", "odd"

    def finish(self, record, responses):
        odd = [int(response["text"][-1]) % 2 for response in record["responses"]]
        if not any(odd):
            raise Dropped(f"none of {len(odd)} is odd")
        return {**record, "odd": sum(odd) / len(odd)}


def questions(count, words=1):
    return [{"id": f"q{number}", "messages": [{"role": "user", "content": f"{'Add ' * words}{number}"}]} for number in range(count)]


def stub_job(url, folder, count=40, *, n=2, temperature=1.0, **settings):
    generator = ServerGenerator(url, "tiny", concurrency=CONCURRENCY, attempts=1, prices=(1.0, 2.0))
    return Job([Sample(generator, n=n, temperature=temperature), Judge()], questions(count), folder, **settings)


def run_stub_job(url, folder, count, workers=1, file_bytes=None, err=None, **settings):
    """Run it in a process of its own; `file_bytes` is the size at which its disk is full."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may have had ignored
    if err:
        sys.stderr = open(err, "a", buffering=1)  # noqa: SIM115
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    stub_job(url, folder, count, **settings).run(workers=workers)


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in FILES}
