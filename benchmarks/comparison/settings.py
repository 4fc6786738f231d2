"""How large the comparison is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Every number of the comparison; fixed in `../methods.md` before it was run.

    Attributes:
        images: images whose digits the warm-up learns to read.
        worked: those of them that also have worked examples; few, so that reasoning is the bottleneck.
        questions: questions whose answer alone is known, to sample answers to and to make pairs of.
        eval_questions: questions to measure with.
        margin_questions: of these, questions whose sampled answers give the held-out pairs of the reward margin.
        worked_sources: handwritten digits that the warm-up's images are made of; a multiple of ten.
        question_sources: those of the questions; a multiple of ten. The rest of the 1,797 are held out.
        tile: width and height of a digit in pixels.
        hidden: width of the vision tower and the language model.
        layers: layers of each.
        reading_epochs: how often the warm-up sees each image to be read.
        worked_epochs: how often it sees each worked example, after that.
        warm_learning_rate: peak of the cosine of each.
        responses: responses sampled per question, at temperature 1.
        max_pairs: kept per question.
        steps: of every method.
        batch: pairs or examples per step of every method, and of the warm-up.
        max_new_tokens: of an answer; worked examples have about 36.
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
    questions=48,
    eval_questions=24,
    margin_questions=24,
    hidden=64,
    layers=2,
    reading_epochs=1,
    worked_epochs=6,
    warm_learning_rate=3e-3,
    steps=2,
    batch=4,
)
"""Every part is real; the model learns the form of an answer and guesses."""
