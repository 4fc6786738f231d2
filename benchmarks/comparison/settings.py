"""Sizes of the comparison."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """All sizes of the comparison; fixed in `../methods.md` before it was run.

    Attributes:
        images: number of images whose digits the warm-up learns to read.
        worked: number of these that also have worked examples; few, so that reasoning is the bottleneck.
        questions: number of questions with a ground truth only, for which responses are sampled and paired.
        eval_questions: number of evaluation questions.
        margin_questions: number of these whose sampled responses give the evaluation pairs of the reward margin.
        worked_sources: number of handwritten digits in the warm-up's images; a multiple of ten.
        question_sources: number of those in the questions; a multiple of ten. The rest of the 1,797 are for evaluation.
        tile: width and height of a digit in pixels.
        hidden: width of the vision tower and the language model.
        layers: layers of each.
        reading_epochs: epochs of the warm-up over the reading examples.
        worked_epochs: epochs over the worked examples, after that.
        warm_learning_rate: peak learning rate of each, with a cosine schedule.
        responses: responses sampled per question, at temperature 1.
        max_pairs: largest number of pairs per question.
        steps: training steps of every method.
        batch: pairs or examples per step of every method, and of the warm-up.
        max_new_tokens: the longest response, in tokens; worked examples have about 36.
    """

    images: int = 3000
    worked: int = 800
    questions: int = 2000
    eval_questions: int = 1000
    margin_questions: int = 300
    worked_sources: int = 1200
    question_sources: int = 300
    tile: int = 32
    hidden: int = 96
    layers: int = 3
    reading_epochs: int = 5
    worked_epochs: int = 10
    warm_learning_rate: float = 1e-3
    responses: int = 8
    max_pairs: int = 4
    steps: int = 150
    batch: int = 32
    max_new_tokens: int = 72


QUICK = Settings(
    images=120,
    worked=90,
    questions=36,
    eval_questions=12,
    margin_questions=12,
    hidden=64,
    layers=2,
    reading_epochs=1,
    worked_epochs=6,
    warm_learning_rate=3e-3,
    steps=2,
    batch=4,
    max_new_tokens=48,
)
"""Runs every part; the model learns the format of a response and guesses."""
