"""Tasks: questions about handwritten digits, and how the responses of a warmed-up model are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpo.demo.data import KINDS as DEMO_KINDS
from mpo.demo.data import QuestionKind, draw, load_handwriting, split_sources

FILLER_WORDS = ("well", "so", "now", "then", "look", "see", "here", "okay")
READING = "What are the digits?"


def _largest(digits: Sequence[int]) -> tuple[str, str]:
    low, middle, high = sorted(digits)
    return f"In order {low} , {middle} , {high} : {middle} + {high} = {middle + high}", str(middle + high)


def _spread(digits: Sequence[int]) -> tuple[str, str]:
    low, middle, high = sorted(digits)
    return f"In order {low} , {middle} , {high} : {high} - {low} = {high - low}", str(high - low)


SUM = DEMO_KINDS["sum"]
CALCULATING = (
    SUM,
    QuestionKind("largest", "What is the sum of the two largest digits?", _largest),
    QuestionKind("spread", "What is the largest digit less the smallest?", _spread),
)


@dataclass(frozen=True)
class Task:
    """A task, and how far its model is warmed up.

    Attributes:
        kinds: kinds of question.
        worked: worked examples.
        worked_epochs: epochs over them.
        reading: images whose digits are learned before them; 0: none.
        reading_epochs: epochs over these.
        worked_sources: handwritten digits in the warm-up's images; a multiple of ten.
        question_sources: those in the questions; a multiple of ten.
        short: share of responses that are the final answer alone, without reading or steps, in a second phase of the warm-up on
            the same examples; 0: no such phase.
        short_epochs: epochs of that phase.
        filler: meaningless words before the final answer, drawn at random: tokens that no question decides.
        questions: questions with a ground truth only, of which pairs are made.
        digits: digits per image.
        temperature: temperature of the samples that pairs are made of.
        base: task whose warmed-up model is the start, or is trained on in the second phase.
    """

    kinds: tuple[QuestionKind, ...]
    worked: int = 2000
    worked_epochs: int = 10
    reading: int = 2000
    reading_epochs: int = 7
    worked_sources: int = 1200
    question_sources: int = 300
    short: float = 0.0
    short_epochs: float = 4.0
    filler: int = 0
    questions: int = 1200
    digits: int = 3
    temperature: float = 1.0
    base: str | None = None

    @property
    def limit(self) -> int:
        """Longest response, in tokens."""
        return 50 + self.filler

    def response(self, kind: QuestionKind, digits: Sequence[int], rng: np.random.Generator, *, short: float = 0.0) -> str:
        """Write a worked example, or the answer alone with a probability."""
        steps, truth = kind.work(digits)
        if rng.random() < short:
            return f"Final answer: {truth}"
        words = " ".join(rng.choice(FILLER_WORDS, self.filler)) + "\n" if self.filler else ""
        return f"The digits are {' '.join(map(str, digits))}\n{steps}\n{words}Final answer: {truth}"


TASKS = {
    "reason": Task(CALCULATING),
    "cool": Task(CALCULATING, temperature=0.6, base="reason"),
    "strategy": Task(CALCULATING, short=0.8, short_epochs=1.5, base="reason"),
    "filler": Task(CALCULATING, filler=40),
}


def final_answer(text: str) -> str | None:
    r"""The final answer of a response; None without one.

    >>> final_answer("The digits are 1 2 3\nFinal answer: 6")
    '6'
    """
    _, found, answer = text.rpartition("Final answer: ")
    return answer.strip() if found else None


def draw_split(task: Task, counts: dict[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Draw images and questions; no handwritten digit is in more than one of warm-up, questions and evaluation.

    Args:
        task: the task.
        counts: images of `worked` (reading and worked examples), `questions` and `eval`.
        seed: random seed.

    Returns:
        By split: `image` (PIL), `digits`, `kind` (number), `truth`.
    """
    handwriting = load_handwriting()
    rng = np.random.default_rng(seed)
    sources = split_sources(handwriting.labels, worked=task.worked_sources, questions=task.question_sources, rng=rng)
    lines: dict[str, list[dict[str, Any]]] = {}
    for split, count in counts.items():
        lines[split] = []
        for number in range(count):
            drawn = rng.choice(sources[split], size=task.digits, replace=False).tolist()
            digits = handwriting.labels[drawn].tolist()
            kind = number % len(task.kinds)
            line = {"image": draw(handwriting, drawn, digit_size=32), "digits": digits, "kind": kind}
            lines[split].append(line | {"truth": task.kinds[kind].ground_truth(digits)})
    return lines
