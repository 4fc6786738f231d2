"""Warm up the demo's model with TRL's SFTTrainer and with PackedSFTTrainer: CPU seconds, and right responses afterwards.

    python benchmarks/demo_warm_up.py                    # seeds 7, 8 and 9, JSON into results/
    python benchmarks/demo_warm_up.py --quick --seeds 0  # the quick demo's sizes, to test the script only

Both start from the same weights and train on the same worked examples, with the demo's settings; on both sides the loss
is the mean over the labelled tokens of a step. The order of the examples differs. The side that comes first alternates.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from mpo.demo import stages
from mpo.demo.data import make_dataset
from mpo.demo.folder import DemoFolder, DemoSettings, quick_settings
from mpo.io import read_json_lines

RESULTS = Path(__file__).parent / "results"
SIDES = ("trl", "packed")


class TRLConfig(SFTConfig):
    """TRL's settings for those of the demo's warm-up; its loss is the mean over the labelled tokens of a step."""

    def __init__(self, *, batching: str, loss_average: str, **settings: Any) -> None:
        assert (batching, loss_average) == ("conversations", "token")
        super().__init__(max_length=None, **settings)


def warm_up(side: str, root: Path, settings: DemoSettings) -> dict[str, Any]:
    """Warm up and evaluate; the numbers of both."""
    folder = DemoFolder(root)
    set_seed(settings.seed)
    make_dataset(folder, settings)
    with ExitStack() as stack:
        if side == "trl":
            stack.enter_context(mock.patch.multiple(stages, PackedSFTConfig=TRLConfig, PackedSFTTrainer=SFTTrainer))
        set_seed(settings.seed)
        started, cpu = time.monotonic(), time.process_time()
        numbers = stages.warm_up(folder, settings)
        numbers |= {"CPU seconds": time.process_time() - cpu, "seconds": time.monotonic() - started}
    stages.measure(folder, folder.warm, "before")
    return {**numbers, "right": [line["correct"] for line in read_json_lines(folder.responses("before"))]}


def compare(seeds: Sequence[int], quick: bool) -> dict[str, Any]:
    """Run both sides for each seed."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number, seed in enumerate(seeds):
        settings = quick_settings(seed) if quick else DemoSettings(seed=seed)
        for side in SIDES if number % 2 else SIDES[::-1]:
            with tempfile.TemporaryDirectory() as root:
                found = warm_up(side, Path(root), settings)
            right = found.pop("right")
            runs[side].append({"seed": seed, **found, "percent right": 100 * sum(right) / len(right)})
            print(side, runs[side][-1], flush=True)
    percents = {side: [run["percent right"] for run in each] for side, each in runs.items()}
    differences = [ours - theirs for ours, theirs in zip(percents["packed"], percents["trl"], strict=True)]
    spent = {side: statistics.median(run["CPU seconds"] for run in each) for side, each in runs.items()}
    return {
        "runs": runs,
        "mean percent right": {side: statistics.mean(values) for side, values in percents.items()},
        "points, packed less TRL's, by seed": differences,
        "median CPU seconds": spent,
        "TRL's CPU seconds over ours": spent["trl"] / spent["packed"],
    }


def main() -> None:
    """Compare and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[7, 8, 9], help="seeds of the demo (default: 7 8 9)")
    parser.add_argument("--quick", action="store_true", help="use the demo's quick sizes, to test the script only")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/demo_warm_up_cpu_DATE.json here)")
    options = parser.parse_args()
    about: dict[str, Any] = {"date": date.today().isoformat(), "quick": options.quick, "device": f"{platform.machine()} CPU"}
    about |= {name: version(name) for name in ("torch", "transformers", "trl", "mpo-trainer")}
    path = options.output or RESULTS / f"demo_warm_up_cpu_{about['date']}.json"
    found = compare(options.seeds, options.quick)
    path.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1), f"\nwritten to {path}")


if __name__ == "__main__":
    main()
