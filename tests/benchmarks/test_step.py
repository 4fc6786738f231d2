"""benchmarks/step.py on a tiny shape: what it counts, and that recorded calls count what real steps do."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmarks_step", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


SETTINGS = {
    "full": {},
    "trained tower": {"tower": "trained"},
    "lora": {"tune": "lora"},
    "checkpointing": {"checkpointing": True},
    "lora checkpointing": {"tune": "lora", "checkpointing": True},
    "pairs": {"pairs": 2},
}


@pytest.mark.parametrize("side", ["trl", "live", "cached"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_recorded_calls_count_what_real_steps_do(bench, settings, side):
    """Every FLOP of `compute_loss` and its backward on the CPU is in the count of the recorded calls on the meta device."""
    case = bench.Case("tiny", answer=200, **SETTINGS[settings])
    shape = bench.SHAPES["tiny"]
    calls = bench.record_calls(side, case, shape)
    flops = bench.count_calls(calls, case, shape, bench.processor_of(case, shape).image_token_id)
    assert all(count >= 0 for parts in flops.values() for count in parts.values())
    assert sum(sum(parts.values()) for parts in flops.values()) == bench.count_directly(side, case, shape)


def test_tiles_and_tokens(bench):
    """7 tiles of 4 tokens; TRL: 2 pairs x 2 rows x 2 models; ours: the tower once, each row once per model."""
    case = bench.Case("tiny", answer=200, pairs=2)
    shape = bench.SHAPES["tiny"]
    made = {side: bench.record_calls(side, case, shape) for side in bench.SIDES}
    tiles = {side: [call.tiles for call in calls] for side, calls in made.items()}
    assert tiles == {"trl": [28, 28], "live": [7, 0], "cached": [7], "cached features": [0]}
    tokens = {side: [call.inputs["input_ids"].numel() for call in calls] for side, calls in made.items()}
    # The end of turn and TRL's newline after it: 9 digits and 2 more tokens per completion.
    width = tokens["trl"][0] // 4
    assert tokens["trl"] == [4 * width] * 2
    prompt = width - 11
    assert tokens["live"][0] < prompt + 4 * (11 + 1)
    assert tokens["live"] == tokens["cached"] * 2 and tokens["cached features"] == tokens["cached"]


def test_trained_tower_runs_once_for_each_model(bench):
    case = bench.Case("tiny", answer=200, tower="trained")
    assert [call.tiles for call in bench.record_calls("live", case, bench.SHAPES["tiny"])] == [7, 7]


def test_targets_hold_for_their_settings_alone(bench):
    assert bench.targets_of(bench.Case("1B")) == {"live": 2.3, "cached": 2.7, "cached features": 5.2}
    assert bench.targets_of(bench.Case("1B", tiles=1)) == bench.targets_of(bench.Case("1B", tower="trained")) == {}
    assert bench.judged(0.7, 0.6, at_most=True)["reached"] is False and bench.judged(2.0, 1.8)["reached"] is True
