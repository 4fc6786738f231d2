"""The report: symbols, fixes and the last lines."""

import json

from mpo.preflight.doctor import STEP, Finding, Section, as_json, section_text, summary

FINE = Section(STEP, (Finding("one step", "loss 6.6"),))
ILL = Section(
    "Packages",
    (
        Finding("torchvision", "0.26.0 does not import: RuntimeError", "problem", "pip install torchvision"),
        Finding("transformers", "5.24.0 does not import: RuntimeError", "problem", "pip install torchvision"),
        Finding("trl", "not installed", "problem", "pip install 'trl>=1.16'"),
        Finding("GPU 0", "in use", "note", "nvidia-smi"),
    ),
)


def test_a_section():
    assert section_text(ILL) == (
        "Packages\n"
        "  ! torchvision        0.26.0 does not import: RuntimeError\n"
        "  ! transformers       5.24.0 does not import: RuntimeError\n"
        "  ! trl                not installed\n"
        "  * GPU 0              in use -> nvidia-smi"
    )


def test_a_long_fix_stands_below():
    lines = section_text(Section("Hub", (Finding("access", "x" * 60, "note", "y" * 60),))).splitlines()
    assert lines[2] == " " * 23 + "-> " + "y" * 60


def test_each_fix_is_told_once_at_the_end():
    assert summary([ILL, FINE]) == (
        "3 problems (!), 1 note (*). Fix before a run:\n"
        "    torchvision and 1 more  pip install torchvision\n"
        "    trl                     pip install 'trl>=1.16'"
    )


def test_only_a_step_that_was_taken_says_that_a_run_can_start():
    assert summary([FINE]) == "No problems, 0 notes (*). The training step succeeded."
    assert "not tested" in summary([])
    assert "not tested" in summary([Section(STEP, (Finding("this check", "could not be checked: x", "note"),))])


def test_json_is_the_same():
    read = json.loads(json.dumps(as_json([ILL, FINE])))
    assert read["problems"] == 3
    assert read["sections"][0]["findings"][2] == {
        "name": "trl",
        "value": "not installed",
        "status": "problem",
        "fix": "pip install 'trl>=1.16'",
    }
