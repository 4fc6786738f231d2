"""benchmarks/validate.py on a few records: the real command, with and without a processor, and what is written down."""

import json
import runpy
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "validate.py"


@pytest.mark.slow
def test_what_is_written(tmp_path, monkeypatch, interpreter):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "executable", interpreter)
    sizes = ["--texts", "40", "--images", "6", "--workers", "2"]
    monkeypatch.setattr(sys, "argv", [str(PATH), *sizes, "--output", str(tmp_path / "a.json")])
    monkeypatch.syspath_prepend(str(PATH.parent))
    monkeypatch.setitem(sys.modules, "data", None)  # tests/data has this name too, and has it again afterwards
    del sys.modules["data"]
    runpy.run_path(str(PATH), run_name="__main__")
    result = json.loads((tmp_path / "a.json").read_text())
    cases = result["cases"]
    assert [(case["kind"], case["records"], case["with_processor"]) for case in cases] == [
        ("texts", 40, False),
        ("texts", 40, True),
        ("photographs", 6, False),
        ("photographs", 6, True),
    ]
    assert all(case["records_per_second"] == case["records"] / case["seconds"] for case in cases)
    assert all("Training may start." in case["said"][-1] for case in cases) and result["workers"] == 2
