"""The same job over several processes, or over machines with datatrove's executors (extra ``scale``)."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from importlib import import_module
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import multiprocess  # of datasets: it pickles what a notebook defines

from mpo.pipelines.part import SHARDS, InUse, locked, total
from mpo.pipelines.report import Progress

if TYPE_CHECKING:
    from mpo.pipelines.job import Job

LOGS = "datatrove"
POLL_SECONDS = 0.5
log = logging.getLogger(__name__)


def executor(job: Job, kind: str = "slurm", *, tasks: int, **settings: Any) -> Any:
    """Prepare a job for many machines, all of which see its folder, and return datatrove's executor whose `run` starts it.

    Each task takes shards until none is left. That of a task that was killed is taken over by another one, or by the task itself
    when Slurm starts it again. The last one puts the parts together.

    Args:
        job: the job.
        kind: ``slurm``, ``local``, or ``ray``, which must be installed and import the module of the steps (``PYTHONPATH``).
        tasks: number of tasks.
        settings: further arguments of datatrove's executor, such as ``time`` and ``partition`` of Slurm's.

    Raises:
        ValueError: as in `Job.run`, for another kind, and without datatrove.
    """
    if kind not in ("slurm", "ray", "local"):
        raise ValueError(f"Expected slurm, ray or local; got {kind!r}.")
    try:
        made = getattr(import_module("datatrove.executor"), f"{kind.capitalize()}PipelineExecutor")
    except ModuleNotFoundError as error:
        raise ValueError(f"Several machines need datatrove ({error}): pip install 'mpo-trainer[scale]'.") from None
    with locked(job.folder, "job"):
        job.prepare(tasks)
    # datatrove's marks of finished tasks say nothing here: a task that ended with an error may have finished many shards
    return made([Work(job)], tasks=tasks, logging_dir=str(job.folder / SHARDS / LOGS), skip_completed=False, **settings)


class Work:
    """The one function of datatrove's pipeline: takes shards until all are finished, and puts the parts together."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __deepcopy__(self, memo: Any) -> Work:  # of its generators' connections
        return self

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Take shards, those of this rank first."""
        _take_shards(self.job, rank, world_size)
        self.job.finish()


def _take_shards(job: Job, rank: int, workers: int) -> None:
    parts = job.parts()
    first = len(parts) * rank // workers
    while left := [number for number, part in enumerate(parts) if not part.finished]:
        taken = 0
        for number in sorted(left, key=lambda number: (number - first) % len(parts)):
            with suppress(InUse):
                job.run_part(number)
                taken += 1
        if not taken:
            time.sleep(POLL_SECONDS)


def run_local(job: Job, workers: int, *, progress: bool = True) -> None:
    """Run the shards of a job that is prepared in processes of this machine. A killed one's are taken over by the others.

    Raises the first error of a worker, if shards are left; ChildProcessError if all were killed.
    """
    context = multiprocess.get_context("forkserver")
    processes, receivers = [], []
    for rank in range(workers):
        receiver, sender = context.Pipe(duplex=False)
        processes.append(context.Process(target=_work, args=(job, rank, workers, sender)))
        processes[-1].start()
        sender.close()
        receivers.append(receiver)

    def done() -> Any:
        return total(part.progress() for part in job.parts())

    bar = Progress(job.count, done()[0]["records"], show=progress)
    sent: dict[int, BaseException | None] = {}  # read as it comes: a pipe that is full holds its process up
    try:
        while any(process.is_alive() for process in processes):
            wait([process.sentinel for process in processes if process.is_alive()], POLL_SECONDS)
            sent |= {rank: _received(one) for rank, one in enumerate(receivers) if rank not in sent and one.poll()}
            bar.update(*done())
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise
    finally:
        bar.close()
    for rank, process in enumerate(processes):
        error = sent[rank] if rank in sent else _received(receivers[rank])
        if error is None and process.exitcode:
            error = ChildProcessError(f"A worker was killed (exit code {process.exitcode}).")
        if error is not None:
            if not all(part.finished for part in job.parts()):
                raise error
            log.warning("%s The others took over.", error)


def _work(job: Job, rank: int, workers: int, sender: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent says when to stop
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _take_shards(job, rank, workers)
    except BaseException as error:
        sender.send(error)


def _end_with_parent() -> None:
    multiprocess.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _received(receiver: Any) -> BaseException | None:
    try:
        error: BaseException = receiver.recv()
        return error
    except EOFError:
        return None
