"""Stage 1: draw images and write questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from mpo.demo.folder import DemoFolder
from mpo.demo.images import SPLITS, Handwriting, draw, load_handwriting, split_sources
from mpo.demo.questions import KINDS
from mpo.demo.settings import DemoSettings
from mpo.io import write_json_lines, write_text


def make_dataset(folder: DemoFolder, settings: DemoSettings) -> dict[str, Any]:
    """Draw the images of all splits and write their questions.

    Every line has the ground truth. Lines of `worked` also have a worked example; lines of `eval` have the digits, to measure
    reading.

    Returns:
        The numbers of images and sources per split.
    """
    handwriting = load_handwriting()
    rng = np.random.default_rng(settings.seed)
    sources = split_sources(handwriting.labels, worked=settings.worked_sources, questions=settings.question_sources, rng=rng)
    assert_disjoint(sources)
    counts = dict(zip(SPLITS, (settings.worked_examples, settings.questions, settings.eval_questions), strict=True))
    used: dict[str, list[int]] = {}
    with tqdm(total=sum(counts.values()), desc="drawing", unit="image") as bar:
        for split, count in counts.items():
            lines, used[split] = [], []
            (folder.data / split).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                line, drawn = _make_line(split, number, sources[split], handwriting, settings, rng)
                draw(handwriting, drawn, digit_size=settings.tile_size).save(folder.data / line["image"])
                lines.append(line)
                used[split] += drawn
                bar.update()
            write_json_lines(folder.lines(split), lines)
    used = {split: sorted(set(drawn)) for split, drawn in used.items()}
    assert_disjoint(used)
    write_text(folder.sources, json.dumps(used) + "\n")
    return {"images": counts, "sources": {split: len(drawn) for split, drawn in used.items()}}


def assert_disjoint(sources: dict[str, Any]) -> None:
    """Check that no handwritten digit is in two splits."""
    seen: set[int] = set()
    for split, indices in sources.items():
        shared = seen.intersection(map(int, indices))
        assert not shared, f"digits {sorted(shared)} of split {split} are in another split too"
        seen.update(map(int, indices))


def _make_line(
    split: str,
    number: int,
    sources: NDArray[np.int64],
    handwriting: Handwriting,
    settings: DemoSettings,
    rng: np.random.Generator,
) -> tuple[dict[str, Any], list[int]]:
    drawn = rng.choice(sources, size=settings.digits_per_image, replace=False).tolist()
    digits: Sequence[int] = handwriting.labels[drawn].tolist()
    kind = list(KINDS.values())[number % len(KINDS)]
    line = {
        "id": f"{split}-{number:05d}",
        "image": f"{split}/{number:05d}.png",
        "question": kind.text,
        "ground_truth": kind.ground_truth(digits),
        "kind": kind.name,
    }
    if split == "worked":
        line["worked_example"] = kind.worked_example(digits)
    if split == "eval":
        line["digits"] = digits
    return line, drawn
