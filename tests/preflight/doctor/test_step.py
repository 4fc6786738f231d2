"""The training step and the 4-bit layer, run for real."""

import tempfile

import pytest

from mpo.preflight.doctor import TRACEBACK
from mpo.preflight.trial import _fix, four_bits, layer_error, take_step, training_step


def test_a_step_is_taken(tmp_path, monkeypatch):
    """An untrained model on its first step: DPO is log 2, SFT about the log of the vocabulary's size, here a few hundred."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    log, device, dtype = take_step()
    assert log["loss/sigmoid"] == pytest.approx(0.693, abs=0.01)
    assert 4 < log["loss/sft"] < 8
    assert log["grad_norm"] > 0
    assert device.startswith(("cpu", "cuda", "mps", "xpu")) and dtype in ("float32", "bfloat16", "float16")
    assert list(tmp_path.iterdir()) == []  # no file is left over


def test_a_step_that_fails_is_one_line_with_its_fix(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    (found,) = training_step()
    assert found.status == "problem" and found.value.startswith("fails: FileNotFoundError") and found.fix == TRACEBACK


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "nvidia-smi"),
        (RuntimeError("CUDA error: no kernel image is available"), "pip install --upgrade torch"),
        (OSError(28, "No space left on device"), "export TMPDIR="),
        (ModuleNotFoundError("No module named 'jinja2x'", name="jinja2x"), "pip install jinja2x"),
        (ZeroDivisionError("oops"), TRACEBACK),
    ],
)
def test_what_fixes_a_step(error, fix):
    assert _fix(error).startswith(fix)


def test_a_layer_in_four_bits_computes_and_is_off_by_what_four_bits_cost():
    """NF4's relative error on normal weights is about 0.1; with 16 levels no result is exact."""
    pytest.importorskip("bitsandbytes")
    _, error = layer_error()
    assert 0.03 < error < 0.2
    (found,) = four_bits()
    assert found.status == "ok" and "NF4 on " in found.value


def test_a_layer_that_is_too_far_off_or_fails_is_a_problem(monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr("mpo.preflight.trial.TOLERANCE", 0.001)
    (found,) = four_bits()
    assert found.status == "problem" and "expected" in found.value
    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", lambda self, given: 1 / 0)
    (found,) = four_bits()
    assert found.status == "problem" and "ZeroDivisionError" in found.value and "bitsandbytes" in found.fix
