"""Evaluate the demo's two models, before and after MPO, in both modes: directly and by chain of thought, with votes and best of 8.

    python benchmarks/demo_modes.py runs/demo_modes      # about 20 minutes on two idle cores; an interrupted run continues
    python benchmarks/demo_modes.py runs/demo_modes --screenshot docs/evaluation.png --harness 40

The demo asks in one way, and so small a model knows no other. Here its worked examples ask each question twice: for the answer
alone, and for a chain of thought, in the words of `mpo evaluate`. MPO's pairs are of chains of thought. The screenshot is of its
page, by Chromium (`pip install playwright`). With --harness lmms-eval asks the first model the same questions directly, and both
numbers are compared. Everything that is measured is written as JSON.
"""

import argparse
import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import set_seed

from mpo.commands import main as mpo
from mpo.demo.data import make_dataset
from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.demo.stages import pair, sample, train_mpo, warm_up
from mpo.evaluation.run import MODES
from mpo.io import read_json_lines, read_json_object, write_json_lines, write_text

SETTINGS = DemoSettings()
RESULTS = Path(__file__).parent / "results"
TASK = """
task: tiny_digits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 64, temperature: 0}}
process_results: !function utils.results
metric_list: [{{metric: correct, aggregation: mean, higher_is_better: true}}]
"""
UTILS = f"""
from pathlib import Path
from PIL import Image

def visual(doc):
    return [Image.open(Path({{folder!r}}) / doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + {chr(10) + MODES["direct"][""]!r}

def results(doc, results):
    return {{{{"correct": float(results[0].strip() == doc["answer"])}}}}
"""
"""A task of lmms-eval with the questions of a file, in the words of our mode `direct`."""


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
    parser.add_argument("--limit", type=int, default=200, help="number of evaluation questions (default: %(default)s)")
    parser.add_argument("--harness", type=int, metavar="N", help="also ask the first model N questions through lmms-eval")
    name = f"demo_modes_cpu_{date.today()}.json"
    parser.add_argument("--json", type=Path, default=RESULTS / name, help="JSON file to write (default: %(default)s)")
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
    flags = ("--mode", "both", "--n", "8", "--scorer", "reward", "--max-new-tokens", "64", "--limit", str(args.limit))
    measured = {"evaluation": run(folder.root / "results", *models, str(questions), *flags)}
    if args.harness:
        measured["harness"] = beside(folder, questions, args.harness)
    if args.screenshot:
        screenshot(folder.root / "results" / "report.html", args.screenshot)
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "mpo-trainer")}
    about = {"date": str(date.today()), "device": f"{platform.machine()} CPU", "python": platform.python_version(), **packages}
    write_text(args.json, json.dumps({**about, "stages": progress, **measured}, indent=1) + "\n")
    return 0


def run(output: Path, *words: str) -> dict[str, Any]:
    """Run `mpo evaluate` on the CPU, and return its results."""
    if status := mpo(["evaluate", *words, "--device", "cpu", "--output", str(output)]):
        raise SystemExit(status)
    return read_json_object(output / "results.json")


def beside(folder: DemoFolder, questions: Path, limit: int) -> dict[str, Any]:
    """The accuracy of the first model by our command and by lmms-eval on the same questions, and how many responses are equal."""
    tasks = folder.root / "tasks" / "tiny_digits"
    tasks.mkdir(parents=True, exist_ok=True)
    write_text(tasks / "tiny_digits.yaml", TASK.format(questions=questions))
    write_text(tasks / "utils.py", UTILS.format(folder=str(folder.data)))
    model, said = f"start={folder.warm}", {}
    flags = {
        "ours": (str(questions), "--max-new-tokens", "64"),
        "theirs": ("--harness", "lmms-eval", "--tasks", "tiny_digits", "--include-path", str(tasks.parent)),
    }
    found: dict[str, Any] = {"questions": limit}
    for name, words in flags.items():
        results = run(folder.root / name, model, *words, "--limit", str(limit))
        found[name] = results["results"][0]
        said[name] = [line["greedy"][0]["text"].strip() for line in read_json_lines(folder.root / name / "answers.jsonl")]
    found["lmms-eval"] = results["harness"]
    return found | {"equal_responses": sum(map(str.__eq__, said["ours"], said["theirs"]))}


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
