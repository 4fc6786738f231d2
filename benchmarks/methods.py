"""Test the claims of the MPO paper: eight methods from the same warmed-up models, with equal steps and batch size.

    python benchmarks/methods.py                      # everything, an hour or two on two cores; JSON and plot into results/
    python benchmarks/methods.py --seeds 1 --quick    # a test of the script in a minute, with nothing learned
    python benchmarks/methods.py --list               # list the jobs that are done

Task, sizes, metric and the criteria for each claim were fixed before the run: methods.md. Every job (one method, one learning rate,
one seed) takes minutes and writes one JSON file to the work folder: stop at any time and run the same command again. Seed 0 is only
used to choose each method's learning rate by reasoned accuracy; seeds 1 to N are reported.
"""

import argparse
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # two jobs of two threads each would compete for cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from comparison.jobs import LEARNING_RATES, METHODS, result_path, run_job  # noqa: E402 (the environment comes first)
from comparison.prepare import DONE, prepare  # noqa: E402
from comparison.report import plot, summarize, table  # noqa: E402
from comparison.settings import QUICK, Settings  # noqa: E402
from tqdm import tqdm  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CHOOSING = 0


def folder_of(work: Path, seed: int) -> Path:
    """The folder of a seed."""
    return work / f"seed_{seed}"


def run_all(calls: Sequence[tuple[Any, ...]], pool: ProcessPoolExecutor, title: str) -> None:
    """Run calls in the processes of a pool, with a progress bar; stop all at the first failure."""
    with tqdm(total=len(calls), desc=title, unit="job") as bar:
        futures = [pool.submit(quietly, *call) for call in calls]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def quietly(call: Callable[..., None], *arguments: Any) -> None:
    """Run a call in a worker, with its output in a log file of the seed, so that the progress bar stays readable."""
    folder: Path = arguments[0]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
        call(*arguments)


def chosen_rate(work: Path, method: str, rates: Sequence[float] = LEARNING_RATES) -> float:
    """The learning rate with the highest reasoned accuracy on seed 0; the lowest in case of ties."""
    if len(rates) == 1:
        return rates[0]
    return max(rates, key=lambda rate: sum(_read(folder_of(work, CHOOSING), method, rate)["reasoned"]["correct"]))


def _read(folder: Path, method: str, rate: float) -> dict[str, Any]:
    return dict(json.loads(result_path(folder, method, rate).read_text()))


def jobs_of(work: Path, seed: int, rates: dict[str, Sequence[float]], settings: Settings) -> list[Any]:
    """The jobs of a seed that are not done, as calls."""
    folder = folder_of(work, seed)
    jobs = [(method, rate) for method, own in rates.items() for rate in own if not result_path(folder, method, rate).is_file()]
    return [(run_job, folder, method, rate, seed, settings) for method, rate in jobs]


def main() -> None:
    """Run what is missing, then write JSON, table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds to report, besides seed 0 (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use tiny sizes, to test the script only")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes of one thread (default: %(default)s)")
    parser.add_argument("--prepare-only", action="store_true", help="generate data and warm models up, and show their numbers")
    parser.add_argument("--list", action="store_true", help="list the jobs that are done")
    parser.add_argument("--work", type=Path, help="folder of models and jobs (default: runs/methods or runs/methods_quick)")
    parser.add_argument(
        "--output", type=Path, help="JSON file to write, and its plot (default: results/methods_cpu_DATE.json here)"
    )
    options = parser.parse_args()
    if options.seeds < 1 or options.workers < 1:
        parser.error(f"--seeds and --workers must be 1 or more; got {options.seeds} and {options.workers}.")
    settings = QUICK if options.quick else Settings()
    work = (options.work or Path("runs") / ("methods_quick" if options.quick else "methods")).absolute()
    _same_settings(work, settings)
    seeds = range(1, options.seeds + 1)
    if options.list:
        return _list(work, seeds)

    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:  # of one thread each
        folders = {seed: folder_of(work, seed) for seed in (CHOOSING, *seeds)}
        preparing = [(prepare, folder, seed, settings) for seed, folder in folders.items() if not (folder / DONE).is_file()]
        run_all(preparing, pool, "warm-up")
        if options.prepare_only:
            return _show_prepared(work, seeds)
        candidates = {method: LEARNING_RATES[: 1 if options.quick and method != "mpo" else None] for method in METHODS}
        choices = {method: rates for method, rates in candidates.items() if len(rates) > 1}
        run_all(jobs_of(work, CHOOSING, choices, settings), pool, "learning rates")
        rates = {method: chosen_rate(work, method, candidates[method]) for method in METHODS}
        chosen = {method: [rate] for method, rate in rates.items()}
        run_all([job for seed in seeds for job in jobs_of(work, seed, chosen, settings)], pool, "methods")

    runs = {method: [_read(folder_of(work, seed), method, rate) for seed in seeds] for method, rate in rates.items()}
    prepared = [json.loads((folder_of(work, seed) / DONE).read_text()) for seed in (CHOOSING, *seeds)]
    result = {
        "command": " ".join(["python benchmarks/methods.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": f"{platform.machine()} CPU, {options.workers} processes of one thread",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "trl", "scikit-learn", "mpo-trainer")},
        "settings": asdict(settings),
        "learning_rates": {
            method: {f"{rate:.0e}": _share(_read(folder_of(work, CHOOSING), method, rate)) for rate in rates}
            for method, rates in choices.items()
        },
        "prepared": [{"seed": entry["seed"], "pairing": entry["pairing"]} for entry in prepared],
        "summary": summarize([entry["before"] for entry in prepared[1:]], runs, rates),
    }
    path = options.output or RESULTS / f"methods_cpu_{result['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(result["summary"], path.with_suffix(".png"))
    print(table(result["summary"]))
    print(f"written to {path} and {path.with_suffix('.png')}", file=sys.stderr)


def _share(run: dict[str, Any]) -> float:
    return sum(run["reasoned"]["correct"]) / len(run["reasoned"]["correct"])


def _same_settings(work: Path, settings: Settings) -> None:
    path = work / "settings.json"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(settings), indent=1) + "\n")
    elif json.loads(path.read_text()) != asdict(settings):
        raise SystemExit(f"{work} holds jobs of other sizes (see {path}). Remove it, or choose another --work.")


def _list(work: Path, seeds: Sequence[int]) -> None:
    for seed in (CHOOSING, *seeds):
        folder = folder_of(work, seed)
        done = sorted(path.stem for path in folder.glob("jobs/*.json"))
        print(f"seed {seed}: {'warmed up' if (folder / DONE).is_file() else 'nothing yet'}; {', '.join(done) or 'no jobs done'}")


def _show_prepared(work: Path, seeds: Sequence[int]) -> None:
    for seed in (CHOOSING, *seeds):
        prepared = json.loads((folder_of(work, seed) / DONE).read_text())
        before, pairing = prepared["before"], prepared["pairing"]["questions"]
        shares = ", ".join(f"{form} {sum(found['correct']) / len(found['correct']):.1%}" for form, found in before.items())
        total = len(before["reasoned"]["correct"])
        mixed = 1 - (pairing["all_right"] + pairing["all_wrong"]) / pairing["questions"]
        print(
            f"seed {seed}: {shares}, read {before['reasoned']['read'] / total:.1%}, questions with right and wrong samples "
            f"{mixed:.1%}, {pairing['pairs']:,} pairs"
        )


if __name__ == "__main__":
    main()
