"""The task: calculations of several steps with three handwritten digits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo.demo.data import Handwriting, QuestionKind, draw
from mpo.generation.generator import Request

DIGITS = 3
READING = "What are the digits?"
PROMPTS = {"direct": "Give the answer alone.", "reasoned": "Work it out step by step."}
"""The instruction after a question, by form of the response."""


def _sum(digits: Sequence[int]) -> tuple[str, str]:
    a, b, c = digits
    return f"{a} + {b} = {a + b} , {a + b} + {c} = {a + b + c}", str(a + b + c)


def _largest(digits: Sequence[int]) -> tuple[str, str]:
    low, middle, high = sorted(digits)
    return f"In order {low} , {middle} , {high} : {middle} + {high} = {middle + high}", str(middle + high)


def _spread(digits: Sequence[int]) -> tuple[str, str]:
    low, middle, high = sorted(digits)
    return f"In order {low} , {middle} , {high} : {high} - {low} = {high - low}", str(high - low)


KINDS = (
    QuestionKind("sum", "What is the sum of all digits?", _sum),
    QuestionKind("largest", "What is the sum of the two largest digits?", _largest),
    QuestionKind("spread", "What is the largest digit less the smallest?", _spread),
)


def draw_lines(
    split: str, count: int, *, root: Path, sources: NDArray[np.int64], handwriting: Handwriting, tile: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Draw images into `root/split`, each with a question.

    Args:
        split: name of the folder, and prefix of the ids.
        count: number of images.
        root: folder that image paths are relative to.
        sources: handwritten digits to draw from.
        handwriting: all digits.
        tile: width and height of a digit in pixels.
        rng: random number generator.

    Returns:
        Lines `{"id", "image", "question", "ground_truth", "worked_example", "digits"}`; the question asks for reasoning.
    """
    (root / split).mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        drawn = rng.choice(sources, size=DIGITS, replace=False).tolist()
        digits = handwriting.labels[drawn].tolist()
        kind = KINDS[number % len(KINDS)]
        image = f"{split}/{number:05d}.png"
        draw(handwriting, drawn, digit_size=tile).save(root / image)
        lines.append(
            {
                "id": f"{split}-{number:05d}",
                "image": image,
                "question": asked(kind.text, "reasoned"),
                "ground_truth": kind.ground_truth(digits),
                "worked_example": kind.worked_example(digits),
                "digits": digits,
            }
        )
    return lines


def asked(question: str, form: str) -> str:
    """A question with the instruction of a form, one of `PROMPTS`."""
    return f"{question.splitlines()[0]}\n{PROMPTS[form]}"


def questions(lines: Sequence[dict[str, Any]], form: str, root: Path) -> list[Request]:
    """The questions of lines, with the instruction of one of the forms of `PROMPTS`."""
    return [Request.ask(asked(line["question"], form), images=[root / line["image"]]) for line in lines]


def reading_examples(lines: Sequence[dict[str, Any]], root: Path) -> list[dict[str, str]]:
    """Examples of reading the digits of an image.

    Returns:
        `{"image", "question", "text"}`; the text is the model's target.
    """
    return [
        {"image": str(root / line["image"]), "question": READING, "text": line["worked_example"].split("\n")[0]} for line in lines
    ]


def worked_examples(lines: Sequence[dict[str, Any]], root: Path) -> list[dict[str, str]]:
    """Examples of responses to a question, in both forms; the same keys."""
    return [
        {"image": str(root / line["image"]), "question": asked(line["question"], form), "text": text}
        for line in lines
        for form, text in (("direct", f"Answer: {line['ground_truth']}"), ("reasoned", line["worked_example"]))
    ]
