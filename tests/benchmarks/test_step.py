"""benchmarks/step.py on a tiny shape: what it counts, and that recorded calls count what real steps do."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from flops import count_calls, count_directly, record_calls  # noqa: E402
from step import judged, targets_of  # noqa: E402
from step_cases import SHAPES, SIDES, Case, processor_of  # noqa: E402

sys.path.pop(0)


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
def test_recorded_calls_count_what_real_steps_do(settings, side):
    """Every FLOP of `compute_loss` and its backward on the CPU is in the count of the recorded calls on the meta device."""
    case = Case("tiny", answer=200, **SETTINGS[settings])
    shape = SHAPES["tiny"]
    calls = record_calls(side, case, shape)
    flops = count_calls(calls, case, shape, processor_of(case, shape).image_token_id)
    assert all(count >= 0 for parts in flops.values() for count in parts.values())
    assert sum(sum(parts.values()) for parts in flops.values()) == count_directly(side, case, shape)


def test_tiles_and_tokens():
    """7 tiles of 4 tokens; TRL: 2 pairs x 2 rows x 2 models; ours: the tower once, each row once per model."""
    case = Case("tiny", answer=200, pairs=2)
    shape = SHAPES["tiny"]
    made = {side: record_calls(side, case, shape) for side in SIDES}
    tiles = {side: [call.tiles for call in calls] for side, calls in made.items()}
    assert tiles == {"trl": [28, 28], "live": [7, 0], "cached": [7], "cached features": [0]}
    tokens = {side: [call.inputs["input_ids"].numel() for call in calls] for side, calls in made.items()}
    # The end of turn and TRL's newline after it: 9 digits and 2 more tokens per completion.
    width = tokens["trl"][0] // 4
    assert tokens["trl"] == [4 * width] * 2
    prompt = width - 11
    assert tokens["live"][0] < prompt + 4 * (11 + 1)
    assert tokens["live"] == tokens["cached"] * 2 and tokens["cached features"] == tokens["cached"]


def test_trained_tower_runs_once_for_each_model():
    case = Case("tiny", answer=200, tower="trained")
    assert [call.tiles for call in record_calls("live", case, SHAPES["tiny"])] == [7, 7]


def test_targets_hold_for_their_settings_alone():
    assert targets_of(Case("1B")) == {"live": 2.3, "cached": 2.7, "cached features": 5.2}
    assert targets_of(Case("1B", tiles=1)) == targets_of(Case("1B", tower="trained")) == {}
    assert judged(0.7, 0.6, at_most=True)["reached"] is False and judged(2.0, 1.8)["reached"] is True
