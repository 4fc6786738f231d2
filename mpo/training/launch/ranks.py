"""Start the ranks of a job on this node with torchrun, and report a failure in one sentence."""

import logging
import os
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from mpo.training.launch.place import Place

USER_ERROR = 2  # exit status of a rank that has reported a user's error


def start_ranks(place: Place, module: str, arguments: Sequence[str]) -> int:
    """Run a module on every rank of this node. When one rank fails, the others are stopped.

    Args:
        place: number of ranks, and their rendezvous.
        module: run as ``python -m module``.

    Returns:
        0; 2 when a rank has reported a user's error; 128 + N when signal N stopped this process.

    Raises:
        RuntimeError: when a rank failed for another reason; names the rank and its exit status.
    """
    where = ["--standalone"]
    if place.nnodes > 1:
        where = [f"--nnodes={place.nnodes}", f"--node-rank={place.node_rank}"]
        where += [f"--master-addr={place.master_addr}", f"--master-port={place.master_port}"]
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // place.nproc_per_node, 1)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # prints forty lines per failure
    try:
        words = [*where, f"--nproc-per-node={place.nproc_per_node}", "--module", module, *arguments]
        run(parse_args(words))  # type: ignore[no-untyped-call]
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
    """Describe an exit status.

    >>> ending(-9)
    'was killed by SIGKILL (usually by the kernel: out of memory)'
    >>> ending(1)
    'failed (exit status 1; see its error above)'
    """
    if exitcode >= 0:
        return f"failed (exit status {exitcode}; see its error above)"
    name = signal.Signals(-exitcode).name
    hints = {"SIGKILL": " (usually by the kernel: out of memory)", "SIGABRT": " (often a collective that timed out)"}
    return f"was killed by {name}{hints.get(name, '')}"
