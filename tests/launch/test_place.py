"""Where a process stands among the ranks of a job, read from a recipe and the environment."""

import pytest

from mpo.launch.place import Place, find_place

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
        ({}, 4, Place(processes=4, world_size=4)),
        ({"processes": 1}, 4, Place()),
        (
            {"machines": 2, "machine_rank": 1, "main_address": "a", "main_port": 1234},
            8,
            Place(8, 2, 1, "a", 1234, world_size=16),
        ),
    ],
)
def test_a_recipe_alone(launch, gpus, expected):
    assert find_place(launch, {}, gpus) == expected


def test_a_rank_of_torchrun():
    """The recipe's numbers are for whoever starts ranks; this one has been started."""
    environ = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", **SLURM}
    assert find_place({"processes": 2, "machines": 5}, environ, 8) == Place(8, 2, world_size=16, is_rank=True)


def test_slurm_with_a_task_per_machine_starts_the_ranks():
    environ = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert find_place({}, environ, 8, hosts) == Place(8, 2, 1, "gpu07", 20_000 + 41_234 % 20_000, world_size=16)


def test_slurm_with_a_task_per_gpu_is_a_rank():
    environ = {**SLURM, "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    place = find_place({"main_port": 555}, environ, 1, hosts)
    assert (place.is_rank, place.world_size, place.processes, place.machine_rank) == (True, 16, 8, 1)
    assert place.environment == {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "555",
    }


def test_a_batch_script_without_srun_is_one_machine():
    """Slurm sets SLURM_NODEID there too, but has started this command once."""
    environ = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_JOB_ID": "3"}
    assert find_place({}, environ, 4) == Place(processes=4, world_size=4)


def test_one_machine_of_a_larger_slurm_step():
    """`launch.machines=1` inside of srun: each task is a job of its own, as in a sweep."""
    environ = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert find_place({"machines": 1}, environ, 4) == Place(processes=4, world_size=4)


@pytest.mark.parametrize(
    ("launch", "environ", "message"),
    [
        ({"machines": 2}, {}, "needs launch.machine_rank"),
        ({"machines": 2, "machine_rank": 0}, {}, "launch.main_address"),
        ({"machines": 2, "machine_rank": 2, "main_address": "a"}, {}, "not one of 0 to 1"),
        ({"processes": 0}, {}, "from 1, or null"),
        ({"processes": "two"}, {}, "from 1, or null"),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "3"}, "3 tasks on 2 machines"),
    ],
)
def test_refusals(launch, environ, message):
    with pytest.raises(ValueError, match=message):
        find_place(launch, environ, 1, hosts)
