"""Prepare what all methods of a seed share: the data, a warmed-up model, its numbers, and pairs of its own responses."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from comparison.measure import generator_of, measure
from comparison.settings import Settings
from comparison.task import DIGITS, draw_lines, questions, reading_examples, worked_examples
from mpo.demo.data import load_handwriting, split_sources
from mpo.demo.stages import train_on_examples
from mpo.io import read_json_lines, write_json_lines
from mpo.models.loading import load_model
from mpo.models.small import small_internvl, small_processor
from mpo.pipelines.mmpr.output import mmpr_line
from mpo.pipelines.mmpr.pair import Pair
from mpo.pipelines.mmpr.verify import Verify
from mpo.pipelines.step import Dropped

DONE = "prepared.json"


def prepare(folder: Path, seed: int, settings: Settings) -> None:
    """Prepare everything that the methods of a seed share, unless it exists; `prepared.json` is written last."""
    if (folder / DONE).is_file():
        return
    set_seed(seed)
    _draw(folder, seed, settings)
    if not (folder / "warm" / "warmed_up").is_file():
        _warm_up(folder, seed, settings)
        (folder / "warm" / "warmed_up").touch()
    before = measure(folder / "warm", folder, settings)
    pairing = {split: _pair(folder, split, count, seed, settings) for split, count in _paired(settings).items()}
    unfinished = folder / f"{DONE}.unfinished"
    unfinished.write_text(json.dumps({"seed": seed, "before": before, "pairing": pairing}, indent=1) + "\n")
    unfinished.replace(folder / DONE)


def _paired(settings: Settings) -> dict[str, tuple[int, int]]:
    """Split -> (number of its questions to sample responses to, largest number of pairs per question)."""
    return {"questions": (settings.questions, settings.max_pairs), "eval": (settings.margin_questions, 1)}


def _draw(folder: Path, seed: int, settings: Settings) -> None:
    handwriting = load_handwriting()
    rng = np.random.default_rng(seed)
    sources = split_sources(handwriting.labels, worked=settings.worked_sources, questions=settings.question_sources, rng=rng)
    counts = {"worked": settings.images, "questions": settings.questions, "eval": settings.eval_questions}
    for split, count in counts.items():
        lines = draw_lines(split, count, root=folder, sources=sources[split], handwriting=handwriting, tile=settings.tile, rng=rng)
        write_json_lines(folder / f"{split}.jsonl", lines)


def _warm_up(folder: Path, seed: int, settings: Settings) -> None:
    """Train a new model to read digits, then on worked examples; both are saved."""
    reading, worked = reading_rows(folder, settings), worked_rows(folder, settings)
    processor = small_processor(
        [text for row in reading + worked for text in (row["question"], row["text"])],
        image_size=settings.tile,
        patch_size=16,
        max_patches=DIGITS,
    )
    model = small_internvl(
        processor,
        hidden_size=settings.hidden,
        layers=settings.layers,
        vision_hidden_size=settings.hidden,
        vision_layers=settings.layers,
        layer_scale_init_value=1.0,
        seed=seed,
    )
    for rows, epochs, place in ((reading, settings.reading_epochs, "read"), (worked, settings.worked_epochs, "warm")):
        train_on_examples(
            model,
            processor,
            rows,
            folder / place,
            num_train_epochs=epochs,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.warm_learning_rate,
            seed=seed,
        )


def reading_rows(folder: Path, settings: Settings) -> list[dict[str, str]]:
    """The warm-up's reading examples."""
    return reading_examples(read_json_lines(folder / "worked.jsonl"), folder)


def worked_rows(folder: Path, settings: Settings) -> list[dict[str, str]]:
    """The warm-up's worked examples."""
    return worked_examples(read_json_lines(folder / "worked.jsonl")[: settings.worked], folder)


def _pair(folder: Path, split: str, limits: tuple[int, int], seed: int, settings: Settings) -> dict[str, Any]:
    count, max_pairs = limits
    lines = read_json_lines(folder / f"{split}.jsonl")[:count]
    loaded = load_model(str(folder / "warm"), dtype="float32")
    sampled = generator_of(loaded).generate(
        questions(lines, "reasoned", folder), n=settings.responses, max_new_tokens=settings.max_new_tokens, seed=seed
    )
    verify, pair = Verify(format="line"), Pair(max_pairs=max_pairs, seed=seed)
    pairs, accuracies = [], []
    for line, several in zip(lines, sampled, strict=True):
        record = {
            "id": line["id"],
            "messages": [],
            "images": [str(folder / line["image"])],
            "ground_truths": [line["ground_truth"]],
        }
        record |= {"asked": {"question": line["question"]}, "responses": [vars(response) for response in several]}
        judged = verify.finish(record, ())
        accuracies.append(judged["accuracy"])
        with suppress(Dropped):
            made = pair.finish(judged, ())
            pairs += [mmpr_line({**one, "id": f"{one['id']}/{number}"}, str(folder)) for number, one in enumerate(made)]
    write_json_lines(folder / f"{split}_pairs.jsonl", pairs)
    return {"questions": len(lines), "all_right": accuracies.count(1), "all_wrong": accuracies.count(0), "pairs": len(pairs)}
