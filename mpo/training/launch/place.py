"""The position of a process in a job: a single process, one of several ranks, or the launcher of the ranks on its node."""

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEYS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port")
"""Keys of the launch group of a recipe. They have torchrun's names."""


@dataclass(frozen=True)
class Place:
    """The ranks of a job, and the position of this process among them."""

    nproc_per_node: int = 1  # ranks on this node, usually one per GPU
    nnodes: int = 1  # nodes of the job
    node_rank: int = 0  # rank of this node, from 0
    master_addr: str | None = None  # rendezvous address: a host name or IP address of node 0; None for a single node
    master_port: int = 29500  # a free port on node 0
    world_size: int = 1  # total number of ranks
    is_rank: bool = False  # this process is itself a rank, started by torchrun, accelerate or Slurm
    # Variables that PyTorch needs and the launcher did not set (Slurm with one task per rank).
    environment: Mapping[str, str] = field(default_factory=dict)


def hosts_of_slurm(nodes: str) -> list[str]:
    """Expand a node list in Slurm's short form with ``scontrol``."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()


def find_place(
    launch: Mapping[str, Any], environ: Mapping[str, str], gpus: int, hosts: Callable[[str], list[str]] = hosts_of_slurm
) -> Place:
    """Derive the ranks of a job from its launch group and the environment.

    Args:
        launch: `KEYS` of a recipe. ``nproc_per_node`` None: one rank per GPU. Other keys that are None are read from Slurm
            inside ``srun``; elsewhere they describe a single node.
        gpus: number of GPUs visible to this process.
        hosts: expands Slurm's node list.

    Raises:
        ValueError: for numbers that contradict each other, or a missing address.

    >>> find_place({"nproc_per_node": 4}, {}, gpus=0).world_size
    4
    >>> find_place({}, {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, gpus=8).is_rank
    True
    """
    given = {key: launch.get(key) for key in KEYS}
    if "RANK" in environ and "WORLD_SIZE" in environ:
        world_size = int(environ["WORLD_SIZE"])
        nproc_per_node = int(environ.get("LOCAL_WORLD_SIZE", world_size))
        nnodes = max(world_size // nproc_per_node, 1)
        return Place(nproc_per_node=nproc_per_node, nnodes=nnodes, world_size=world_size, is_rank=True)

    slurm_nodes = int(environ.get("SLURM_STEP_NUM_NODES", 1))
    slurm_tasks = int(environ.get("SLURM_STEP_NUM_TASKS", 1))
    in_slurm = "SLURM_STEP_NUM_NODES" in environ and given["nnodes"] in (None, slurm_nodes)
    if in_slurm and slurm_nodes * slurm_tasks > 1:
        master_addr = given["master_addr"] or hosts(environ["SLURM_STEP_NODELIST"])[0]
        # Jobs that share a node need different ports.
        master_port = given["master_port"] or 20_000 + int(environ.get("SLURM_JOB_ID", 0)) % 20_000
    else:
        master_addr, master_port = given["master_addr"], given["master_port"] or 29_500
    if in_slurm and slurm_tasks > slurm_nodes:  # one task per rank
        if slurm_tasks % slurm_nodes:
            raise ValueError(
                f"srun started {slurm_tasks} tasks on {slurm_nodes} nodes. Start one task per node, or one per GPU "
                "(--ntasks-per-node)."
            )
        per_node, node = slurm_tasks // slurm_nodes, int(environ["SLURM_NODEID"])
        world = {"WORLD_SIZE": slurm_tasks, "LOCAL_WORLD_SIZE": per_node, "MASTER_ADDR": master_addr, "MASTER_PORT": master_port}
        environment = {name: str(value) for name, value in world.items()}
        environment |= {"RANK": environ["SLURM_PROCID"], "LOCAL_RANK": environ["SLURM_LOCALID"]}
        return Place(per_node, slurm_nodes, node, master_addr, master_port, slurm_tasks, is_rank=True, environment=environment)
    nnodes = given["nnodes"] or (slurm_nodes if in_slurm else 1)
    nproc_per_node = given["nproc_per_node"] or max(gpus, 1)
    node_rank = given["node_rank"]
    if node_rank is None:
        node_rank = int(environ["SLURM_NODEID"]) if in_slurm else 0 if nnodes == 1 else None
    if node_rank is None or (nnodes > 1 and master_addr is None):
        raise ValueError(
            f"launch.nnodes={nnodes} needs launch.node_rank (0 to {nnodes - 1}, different on each node) and "
            "launch.master_addr (the address of node 0). Inside srun both are read from Slurm."
        )
    if not 0 <= node_rank < nnodes:
        raise ValueError(f"launch.node_rank must be between 0 and {nnodes - 1}; got {node_rank}.")
    return Place(nproc_per_node, nnodes, node_rank, master_addr, master_port, world_size=nnodes * nproc_per_node)
