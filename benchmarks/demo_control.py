"""Compare MPO in `mpo demo` with its control (SFT on the chosen completions), and with other losses and settings.

    python benchmarks/demo_control.py                        # runs the demo first if needed; then DPO alone
    python benchmarks/demo_control.py --seed 1 --demo runs/demo1 --variant published loss=mpo --variant ipo loss=ipo

Every variant starts from the demo's warmed-up model and trains on the demo's pairs in the same order, with the demo's recipe and
the changes given. All are evaluated on the demo's evaluation questions. An interrupted run continues.
"""

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import set_seed

from mpo.demo.folder import DemoFolder, DemoSettings, quick_settings
from mpo.demo.run import run_demo
from mpo.demo.stages import measure, train_on_pairs
from mpo.io import read_json_lines

RESULTS = Path(__file__).parent / "results"


class ControlFolder(DemoFolder):
    """The demo's folder, with the model of a variant instead of MPO's."""

    def __init__(self, root: Path, method: str) -> None:
        super().__init__(root)
        self.method, self.mpo = method, root / f"control_{method}"

    def responses(self, when: str) -> Path:
        """The demo's responses before training, and the method's responses after training."""
        return super().responses(when if when == "before" else f"control_{self.method}")


def correct_of(folder: DemoFolder, when: str) -> list[bool]:
    return [line["correct"] for line in read_json_lines(folder.responses(when))]


def share(correct: Sequence[bool]) -> dict[str, float]:
    """Percentage of right responses and its standard error, over the questions."""
    p = sum(correct) / len(correct)
    return {"percent": 100 * p, "standard_error": 100 * (p * (1 - p) / len(correct)) ** 0.5}


def difference(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Difference in points, second minus first, on the same questions, with its standard error."""
    each = [int(b) - int(a) for a, b in zip(first, second, strict=True)]
    mean = sum(each) / len(each)
    variance = sum((one - mean) ** 2 for one in each) / (len(each) - 1)
    return {"points": 100 * mean, "standard_error": 100 * (variance / len(each)) ** 0.5}


def run_control(root: Path, settings: DemoSettings, variants: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Run the demo if it is not done, then each variant of its training: a name and overrides of the recipe."""
    run_demo(root, settings)
    whens = {"warmed-up model": "before", "sft": "sft", "mpo": "after"}
    right = {name: correct_of(DemoFolder(root), when) for name, when in whens.items()}
    for method, overrides in variants.items():
        folder = ControlFolder(root, method)
        if not folder.responses("after").is_file():
            set_seed(settings.seed)
            train_on_pairs(folder, settings, folder.mpo, *overrides)
            measure(folder, folder.mpo, "after")
        right[method] = correct_of(folder, "after")
    less = {f"mpo less {name}": difference(correct, right["mpo"]) for name, correct in right.items() if name != "mpo"}
    folders = {"mpo": DemoFolder(root), **{method: ControlFolder(root, method) for method in variants}}
    steps = {name: folder.log()["global_step"] for name, folder in folders.items()}
    return {
        "steps": steps,
        "variants": dict(variants),
        "right": {name: share(correct) for name, correct in right.items()},
        "differences": less,
    }


def main() -> None:
    """Run what is missing, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of the demo (default: %(default)s)")
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "OVERRIDE"),
        help="a variant: its name, and changes to the demo's recipe (default: dpo loss=dpo)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the demo (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="use the demo's quick sizes, to test the script only")
    parser.add_argument("--output", type=Path, help="JSON file to write (default: results/demo_control_cpu_DATE.json here)")
    options = parser.parse_args()
    found = run_control(
        options.demo,
        quick_settings(options.seed) if options.quick else DemoSettings(seed=options.seed),
        {name: overrides for name, *overrides in options.variant or [["dpo", "loss=dpo"]]},
    )
    about: dict[str, Any] = {"date": date.today().isoformat(), "seed": options.seed, "quick": options.quick}
    about |= {"device": f"{platform.machine()} CPU", "python": platform.python_version()}
    about |= {name: version(name) for name in ("torch", "transformers", "trl", "mpo-trainer")}
    path = options.output or RESULTS / f"demo_control_cpu_{about['date']}.json"
    path.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1), f"\nwritten to {path}")


if __name__ == "__main__":
    main()
