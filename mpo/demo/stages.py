"""Stages 3 to 7: evaluate, sample, pair, train with MPO, evaluate again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mpo.demo.folder import DemoFolder
from mpo.demo.logs import logs_to
from mpo.demo.questions import KINDS
from mpo.demo.settings import DemoSettings
from mpo.evaluation.accuracy import measure_accuracy
from mpo.evaluation.intervals import compare_paired
from mpo.generation.local import LocalGenerator
from mpo.io import read_json_lines, write_json_lines
from mpo.models.loading import load_model
from mpo.pipelines.mmpr.lines import build_pairs
from mpo.training.job import TrainJob, run_train_job

MAX_NEW_TOKENS = 64
"""Maximum length of a response in tokens; worked examples have about 35."""

RESPONSES_PER_BATCH = 400


def measure_before(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Evaluate the warmed-up model on the evaluation questions."""
    return _measure(folder, folder.warm, "before")


def sample(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Sample several responses to each question from the warmed-up model, at temperature 1."""
    lines = read_json_lines(folder.lines("questions"))
    responses = _generator(folder.warm, "sampling").generate(
        [folder.question(line) for line in lines],
        n=settings.responses_per_question,
        temperature=1.0,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=settings.seed,
    )
    write_json_lines(folder.samples, ({"id": line["id"], "responses": texts} for line, texts in zip(lines, responses, strict=True)))
    return {"responses": sum(map(len, responses))}


def pair(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Pair correct with incorrect responses, judged by their final answer."""
    lines = read_json_lines(folder.lines("questions"))
    responses = [sampled["responses"] for sampled in read_json_lines(folder.samples)]
    pairs, report = build_pairs(lines, responses, max_pairs=settings.max_pairs, seed=settings.seed)
    if not pairs:
        raise ValueError(
            f"No question has both a correct and an incorrect response: of {report.questions} questions, {report.all_right} have "
            f"only correct and {report.all_wrong} only incorrect ones. Choose another --seed."
        )
    write_json_lines(folder.pairs, pairs)
    return {"pairs_total": len(pairs), **asdict(report)}


def train_mpo(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Train the warmed-up model on the pairs with `mpo train experiment=demo`. Resumes from the newest checkpoint."""
    with initialize_config_module("mpo.recipes", version_base="1.3"):
        config = compose("train", overrides=["experiment=demo", *settings.mpo_overrides])
    config.run_dir = str(folder.mpo)
    config.seed = settings.seed
    config.model.name_or_path = str(folder.warm)
    config.data.path = str(folder.pairs)
    config.data.image_root = str(folder.data)
    with logs_to(folder.mpo / "train.log"):
        trainer = run_train_job(TrainJob.from_config(OmegaConf.to_container(config, resolve=True)))
    return {"steps": trainer.state.global_step}


def measure_after(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Evaluate the trained model on the evaluation questions and compare it with the warmed-up model."""
    numbers = _measure(folder, folder.mpo, "after")
    before, after = ([line["correct"] for line in read_json_lines(folder.responses(when))] for when in ("before", "after"))
    return {**numbers, "paired": asdict(compare_paired(before, after))}


def _measure(folder: DemoFolder, model: Path, when: str) -> dict[str, Any]:
    lines = read_json_lines(folder.lines("eval"))
    accuracy = measure_accuracy(
        _generator(model, f"measuring {when}"),
        [folder.question(line) for line in lines],
        [line["ground_truth"] for line in lines],
        max_new_tokens=MAX_NEW_TOKENS,
    )
    read = [reads_digits(text, line["digits"]) for text, line in zip(accuracy.responses, lines, strict=True)]
    write_json_lines(
        folder.responses(when),
        (
            {"id": line["id"], "response": text, "correct": correct}
            for line, text, correct in zip(lines, accuracy.responses, accuracy.correct, strict=True)
        ),
    )
    kinds = {
        name: [correct for line, correct in zip(lines, accuracy.correct, strict=True) if line["kind"] == name] for name in KINDS
    }
    return {
        "correct": sum(accuracy.correct),
        "total": len(lines),
        "interval": list(accuracy.interval),
        "unparsable": accuracy.unparsable,
        "read": sum(read),
        "kinds": {name: [sum(results), len(results)] for name, results in kinds.items()},
    }


def reads_digits(response: str, digits: Sequence[int]) -> bool:
    r"""Whether the first line of a response names the image's digits.

    >>> reads_digits("The digits are 3 8 1\n...", [3, 8, 1])
    True
    """
    return response.split("\n", 1)[0] == KINDS["sum"].worked_example(digits).split("\n", 1)[0]


def _generator(model: Path, progress: str) -> LocalGenerator:
    loaded = load_model(str(model), dtype="float32")
    return LocalGenerator(loaded.model, loaded.processor, responses_per_batch=RESPONSES_PER_BATCH, progress=progress)
