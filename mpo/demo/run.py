"""Run the stages of the demo in order, each one once."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import set_seed

from mpo.demo.data import make_dataset
from mpo.demo.folder import DemoFolder, DemoSettings
from mpo.demo.report import write_report
from mpo.demo.stages import measure, pair, sample, train_mpo, train_sft, warm_up


class Stage(NamedTuple):
    """A stage of the demo. It returns its results; an interrupted stage is run again and may reuse its files in the folder."""

    name: str  # key of its time and results in `progress.json`
    title: str
    run: Callable[[DemoFolder, DemoSettings], dict[str, Any]]
    made: str  # its main output, relative to the output folder


def _measuring(model: str, when: str, *compared: str) -> Callable[[DemoFolder, DemoSettings], dict[str, Any]]:
    return lambda folder, _: measure(folder, getattr(folder, model), when, *compared)


STAGES = (
    Stage("data", "draw images of handwriting, with questions", make_dataset, "data/"),
    Stage("warm_up", "warm up a new model on the worked examples", warm_up, "warm/"),
    Stage("before", "evaluate it on evaluation images", _measuring("warm", "before"), "responses_before.jsonl"),
    Stage("sample", "sample responses to the questions", sample, "samples.jsonl"),
    Stage("pair", "pair correct with incorrect responses", pair, "pairs.jsonl"),
    Stage("mpo", "train on the pairs with MPO", train_mpo, "mpo/"),
    Stage(
        "after", "evaluate on the same evaluation images", _measuring("mpo", "after", "before", "after"), "responses_after.jsonl"
    ),
    Stage("sft", "train on the chosen completions alone (SFT): the control", train_sft, "sft/"),
    Stage("control", "evaluate the control on the same images", _measuring("sft", "sft", "sft", "after"), "responses_sft.jsonl"),
    Stage("report", "write the report", write_report, "report.html"),
)


def run_demo(output_dir: Path, settings: DemoSettings, *, restart: bool = False) -> dict[str, Any]:
    """Run the stages that are not finished yet. Returns the `seconds` and results (`numbers`) of each stage by its name.

    Raises:
        ValueError: when the folder contains other files, or, without `restart`, a demo with other settings.
    """
    folder = DemoFolder(output_dir)
    _prepare(folder, settings, restart)
    progress, ran = folder.read_progress(), False
    for number, stage in enumerate(STAGES, start=1):
        entry = progress.setdefault(stage.name, {"seconds": 0.0, "done": False})
        heading = f"[{number}/{len(STAGES)}] {stage.title}"
        if entry["done"] and not ran:  # a stage that came after the one that ran now is out of date, as the report of an older demo
            print(f"{heading}: already done, in {entry['seconds']:.0f} s -> {folder.root / stage.made}")
            continue
        ran = True
        print(heading, flush=True)
        set_seed(settings.seed)
        started = time.monotonic()
        try:
            entry["numbers"] = stage.run(folder, settings)
            entry["done"] = True
        finally:
            entry["seconds"] += time.monotonic() - started
            folder.write_progress(progress)
        print(f"      {entry['seconds']:.0f} s -> {folder.root / stage.made}", flush=True)
    return progress


def _prepare(folder: DemoFolder, settings: DemoSettings, restart: bool) -> None:
    if folder.root.exists() and any(folder.root.iterdir()):
        if not folder.settings.is_file():
            raise ValueError(f"--output={folder.root} is not empty and contains no demo. Choose another folder.")
        if restart:
            shutil.rmtree(folder.root)
        elif DemoSettings.read(folder.settings) != settings:
            raise ValueError(f"--output={folder.root} contains another demo (see {folder.settings}); --restart deletes it.")
    folder.root.mkdir(parents=True, exist_ok=True)
    settings.write(folder.settings)
