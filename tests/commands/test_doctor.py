"""`mpo doctor` as a command: on this machine, and with a broken package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mpo.commands import main
from mpo.preflight.doctor import CHECKS, ENVIRONMENT, as_json, environment


@pytest.mark.slow
def test_the_page_of_this_machine(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    assert main(["doctor", "--run-dir", str(tmp_path)]) == 0
    page, noise = capfd.readouterr()
    lines = page.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")][:-1] == list(CHECKS)
    assert len(lines) <= 70 and max(len(line.replace(str(tmp_path), "")) for line in lines) <= 140 and noise == ""
    assert lines[-1].startswith("No problems") and lines[-1].endswith("step succeeded.")
    assert str(tmp_path) in page and "one step           a tiny InternVL on packed rows" in page
    assert "\x1b" not in page and str(Path.home()) not in page and "hf_abc" not in page


@pytest.mark.slow
def test_a_broken_torchvision_is_found_with_its_fix_and_status_1(tmp_path, capfd, monkeypatch):
    """A real file that fails like a torchvision built for another torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor", "--json", "--run-dir", str(tmp_path)]) == 1
    read = json.loads(capfd.readouterr().out)
    found = {finding["name"]: finding for section in read["sections"] for finding in section["findings"]}
    for name in ("torchvision", "transformers", "trl", "one step"):
        assert found[name]["status"] == "problem" and "operator torchvision::nms does not exist" in found[name]["value"]
        assert found[name]["fix"].startswith("pip install --force-reinstall --no-deps 'torchvision==0.")
    assert found["torch"]["status"] == "ok" and "Traceback" not in json.dumps(read)


@pytest.mark.slow
def test_reports_of_pytorch_and_transformers_are_attached(interpreter, monkeypatch):
    monkeypatch.setattr(sys, "executable", interpreter)
    reports = environment()
    assert list(reports) == list(ENVIRONMENT)
    for name, report in zip(("PyTorch", "`transformers`"), reports.values(), strict=True):
        assert f"{name} version: " in report
    assert as_json([], reports)["environment"] == reports


def test_help_teaches_and_needs_no_torch():
    program = "import sys; sys.modules['torch'] = None; from mpo.commands import main; main(['doctor', '--help'])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "mpo doctor --run-dir /data/runs" in shown.stdout
