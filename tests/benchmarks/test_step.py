"""The benchmark counts what both trainers compute; only counted things are asserted."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step():
    spec = importlib.util.spec_from_file_location("step_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_fewer_flops_than_trl(step):
    """The 1B shape: at least 2.3 times fewer with a live reference, 2.7 with a cached one."""
    row = step.count(step.Case("1B"))
    assert row["trl_over_live"] >= 2.3
    assert row["trl_over_cached"] >= 2.7
    assert row["tiles_encoded"] == {"trl": 28, "live": 7}


def test_four_pairs_of_one_question(step):
    assert step.count(step.Case("1B", pairs=4))["trl_over_live"] >= 5.5


def test_a_trained_tower_runs_twice(step):
    frozen, trained = (step.count(step.Case("small", 1, 20, tower=tower)) for tower in ("frozen", "trained"))
    assert trained["tiles_encoded"]["live"] == 2 * frozen["tiles_encoded"]["live"]
    assert trained["flops_per_pair"]["live"] > frozen["flops_per_pair"]["live"]
