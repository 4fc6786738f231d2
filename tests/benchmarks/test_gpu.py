"""benchmarks/gpu.py on a CPU with tiny shapes: what steps write, and that no step, deadline or kill costs another's results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def gpu():
    """The module; scripts import each other by their bare names."""
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    import gpu

    yield gpu
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def steps(gpu):
    """The module of the steps."""
    import gpu_steps

    return gpu_steps


@pytest.fixture
def report(gpu):
    """The module of the report."""
    import gpu_report

    return gpu_report


def command(out, *arguments):
    return [sys.executable, str(BENCHMARKS / "gpu.py"), "--rehearse", "--out", str(out), *arguments]


def rehearse(out, *arguments):
    done = subprocess.run(command(out, *arguments), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def read(out):
    """What each step left, by name."""
    return {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().split()[2] != "Z"


# Steps in processes of their own


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """What steps left, of which one hangs and the last imports everything; what was printed; gpu.md."""
    out = tmp_path_factory.mktemp("gpu")
    printed = rehearse(out, "--steps", "quick", "hang", "tests")
    return read(out), printed, (out / "gpu.md").read_text()


@pytest.mark.slow
def test_a_step_that_hangs_is_stopped_and_the_next_one_runs(rehearsal):
    steps, *_ = rehearsal
    assert [steps[name]["state"] for name in ("quick", "hang", "tests")] == ["done", "cut", "done"]
    assert steps["hang"]["first"] == 1 and "3 s" in steps["hang"]["why"]  # what it had found by then is kept
    assert not alive(steps["hang"]["pid"])


@pytest.mark.slow
def test_outcomes_of_the_gpu_tests(rehearsal):
    """One by one; without a GPU they skip."""
    tests = rehearsal[0]["tests"]
    assert tests["exit_code_of_pytest"] == 0 and tests["failures"] == {}
    names = {name.split("::")[0] for name in tests["tests"]}
    assert names == {path.name for path in (BENCHMARKS.parent / "tests" / "gpu").glob("test_*.py")}
    assert set(tests["tests"].values()) <= {"passed", "skipped"}


@pytest.mark.slow
def test_summary(rehearsal):
    steps, printed, page = rehearsal
    whole = steps["gpu"]
    assert whole["steps"] == {name: steps[name] for name in ("quick", "hang", "tests")}
    assert {"command", "device", "versions", "speeds", "goals"} <= whole.keys()
    assert page in printed
    assert all(f"| {name} | {steps[name]['state']} |" in page for name in whole["steps"])


def test_at_the_deadline_the_rest_is_skipped(tmp_path):
    printed = rehearse(tmp_path, "--steps", "long", "quick", "hang", "--minutes", "0.05")
    steps = read(tmp_path)
    assert [steps[name]["state"] for name in ("long", "quick", "hang")] == ["cut", "skipped", "skipped"]
    assert {steps[name]["why"] for name in ("long", "quick", "hang")} == {"no time was left"}
    assert printed.count("skipped, no time was left") == 2


def test_killed_in_the_middle_it_leaves_whole_files(tmp_path):
    """kill -9 while the second step runs: the first one's results are there and in the summary, and no process goes on."""
    process = subprocess.Popen(command(tmp_path, "--steps", "quick", "long"), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while "pid" not in read(tmp_path).get("long", {}) and time.monotonic() < until:
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    steps = read(tmp_path)
    assert steps["quick"]["state"] == "done" and steps["gpu"]["steps"]["quick"] == steps["quick"]
    assert (steps["long"]["state"], steps["long"]["first"]) == ("running", 1)
    until = time.monotonic() + 60
    while alive(steps["long"]["pid"]) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(steps["long"]["pid"])


def test_a_step_that_cannot_import_fails_and_says_why(tmp_path):
    """A PyTorch that does not load: the step fails, and the next one runs."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is broken')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run(command(tmp_path, "--steps", "profile", "quick"), env=env, capture_output=True, timeout=300, check=True)
    steps = read(tmp_path)
    assert (steps["profile"]["state"], steps["quick"]["state"]) == ("failed", "done")
    assert "torch is broken" in steps["profile"]["why"]


def test_hidden_and_unknown_steps_are_refused(gpu, monkeypatch, capsys):
    for steps in (["hang"], ["tests", "tests"], ["speed"]):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--steps", *steps])
        with pytest.raises(SystemExit):
            gpu.parse()
        assert "tests, 8B, memory, profile, fuser" in capsys.readouterr().err


# What steps find, in this process


@pytest.fixture
def result(steps, tmp_path):
    steps.write(tmp_path / "step.json", {})
    return steps.Result(tmp_path / "step.json", rehearse=True)


def test_timed_sides(steps, report, result):
    """Out of memory (rehearsed, for TRL with LoRA and 4 pairs) leads to checkpointing for all sides, and is in the table."""
    steps.time_cases(result, [("8B", "lora", 4, False)])
    found = json.loads(result.path.read_text())
    first, second = found["cases"]
    assert list(first["sides"]) == ["trl"] and "out_of_memory" in first["sides"]["trl"]
    assert second["case"] == {**first["case"], "checkpointing": True}
    assert list(second["sides"]) == ["trl", "live", "cached"]
    for side in second["sides"].values():
        assert {"median_s", "seconds", "built_s", "peak_gib"} == side.keys() and side["median_s"] > 0
    rows = list(report.speeds(found, report.counted()))
    assert [(row["case"], row["side"], row["out_of_memory"]) for row in rows] == [
        ("8B lora 4", "trl", True),
        *(("8B lora 4 checkpointing", side, False) for side in ("trl", "live", "cached")),
    ]
    assert len(report.goals(rows)) == 4  # MFU and ratio of two sides
    assert "| 8B lora 4 | trl | out of memory |" in report.page({"8B": {**found, "state": "done"}}, rows, {})


def test_the_fuser_against_its_parts(steps, result):
    steps.time_fuser(result)
    found = json.loads(result.path.read_text())
    assert (found["fuser"][0]["grid"], found["fuser"][0]["tiles"]) == (4, 1) and found["fuser"][0]["block_s"] > 0
    (case,) = found["fuser_memory"]
    assert case["sampled_values_mb"] == 16 * 4 * 4 * 32 * 4 / 1e6  # queries, levels, points, channels, bytes
    assert 0 < case["chunks_mb"]["forward"] < case["chunks_mb"]["training"]


def test_every_timed_case_is_counted(steps, report, monkeypatch, result):
    """FLOPs and tokens are there for all that steps time, with and without checkpointing."""
    timed = []
    monkeypatch.setattr(steps, "time_sides", lambda result, case, *measured: timed.append(case) or False)
    steps.time_8b(result)
    steps.time_small(result)
    keys = {report.case_key(vars(case)) for case in timed}
    assert len(keys) == 2 * 4 + 2 * 8 - 1 and keys <= report.counted().keys()
    assert {case.pairs for case in timed} == {1, 4} and {case.tune for case in timed} == {"lora", "full"}


def test_speeds(report):
    """By hand: 2 pairs in 0.5 s are 4 a second; at 30 tokens and 5e12 FLOPs a pair, 120 tokens/s and 20 of 40 TFLOP/s.

    TRL takes 1.5 s, three times as long, for 11e12 FLOPs with checkpointing where ours has 5.5e12: twice as many.
    """
    case = {"shape": "8B", "tune": "lora", "pairs": 2, "checkpointing": True}
    plain = {"trl": {"flops": 1e13, "text_tokens": 90}, "cached": {"flops": 5e12, "text_tokens": 30}}
    again = {"trl": {"flops": 11e12}, "cached": {"flops": 5.5e12}}
    step = {"matrix_tflops": 40, "cases": [{"case": case, "sides": {"trl": {"median_s": 1.5}, "cached": {"median_s": 0.5}}}]}
    trl, cached = report.speeds(step, {"8B lora 2": plain, "8B lora 2 checkpointing": again})
    assert (cached["pairs_per_s"], cached["useful_tokens_per_s"], cached["mfu"]) == (4, 120, 0.5)
    assert (cached["time_ratio"], cached["flop_ratio"]) == (3, 2)
    assert trl["useful_tokens_per_s"] == pytest.approx(40) and "time_ratio" not in trl
    assert list(report.goals([trl, cached]).values()) == [True, False]


def test_sft(steps, result):
    """Both trainers on the same conversations, and attention with a mask and causal."""
    steps.time_sft(result)
    found = json.loads(result.path.read_text())
    assert found["conversations"] == 4 and list(found["sft"]) == ["trl", "packed"]
    assert all(side["median_s"] > 0 and side["steps"] >= 1 for side in found["sft"].values())
    assert found["speed_over_trl"] > 0 and found["attention"]["seconds"].keys() == {"mask", "causal"}


def test_memory(steps, result):
    """Estimate and peak of every case, QLoRA among them."""
    pytest.importorskip("bitsandbytes")
    steps.compare_memory(result)
    cases = json.loads(result.path.read_text())["cases"]
    assert [(case["case"]["shape"], case["case"]["tune"]) for case in cases] == [
        *(("8B", tune) for tune in ("lora", "qlora", "full", "lora", "full")),
        ("2B", "full"),
    ]
    for case in cases:
        assert case["estimate_mb"]["with margin"] > case["estimate_mb"]["total"] > 0
        assert {"measured_mb", "ratio", "reserved_mb"} <= case.keys()


def test_memory_without_bitsandbytes(steps, result, monkeypatch):
    """QLoRA is left out, and its line says why."""
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    qlora = next(case for case in steps.memory_cases(True) if case.tune == "qlora")
    monkeypatch.setattr(steps, "memory_cases", lambda rehearse: [qlora])
    steps.compare_memory(result)
    (case,) = json.loads(result.path.read_text())["cases"]
    assert case["skipped"] == "bitsandbytes is not installed" and "estimate_mb" not in case


def test_profile(steps, result):
    """Without a GPU, operators are the kernels."""
    steps.profile_step(result)
    profile = json.loads(result.path.read_text())
    assert profile["on"] == "cpu_op" and len(profile["kernels"]) == 15
    assert profile["case"]["shape"] == "8B" and profile["kernels_launched"] > 1000
    assert {"span_ms", "idle_ms", "gaps", "longest_gaps", "host_waits"} <= profile.keys()
    assert [kernel["ms"] for kernel in profile["kernels"]] == sorted((k["ms"] for k in profile["kernels"]), reverse=True)


def test_trace(report):
    """Two streams: a from 0 to 10 us and again from 50 to 60, b from 5 to 20 and c from 8 to 12 inside it: idle from 20 to 50."""

    def event(cat, name, ts, dur):
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("kernel", "a", 0, 10),
        event("kernel", "b", 5, 15),
        event("gpu_memcpy", "c", 8, 4),
        event("kernel", "a", 50, 10),
    ]
    events += [event("cuda_runtime", "cudaStreamSynchronize", 0, 7), event("cpu_op", "aten::item", 0, 9), {"ph": "s", "name": "x"}]
    events += [event("cpu_op", "aten::mm", 0, 30), event("gpu_user_annotation", "step", 0, 60)]
    found = report.read_trace(events)
    assert (found["on"], found["kernels_launched"], found["span_ms"], found["idle_ms"]) == ("kernel", 4, 0.06, 0.03)
    assert found["kernels"][0] == {"name": "a", "ms": 0.02, "count": 2}
    assert found["longest_gaps"] == [{"ms": 0.03, "after": "b", "before": "a"}]
    assert {wait["name"] for wait in found["host_waits"]} == {"cudaStreamSynchronize", "aten::item"}
    assert report.read_trace([])["on"] == "nothing"
