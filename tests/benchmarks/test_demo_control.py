"""benchmarks/demo_control.py: its numbers by hand, and its path after a tiny demo."""

import sys
from pathlib import Path

import pytest

from mpo.demo.folder import DemoFolder
from mpo.io import write_json_lines

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from demo_control import ControlFolder, correct_of, difference, share  # noqa: E402

sys.path.pop(0)


def test_numbers_by_hand():
    """3 of 4: error sqrt(0.75 0.25 / 4) = 0.2165. Differences 1, 0, 0, -1: variance 2/3, error sqrt(2/3/4) = 0.4082."""
    assert share([True, True, True, False]) == {"percent": 75.0, "standard_error": pytest.approx(21.65, abs=0.01)}
    found = difference([False, True, False, True], [True, True, False, False])
    assert found == {"points": 0.0, "standard_error": pytest.approx(40.82, abs=0.01)}


def test_a_methods_files_lie_beside_the_demos(tmp_path):
    """Warmed-up model, pairs and data are the demo's; model, log and responses are the method's own."""
    demo, control = DemoFolder(tmp_path), ControlFolder(tmp_path, "ipo")
    assert (control.warm, control.pairs, control.data) == (demo.warm, demo.pairs, demo.data)
    assert control.responses("before") == demo.responses("before")
    assert len({demo.mpo, control.mpo, ControlFolder(tmp_path, "dpo").mpo}) == 3
    write_json_lines(demo.responses("after"), [{"correct": True}])
    write_json_lines(control.responses("after"), [{"correct": False}])
    assert (correct_of(demo, "after"), correct_of(control, "after")) == ([True], [False])
