"""Compare a training step with TRL's DPOTrainer: FLOPs, encoded tiles, computed tokens, time and peak memory.

    python benchmarks/step.py                          # the default set: counted on the full shapes, timed on a small one
    python benchmarks/step.py --measure counted --all  # every combination of the settings below
    python benchmarks/step.py --measure timed --timed-shape 1B --device cuda --dtype bfloat16

Counted: both trainers compute the loss of the same records with a very small model, and each of their calls to it is recorded: its
inputs, with or without gradients, with or without adapters. The calls are then executed again, forward and backward, by a model of
the full shape on the meta device, which runs every operator without its memory, under torch's FlopCounterMode. A multiplication and
an addition are two FLOPs; attention counts as in a flash kernel (2 matrix products forward, 5 backward), in full with any mask;
element-wise operations and the optimiser are not counted. TRL's LM head is counted for labelled positions only, as on a GPU.

Timed: real trainers with random weights, alternating steps, medians; peak memory of each side in its own process. On a CPU TRL's LM
head computes every position. For times it uses its GPU head, which skips unlabelled positions; memory is compared with both.
"""

import argparse
import contextlib
import copy
import ctypes
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from flops import count
from step_cases import SHAPES, SIDES, Case, head_as_on_gpus, make_trainer, quiet
from torch import nn

RESULTS = Path(__file__).parent / "results"


# --- Timing


def synchronised_seconds(work: Callable[[], Any], device: str) -> float:
    """Measure the seconds that `work` takes on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stepper(trainer: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """Return a full training step: loss, gradients, clipping and AdamW, on a collated batch."""
    # Fused, as in the Trainer: PyTorch's default on a GPU needs a second copy of the gradients.
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def step() -> None:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, copy.copy(batch))
        loss.backward()
        nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def timed(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure pairs per second of each side, in alternating steps, and peak memory of each in its own process."""
    shape = SHAPES[case.shape]
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(head_as_on_gpus() if options.device == "cpu" else contextlib.nullcontext())
        steps = {}
        for side in SIDES:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            steps[side] = stepper(*make_trainer(side, case, shape, folder, options.device, options.dtype))
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for round_ in range(options.warmup + options.steps):
            for side, step in steps.items():
                taken = synchronised_seconds(step, options.device)
                if round_ >= options.warmup:
                    seconds[side].append(taken)
            say(f"timed {case.shape}, {case.pairs} pairs a question: round {round_ + 1} of {options.warmup + options.steps}")
    peaks = {side: measure_in_own_process(side, case, options, as_on_gpus=False) for side in SIDES}
    lean = peaks["trl"] if options.device == "cuda" else measure_in_own_process("trl", case, options, as_on_gpus=True)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    ours = [side for side in SIDES if side != "trl"]
    return {
        "case": asdict(case),
        "seconds_of_each_step": seconds,
        "pairs_per_second": {side: case.pairs / median for side, median in medians.items()},
        "memory_mb": peaks,
        "pairs per second over TRL's": {side: medians["trl"] / medians[side] for side in ours},
        "peak memory over TRL's": {side: peaks[side]["peak"] / peaks["trl"]["peak"] for side in ours},
        "peak memory over TRL's with its GPU head": {side: peaks[side]["peak"] / lean["peak"] for side in ours},
    }


def measure_in_own_process(side: str, case: Case, options: argparse.Namespace, *, as_on_gpus: bool) -> dict[str, float]:
    """Measure the peak memory of a side in a new process that runs only this side."""
    command = [sys.executable, str(Path(__file__).resolve()), "--memory-of", side, "--case", json.dumps(asdict(case))]
    command += ["--device", options.device, "--dtype", options.dtype, *["--head-as-on-gpus"] * as_on_gpus]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def memory_of(side: str, case: Case, device: str, dtype: str, as_on_gpus: bool) -> dict[str, float]:
    """Measure the memory of this process over three steps, in MB, without that of Python and the libraries.

    ``peak``: models, optimiser, gradients and activations. ``of_steps``: increase since before the first step (activations,
    gradients, optimiser state).
    """
    on_gpu = device == "cuda"
    head = head_as_on_gpus() if as_on_gpus else contextlib.nullcontext()

    def now() -> float:
        if on_gpu:
            return torch.cuda.memory_allocated() / 2**20
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    libraries = now()
    with tempfile.TemporaryDirectory() as folder, quiet(), head:
        step = stepper(*make_trainer(side, case, SHAPES[case.shape], folder, device, dtype))
        if not on_gpu:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory freed by building and filling the cache does not count
        before = now()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: building the trainers does not count
        for _ in range(3):
            step()
        if on_gpu:
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
            peak = int(line.split()[1]) / 1024
    return {"peak": peak - libraries, "of_steps": peak - before, "libraries": libraries}


# --- Targets, table, command line

TARGETS = {  # 6+1 tiles, 300-token completions, frozen tower, full: smallest ratio of TRL's FLOPs to ours
    ("1B", 1): {"live": 2.3, "cached": 2.7, "cached features": 5.2},
    ("8B", 1): {"live": 1.75, "cached": 2.1, "cached features": 2.5},
    ("1B", 4): {"live": 5.5, "cached features": 11.0},
    ("8B", 4): {"live": 3.8, "cached features": 5.6},
}
FEATURES = 1.4  # pairs per second of cached features over those of cached references alone, with 1 pair a question
FASTER, MEMORY = 1.8, 0.6  # pairs per second over TRL's, at least; peak memory over TRL's, at most


def targets_of(case: Case) -> dict[str, float]:
    """The FLOP targets of a case, by side."""
    at_settings = (case.tiles, case.answer, case.tower, case.tune) == (7, 300, "frozen", "full")
    return TARGETS.get((case.shape, case.pairs), {}) if at_settings else {}


def judged(value: float, goal: float, at_most: bool = False) -> dict[str, Any]:
    """Compare a measurement with its target."""
    return {"value": value, "target": goal, "reached": value <= goal if at_most else value >= goal}


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases to count."""
    every = {
        "shapes": ["1B", "2B", "8B"],
        "tiles": [1, 7, 13],
        "completions": [100, 300, 1000],
        "pairs": [1, 4],
        "towers": ["frozen", "trained"],
        "tune": ["full", "lora"],
        "checkpointing": ["off", "on"],
    }
    axes = [every[name] if options.all else getattr(options, name) for name in every]
    made = []
    for shape, tiles, completion, pairs, tower, tune, checkpointing in itertools.product(*axes):
        made.append(Case(shape, tiles, completion, pairs, tower, tune, checkpointing == "on"))
    return made


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


def print_counted(result: dict[str, Any]) -> None:
    """Print a line of the table."""
    case, over, goals = result["case"], result["TRL over"], result["targets"]
    verdict = ", ".join(f"{s} {g['target']} {'reached' if g['reached'] else 'NOT REACHED'}" for s, g in goals.items())
    print(
        f"{case['shape']:>5} {case['tiles']:>5} {case['answer']:>6} {case['pairs']:>5} {case['tower']:>7} {case['tune']:>4} "
        f"{'on' if case['checkpointing'] else 'off':>5} {over['live']:>8.2f} {over['cached']:>10.2f} "
        f"{over.get('cached features', float('nan')):>10.2f}  {verdict}",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="+", default=["counted", "timed"], choices=("counted", "timed"))
    parser.add_argument("--all", action="store_true", help="count every combination of the settings (432)")
    parser.add_argument("--shapes", nargs="+", default=["1B", "2B", "8B"], choices=list(SHAPES), help="shapes to count")
    parser.add_argument(
        "--tiles", nargs="+", type=int, default=[7], choices=(1, 7, 13), help="tiles of the image, with its thumbnail"
    )
    parser.add_argument("--completions", nargs="+", type=int, default=[300], help="tokens each: 100, 300, 1000")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1, 4], help="pairs of one question, in one batch")
    parser.add_argument("--towers", nargs="+", default=["frozen"], choices=("frozen", "trained"))
    parser.add_argument("--tune", nargs="+", default=["full"], choices=("full", "lora"))
    parser.add_argument(
        "--checkpointing", nargs="+", default=["off", "on"], choices=("off", "on"), help="gradient checkpointing on both sides"
    )
    parser.add_argument(
        "--timed-shape", default="small", choices=list(SHAPES), help="shape to time, with the settings of the targets"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device of timing")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="dtype of timing")
    parser.add_argument("--steps", type=int, default=7, help="number of timed steps per side")
    parser.add_argument("--warmup", type=int, default=2, help="number of untimed steps per side before them")
    parser.add_argument("--output", type=Path, help="JSON file to write; default: benchmarks/results/step_DEVICE_DATE.json")
    parser.add_argument("--head-as-on-gpus", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print a table, write JSON."""
    options = parse()
    if options.memory_of:
        print(
            json.dumps(memory_of(options.memory_of, Case(**options.case), options.device, options.dtype, options.head_as_on_gpus))
        )
        return
    on_gpu = options.device == "cuda"
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/step.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "dtype_of_timing": options.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate", "mpo-trainer")},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "how": __doc__,
        "counted": [],
        "timed": [],
    }
    if "counted" in options.measure:
        print("TRL's FLOPs per pair over ours; tokens: of a completion; ckpt: gradient checkpointing on both sides")
        print(
            f"{'shape':>5} {'tiles':>5} {'tokens':>6} {'pairs':>5} {'tower':>7} {'tune':>4} {'ckpt':>5} {'live':>8} {'cached':>10} "
            f"{'features':>10}"
        )
        for case in cases_of(options):
            counted = count(case)
            counted["targets"] = {side: judged(counted["TRL over"][side], goal) for side, goal in targets_of(case).items()}
            result["counted"].append(counted)
            print_counted(counted)
    if "timed" in options.measure:
        for pairs in options.pairs:
            measured = timed(Case(options.timed_shape, pairs=pairs), options)
            measured["targets"] = {
                "pairs per second": judged(measured["pairs per second over TRL's"]["live"], FASTER),
                "peak memory": judged(measured["peak memory over TRL's"]["live"], MEMORY, at_most=True),
            }
            if pairs == 1:
                speed = measured["pairs_per_second"]
                measured["targets"]["cached features over cached"] = judged(speed["cached features"] / speed["cached"], FEATURES)
            result["timed"].append(measured)
            print(f"timed {options.timed_shape}, {pairs} pairs a question, {options.device} {options.dtype}:")
            for what in ("pairs per second over TRL's", "peak memory over TRL's", "peak memory over TRL's with its GPU head"):
                print(f"  {what:<42} " + "  ".join(f"{side} {value:.2f}" for side, value in measured[what].items()))
            for what, goal in measured["targets"].items():
                print(
                    f"  {what}: {goal['value']:.2f}, target {goal['target']} {'reached' if goal['reached'] else 'NOT REACHED'}",
                    flush=True,
                )
    path = options.output or RESULTS / f"step_{options.device}_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    say(f"written to {path}")


if __name__ == "__main__":
    main()
