"""Evaluate the demo's two models, before and after MPO, in both modes: directly and by chain of thought, with votes and best of 8.

    python benchmarks/demo_modes.py runs/demo_modes      # about 20 minutes on two cores; an interrupted run continues
    python benchmarks/demo_modes.py runs/demo_modes --screenshot docs/evaluation.png

The demo asks in one way, and so small a model knows no other. Here its worked examples ask each question twice: for the answer
alone, and for a chain of thought, in the words of `mpo evaluate`. MPO's pairs are of chains of thought. The screenshot is of its
page, by Chromium (`pip install playwright`).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import set_seed

from mpo.commands import main as mpo
from mpo.demo.data import make_dataset
from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.demo.stages import pair, sample, train_mpo, warm_up
from mpo.evaluation.run import MODES
from mpo.io import read_json_lines, write_json_lines

SETTINGS = DemoSettings(
    questions=200, eval_questions=100, warm_epochs=16, mpo_overrides=["trainer.max_steps=30", "trainer.save_steps=30"]
)


def ask_in_both_ways(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Draw the demo's data, and put the words of the modes after its questions."""
    numbers = make_dataset(folder, settings)

    def asked(line: dict[str, Any], mode: str, text: str | None = None) -> dict[str, Any]:
        return {**line, "question": f"{line['question']}\n{MODES[mode]['']}", **({"worked_example": text} if text else {})}

    worked = read_json_lines(folder.lines("worked"))
    both = [[asked(line, "direct", line["ground_truth"]), asked(line, "cot", line["worked_example"])] for line in worked]
    write_json_lines(folder.lines("worked"), (line for lines in both for line in lines))
    write_json_lines(folder.lines("questions"), (asked(line, "cot") for line in read_json_lines(folder.lines("questions"))))
    return numbers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder of the demo's files, the models and results/")
    parser.add_argument("--screenshot", type=Path, help="PNG file to write of the top of the page")
    parser.add_argument("--limit", type=int, default=SETTINGS.eval_questions, help="number of evaluation questions")
    args = parser.parse_args()
    folder = DemoFolder(args.output.absolute())
    progress = folder.read_progress()
    for stage in (ask_in_both_ways, warm_up, sample, pair, train_mpo):
        if stage.__name__ not in progress:
            print(stage.__name__, file=sys.stderr, flush=True)
            set_seed(SETTINGS.seed)
            progress[stage.__name__] = stage(folder, SETTINGS)
            folder.write_progress(progress)
    questions = folder.data / "digits.jsonl"
    lines = read_json_lines(folder.lines("eval"))
    write_json_lines(
        questions,
        [
            {"id": line["id"], "question": line["question"], "image": line["image"], "answer": line["ground_truth"]}
            for line in lines
        ],
    )
    models = (f"start={folder.warm}", f"mpo={folder.mpo}")
    flags = (
        "--mode",
        "both",
        "--n",
        "8",
        "--scorer",
        "reward",
        "--max-new-tokens",
        "64",
        "--limit",
        str(args.limit),
    )
    status = mpo(["evaluate", *models, str(questions), *flags, "--device", "cpu", "--output", str(folder.root / "results")])
    if args.screenshot and not status:
        screenshot(folder.root / "results" / "report.html", args.screenshot)
    return status


def screenshot(page: Path, png: Path, *, height: int = 1500) -> None:
    """Take a screenshot of the top of a page."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": height})
        tab.goto(page.absolute().as_uri())
        tab.screenshot(path=png)
        browser.close()
    with Image.open(png) as image:  # a palette: a fifth of the size
        image.convert("RGB").quantize(64).save(png, optimize=True)
    print(json.dumps({"screenshot": str(png), "bytes": png.stat().st_size}))


if __name__ == "__main__":
    raise SystemExit(main())
