"""The position of a process among the ranks of a job, read from a recipe and the environment."""

import pytest

from mpo.training.launch.place import Place, find_place
from mpo.training.schema import Launch, check_keys, hints

SLURM = {
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "41234",
}


def hosts(nodes):
    assert nodes == "gpu[07-08]"
    return ["gpu07", "gpu08"]


@pytest.mark.parametrize(
    ("launch", "gpus", "expected"),
    [
        ({}, 0, Place()),
        ({}, 4, Place(nproc_per_node=4, world_size=4)),
        ({"nproc_per_node": 1}, 4, Place()),
        (
            {"nnodes": 2, "node_rank": 1, "master_addr": "a", "master_port": 1234},
            8,
            Place(8, 2, 1, "a", 1234, world_size=16),
        ),
    ],
)
def test_a_recipe_alone(launch, gpus, expected):
    assert find_place(launch, {}, gpus) == expected


def test_a_rank_of_torchrun():
    """The launch group configures the launcher; a rank reads its environment."""
    environ = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", **SLURM}
    assert find_place({"nproc_per_node": 2, "nnodes": 5}, environ, 8) == Place(8, 2, world_size=16, is_rank=True)


def test_slurm_with_a_task_per_node_starts_the_ranks():
    environ = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert find_place({}, environ, 8, hosts) == Place(8, 2, 1, "gpu07", 20_000 + 41_234 % 20_000, world_size=16)


def test_slurm_with_a_task_per_gpu_is_a_rank():
    environ = {**SLURM, "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    place = find_place({"master_port": 555}, environ, 1, hosts)
    assert (place.is_rank, place.world_size, place.nproc_per_node, place.node_rank) == (True, 16, 8, 1)
    assert place.environment == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "555",
    }


def test_a_batch_script_without_srun_is_one_node():
    """Slurm sets SLURM_NODEID here too, but starts the command only once."""
    environ = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_JOB_ID": "3"}
    assert find_place({}, environ, 4) == Place(nproc_per_node=4, world_size=4)


def test_one_node_of_a_larger_slurm_step():
    """`launch.nnodes=1` inside of srun: each task is a separate job, as in a sweep."""
    environ = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert find_place({"nnodes": 1}, environ, 4) == Place(nproc_per_node=4, world_size=4)


@pytest.mark.parametrize(
    ("launch", "environ", "message"),
    [
        ({"nnodes": 2}, {}, "launch.nnodes=2 .*launch.node_rank"),
        ({"nnodes": 2, "node_rank": 0}, {}, "launch.master_addr"),
        ({"nnodes": 2, "node_rank": 2, "master_addr": "a"}, {}, "launch.node_rank .* got 2"),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "3"}, "3 tasks on 2 nodes"),
    ],
)
def test_refusals(launch, environ, message):
    with pytest.raises(ValueError, match=message):
        find_place(launch, environ, 1, hosts)


@pytest.mark.parametrize("wrong", [0, "two", -1])
@pytest.mark.parametrize("key", ["nproc_per_node", "nnodes"])
def test_numbers_that_are_none_are_refused_with_the_recipe(key, wrong):
    with pytest.raises(ValueError, match=f"launch.{key} .*{wrong}"):
        check_keys(hints(Launch), {key: wrong}, "launch")
