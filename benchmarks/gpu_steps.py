"""The steps of benchmarks/gpu.py: what each measures, and the file that it leaves."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gpu_report import case_key, read_trace

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("trl", "live", "cached")  # TRL first: it needs the most memory


def write(path: Path, values: dict[str, Any]) -> None:
    """Replace a JSON file atomically."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1) + "\n")
    new.replace(path)


START = float(os.environ.get("GPU_BENCHMARK_START", time.monotonic()))  # start of the whole run, also in the processes of steps


def progress(text: str) -> None:
    """Print a line of progress, with the seconds since the start of the run."""
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


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
        from step_cases import SHAPES

        return SHAPES["tiny" if self.rehearse else name]


@dataclass(frozen=True)
class Step:
    """A step. ``limit``: in seconds. A hidden step is for rehearsals, and imports nothing."""

    what: str
    run: Callable[[Result], None]
    limit: float
    hidden: bool = False


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
    from step_cases import Case

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
    import step_cases
    import torch

    on_gpu = result.device == "cuda"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, step_cases.quiet():
        work = step.stepper(*step_cases.make_trainer(side, case, result.shape(case.shape), folder, result.device, "bfloat16"))
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
    import step_cases
    import torch

    case = step_cases.Case("8B", tune="lora")
    with tempfile.TemporaryDirectory() as folder, step_cases.quiet():
        work = step.stepper(*step_cases.make_trainer("live", case, result.shape("8B"), folder, result.device, "bfloat16"))
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
    import step_cases
    import torch

    shape, on_gpu = result.shape("1B"), result.device == "cuda"
    count, rounds = (4, 1) if result.rehearse else (32, 3)
    dataset, sides = sft.small_set(shape, count), {}
    for side in sft.SIDES:
        try:
            with tempfile.TemporaryDirectory() as folder, step_cases.quiet():
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
    from fuser_block import measure, memory

    small: dict[str, Any] = {"tiles": 1, "sides": (4,), "rounds": 1, "width": 32}
    result.save(fuser=measure(result.device, **(small if result.rehearse else {"tiles": 16})))
    result.save(fuser_memory=memory(result.device, ((1, 4),), 32) if result.rehearse else memory(result.device))


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
