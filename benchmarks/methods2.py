"""Find out when MPO's preference terms help: an exploration, and the run that was registered after it.

    python benchmarks/methods2.py explore             # on seeds that count for nothing: methods2_exploration.md
    python benchmarks/methods2.py run                 # the registered jobs: methods2.md
    python benchmarks/methods2.py list                # what is done
    python benchmarks/methods2.py report              # tables and plots of what is done

One process of one thread. Every finished job leaves one JSON file in results/methods2/, and is not run again: stop at any time and
run the same command again, here or elsewhere. Warmed-up models are kept in runs/methods2/.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # other processes need the other cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from preference.jobs import Job, run  # noqa: E402 (the environment comes first)
from preference.plan import EXPLORATION, Planned, registered  # noqa: E402
from preference.start import Start, prepare  # noqa: E402

EXPLORED = 500  # evaluation questions of the exploration
RESULTS = Path(__file__).parent / "results" / "methods2"
STARTS = Path("runs") / "methods2" / "starts"


def path_of(kind: str, planned: Planned) -> Path:
    """The JSON file of a job."""
    return RESULTS / kind / f"{planned.name}.json"


def run_jobs(kind: str, jobs: list[Planned], only: str = "") -> None:
    """Run the jobs that are not done, in order."""
    loaded: tuple[Any, Start] | None = None
    for planned in jobs:
        path = path_of(kind, planned)
        if path.is_file() or only not in planned.name:
            continue
        key = (planned.task, planned.seed, planned.job.epochs)
        if loaded is None or loaded[0] != key:
            loaded = key, prepare(STARTS, planned.task, planned.seed, epochs=planned.job.epochs)
            place = path.with_name(f"start_{planned.task}_{planned.seed}{_epochs(planned.job)}.json")
            if not place.is_file():  # a start that is warmed up again may be another one: every job keeps its own start's
                save(place, loaded[1].numbers)
        begun = time.monotonic()
        result = run(loaded[1], planned.job, planned.seed, EXPLORED if kind == "explore" else None)
        save(path, {"name": planned.name, "task": planned.task, "start": loaded[1].numbers["correct"], **result})
        correct = result["correct"]
        half = len(correct) if kind == "explore" else len(correct) // 2
        print(
            f"{planned.name}: validation {100 * correct[:half].count('1') / half:.1f} %, sampled {100 * result['sampled']:.1f} %, "
            f"short {result['short']}, {time.monotonic() - begun:.0f} s ({sum(result['seconds'].values()):.0f} s CPU)",
            flush=True,
        )


def _epochs(job: Job) -> str:
    return "" if job.epochs is None else f"_{job.epochs:g}"


def save(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content) + "\n", encoding="utf-8")
    unfinished.replace(path)


def main() -> None:
    """Run, list or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["explore", "run", "list", "report"], help="what to do")
    parser.add_argument("--only", default="", metavar="TEXT", help="only jobs whose name contains TEXT")
    options = parser.parse_args()
    if options.action == "explore":
        run_jobs("explore", EXPLORATION, options.only)
    elif options.action == "run":
        while open_jobs := [job for job in registered(RESULTS / "run") if not path_of("run", job).is_file()]:
            run_jobs("run", open_jobs, options.only)
            if options.only:
                break
    elif options.action == "list":
        for kind, jobs in (("explore", EXPLORATION), ("run", registered(RESULTS / "run"))):
            done = [planned.name for planned in jobs if path_of(kind, planned).is_file()]
            print(f"{kind}: {len(done)} of {len(jobs)} jobs done", *done, sep="\n  ")
    else:
        from preference.report import report

        report(RESULTS, sys.stdout)


if __name__ == "__main__":
    main()
