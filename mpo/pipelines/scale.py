"""The same job over several processes or machines, with datatrove's executors (extra ``scale``).

Ray was tried by hand, with ray 2.60 and datatrove's executor on one machine: `executor(job, "ray", tasks=2).run()` after
`ray.init(num_cpus=2)` gave the bytes of one process. Its workers have to import the module of the job's steps (``PYTHONPATH``).
Slurm's executor was tried without a cluster: an ``sbatch`` that runs datatrove's script, two tasks at once, gave these bytes too.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

from mpo.pipelines.part import SHARDS, InUse, locked, total
from mpo.pipelines.report import Progress

if TYPE_CHECKING:
    from mpo.pipelines.job import Job

try:
    import datatrove.executor
    import multiprocess
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.executor.base import PipelineExecutor
except ModuleNotFoundError as error:
    raise ValueError(f"Several workers need datatrove ({error}): pip install 'mpo-trainer[scale]'.") from None

LOGS = "datatrove"
POLL_SECONDS = 0.5
log = logging.getLogger(__name__)


def executor(job: Job, kind: str = "slurm", *, tasks: int, **settings: Any) -> PipelineExecutor:
    """Prepare a job for many machines, all of which see its folder, and return the executor whose `run` starts it.

    Each task takes shards until none is left. That of a task that was killed is taken over by another one, or by the task itself
    when Slurm starts it again. The last one puts the parts together.

    Args:
        job: the job.
        kind: ``slurm``, ``ray`` (which must be installed) or ``local``.
        tasks: number of tasks.
        settings: further arguments of datatrove's executor, such as ``time`` and ``partition`` of Slurm's.

    Raises:
        ValueError: as in `Job.run`, and for another kind.
    """
    if kind not in ("slurm", "ray", "local"):
        raise ValueError(f"Expected slurm, ray or local; got {kind!r}.")
    with locked(job.folder, "job"):
        job.prepare(tasks)
    folder = str(job.folder / SHARDS / LOGS)
    # datatrove's marks of finished tasks say nothing here: a task that ended with an error may have finished many shards
    made = getattr(datatrove.executor, f"{kind.capitalize()}PipelineExecutor")
    return made([Work(job)], tasks=tasks, logging_dir=folder, skip_completed=False, **settings)


class Work:
    """The one function of datatrove's pipeline: takes shards that nobody works on until all are finished.

    Args:
        job: a job that is prepared.
        failed: where to send an error, instead of raising it; the caller then puts the parts together.
    """

    def __init__(self, job: Job, failed: Callable[[BaseException], None] | None = None) -> None:
        self.job, self.failed = job, failed

    def __deepcopy__(self, memo: Any) -> Work:  # of its generators' connections
        return self

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        """Take shards, those of this rank first."""
        try:
            parts = self.job.parts()
            first = len(parts) * rank // world_size
            while left := [number for number, part in enumerate(parts) if not part.finished]:
                if not any([self._took(number) for number in sorted(left, key=lambda number: (number - first) % len(parts))]):
                    time.sleep(POLL_SECONDS)
            if self.failed is None:
                self.job.finish()
        except BaseException as error:
            if self.failed is None:
                raise
            self.failed(error)

    def _took(self, number: int) -> bool:
        try:
            self.job.run_part(number)
        except InUse:
            return False
        return True


class _Supervised(LocalPipelineExecutor):  # type: ignore[misc]
    """datatrove's local executor, each rank in a process of its own: its pool would wait for a killed one for ever."""

    def run(self) -> list[BaseException]:
        (work,) = self.pipeline  # type: ignore[has-type]
        context = multiprocess.get_context(self.start_method)
        processes, receivers = [], []
        for rank in range(self.tasks):
            receiver, sender = context.Pipe(duplex=False)
            self.pipeline = [Work(work.job, sender.send)]
            processes.append(context.Process(target=self._rank, args=(rank,)))
            processes[-1].start()
            sender.close()
            receivers.append(receiver)
        bar = Progress(work.job.count, self._done()[0]["records"], show=self.show)
        try:
            while any(process.is_alive() for process in processes):
                wait([process.sentinel for process in processes if process.is_alive()], POLL_SECONDS)
                bar.update(*self._done())
        except KeyboardInterrupt:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join()
            raise
        finally:
            bar.close()
        errors = [_error(process, receiver) for process, receiver in zip(processes, receivers, strict=True)]
        return [error for error in errors if error is not None]

    def _done(self) -> Any:
        return total(part.progress() for part in self.job.parts())

    def _rank(self, rank: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the parent says when to stop
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        self._run_for_rank(rank, rank + 1)


def _end_with_parent() -> None:
    multiprocess.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


def _error(process: Any, receiver: Any) -> BaseException | None:
    """What a process that has ended has sent, or how it ended."""
    try:
        sent: BaseException = receiver.recv()
        return sent
    except EOFError:
        return None if process.exitcode == 0 else ChildProcessError(f"A worker was killed (exit code {process.exitcode}).")


def run_local(job: Job, workers: int, *, progress: bool = True) -> None:
    """Run the shards of a job that is prepared in processes of this machine. A killed one's are taken over by the others.

    Raises:
        the first error of a worker, if shards are left; ChildProcessError if all were killed.
    """
    supervised = _Supervised([Work(job)], tasks=workers, logging_dir=str(job.folder / SHARDS / LOGS), skip_completed=False)
    supervised.job, supervised.show = job, progress
    errors = supervised.run()
    for error in errors:
        if not all(part.finished for part in job.parts()):
            raise error
        log.warning("%s The others took over.", error)
