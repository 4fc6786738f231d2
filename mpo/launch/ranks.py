"""Start the ranks of a job on this machine and wait for them: torchrun, with its errors in one sentence."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.agent.server.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from mpo.launch.place import Place

USER_ERROR = 2  # what a rank ends with that has told the user what is wrong


def start_ranks(place: Place, module: str, arguments: Sequence[str]) -> int:
    """Run a module on every rank of this machine until all are done, or one fails: then the others are stopped.

    Args:
        place: how many, and where they meet.
        module: run as ``python -m module``.
        arguments: of the module.

    Returns:
        0; 2 when a rank has reported a user's error; 128 + N when this process was asked to stop by signal N.

    Raises:
        RuntimeError: when a rank failed otherwise: which, and how.
    """
    where = (
        ["--standalone"]
        if place.machines == 1
        else [
            f"--nnodes={place.machines}",
            f"--node-rank={place.machine_rank}",
            f"--master-addr={place.main_address}",
            f"--master-port={place.main_port}",
        ]
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // place.processes, 1)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it tells a failure in forty lines; we do in two
    try:
        run(parse_args([*where, f"--nproc-per-node={place.processes}", "--module", module, *arguments]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == USER_ERROR:
            return USER_ERROR
        raise RuntimeError(f"rank {rank} of {place.world_size} {ending(failure.exitcode)}; the others were stopped.") from None
    except SignalException as stop:
        print(f"mpo: stopped by {stop.sigval.name}", file=sys.stderr)
        return 128 + int(stop.sigval)
    return 0


def ending(exitcode: int) -> str:
    """How a process ended, in words.

    >>> ending(-9)
    'was killed by SIGKILL (the usual sender is a kernel that is out of memory)'
    >>> ending(1)
    'failed (exit status 1, its error is above)'
    """
    if exitcode >= 0:
        return f"failed (exit status {exitcode}, its error is above)"
    name = signal.Signals(-exitcode).name
    hints = {"SIGKILL": " (the usual sender is a kernel that is out of memory)", "SIGABRT": " (often a collective that timed out)"}
    return f"was killed by {name}{hints.get(name, '')}"
