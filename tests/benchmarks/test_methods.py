"""benchmarks/methods.py: its task, its intervals, and the whole path at tiny size, interrupted and resumed."""

import json
import multiprocessing
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The benchmark's own modules, as a script beside them sees them."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("kind", "steps", "ground_truth"),
    [
        ("sum", "7 + 2 = 9 , 9 + 8 = 17", "17"),
        ("largest", "In order 2 , 7 , 8 : 7 + 8 = 15", "15"),
        ("spread", "In order 2 , 7 , 8 : 8 - 2 = 6", "6"),
    ],
)
def test_worked_examples(kind, steps, ground_truth):
    from comparison.task import KINDS

    found = next(one for one in KINDS if one.name == kind)
    assert found.worked_example([7, 2, 8]) == f"The digits are 7 2 8\n{steps}\nFinal answer: {ground_truth}"
    assert found.ground_truth([7, 2, 8]) == ground_truth


def test_forms_of_a_question():
    from comparison.task import KINDS, asked

    direct, reasoned = (asked(KINDS[0].text, form) for form in ("direct", "reasoned"))
    assert direct.splitlines() == [KINDS[0].text, "Give the answer alone."]
    assert asked(direct, "reasoned") == reasoned != direct


def test_paired_interval_by_hand():
    """Differences 1, 2, 3: mean 2, standard deviation 1; t of 2 degrees of freedom at 97.5 % is 4.3027, over the root of 3."""
    from comparison.report import paired_interval

    found = paired_interval([3, 5, 7], [2, 3, 4])
    assert found == pytest.approx({"mean": 2.0, "low": 2 - 2.48414, "high": 2 + 2.48414}, abs=1e-4)
    assert paired_interval([3], [2]) == {"mean": 1.0, "low": None, "high": None}


@pytest.mark.slow
def test_the_whole_path(tmp_path, monkeypatch, capfd):
    """Every method is trained and measured once; a second run finds everything done and makes the same file.

    Its worker is forked, so that it need not import everything again.
    """
    from methods import main

    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr("methods.multiprocessing.get_context", lambda _: forked)

    def run(output, *sizes):
        arguments = ["--seeds", "1", "--workers", "1", "--work", str(tmp_path / "work"), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", ["methods.py", *arguments, *sizes])
        main()
        return json.loads((tmp_path / output).read_text())["summary"]

    summary = run("a.json", "--quick")
    methods = summary["methods"]
    assert list(methods) == ["warm_up", "more_warm_up", "sft", "dpo", "bco", "dpo_sft", "bco_sft", "mpo_no_delta", "mpo"]
    assert all(len(numbers[form]["accuracy"]) == 1 for numbers in methods.values() for form in ("direct", "reasoned"))
    # The first update has the same direction for DPO and BCO, and for the three mixtures; these differ in any case.
    margins = [methods[name]["margin"][0] for name in ("warm_up", "more_warm_up", "sft", "dpo", "dpo_sft")]
    assert margins[0] == 0.0 and len(set(margins)) == len(margins)
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert capfd.readouterr().out.count("\n| ") == 15

    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert run("b.json", "--quick") == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")} == done
    with pytest.raises(SystemExit, match=str(tmp_path / "work")):
        run("c.json")
