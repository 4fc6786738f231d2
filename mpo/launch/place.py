"""Where a process stands: alone, one of many ranks, or the one on its machine that starts the ranks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEYS = ("processes", "machines", "machine_rank", "main_address", "main_port")
"""Keys of the launch group of a recipe."""


@dataclass(frozen=True)
class Place:
    """The ranks of a job, and this process among them.

    Args:
        processes: ranks on this machine, one per GPU as a rule.
        machines: machines of the job.
        machine_rank: number of this machine, from 0.
        main_address: where the machines meet: a host name or address of machine 0. None for one machine.
        main_port: a free port there.
        world_size: ranks in all.
        is_rank: this process is one of them, because torchrun, accelerate or Slurm started them.
        environment: what PyTorch needs to know and the starter did not say (Slurm with one task per rank).
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    main_address: str | None = None
    main_port: int = 29500
    world_size: int = 1
    is_rank: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


def hosts_of_slurm(nodes: str) -> list[str]:
    """Host names of a list in Slurm's short form, as Slurm itself reads it."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()


def find_place(
    launch: Mapping[str, Any],
    environ: Mapping[str, str],
    gpus: int,
    hosts: Callable[[str], list[str]] = hosts_of_slurm,
) -> Place:
    """Read a launch group and the environment.

    Args:
        launch: `KEYS` of a recipe. ``processes`` None: one per GPU. What is None of the others is read from Slurm inside of
            ``srun``, and otherwise means one machine.
        environ: environment variables.
        gpus: GPUs that this process sees.
        hosts: expands Slurm's list of hosts.

    Raises:
        ValueError: for numbers that contradict each other, or an address that is missing.

    >>> find_place({"processes": 4}, {}, gpus=0).world_size
    4
    >>> find_place({}, {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, gpus=8).is_rank
    True
    """
    given = {key: launch.get(key) for key in KEYS}
    for key in ("processes", "machines"):
        if given[key] is not None and (not isinstance(given[key], int) or given[key] < 1):
            raise ValueError(f"launch.{key} is a number from 1, or null; got {given[key]!r}.")
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world_size = int(environ["WORLD_SIZE"])
        processes = int(environ.get("LOCAL_WORLD_SIZE", world_size))
        return Place(processes=processes, machines=max(world_size // processes, 1), world_size=world_size, is_rank=True)

    slurm_machines = int(environ.get("SLURM_STEP_NUM_NODES", 1))
    slurm_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    in_slurm = "SLURM_STEP_NUM_NODES" in environ and given["machines"] in (None, slurm_machines)
    if in_slurm and slurm_machines * slurm_tasks > 1:
        address = given["main_address"] or hosts(environ["SLURM_STEP_NODELIST"])[0]
        # Jobs that share a machine get ports of their own.
        port = given["main_port"] or 20_000 + int(environ.get("SLURM_JOB_ID", 0)) % 20_000
    else:
        address, port = given["main_address"], given["main_port"] or 29_500
    if in_slurm and slurm_tasks > slurm_machines:  # one task per rank
        if slurm_tasks % slurm_machines:
            raise ValueError(
                f"srun started {slurm_tasks} tasks on {slurm_machines} machines. Give each machine one task, or one per GPU "
                "(--ntasks-per-node)."
            )
        return Place(
            processes=slurm_tasks // slurm_machines,
            machines=slurm_machines,
            machine_rank=int(environ["SLURM_NODEID"]),
            main_address=address,
            main_port=port,
            world_size=slurm_tasks,
            is_rank=True,
            environment={
                "RANK": environ["SLURM_PROCID"],
                "LOCAL_RANK": environ["SLURM_LOCALID"],
                "WORLD_SIZE": str(slurm_tasks),
                "LOCAL_WORLD_SIZE": str(slurm_tasks // slurm_machines),
                "MASTER_ADDR": str(address),
                "MASTER_PORT": str(port),
            },
        )
    machines = given["machines"] or (slurm_machines if in_slurm else 1)
    processes = given["processes"] or max(gpus, 1)
    machine_rank = given["machine_rank"]
    if machine_rank is None:
        machine_rank = int(environ["SLURM_NODEID"]) if in_slurm else 0 if machines == 1 else None
    if machines > 1 and (machine_rank is None or address is None):
        raise ValueError(
            f"launch.machines={machines} needs launch.machine_rank (0 to {machines - 1}, another on each machine) and "
            "launch.main_address (of machine 0). Inside of srun, Slurm says both."
        )
    if not 0 <= machine_rank < machines:
        raise ValueError(f"launch.machine_rank={machine_rank} is not one of 0 to {machines - 1}.")
    return Place(processes, machines, machine_rank, address, port, world_size=machines * processes)
