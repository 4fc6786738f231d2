"""The sizes of the demo."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mpo.io import write_text


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo.

    Attributes:
        seed: random seed of the demo.
        worked_sources: handwritten digits for the worked examples; a multiple of ten.
        question_sources: other digits for the questions; a multiple of ten. The rest of the 1,797 is for evaluation.
        worked_examples: questions with a worked example.
        questions: questions with only a ground truth.
        eval_questions: questions for evaluation.
        digits_per_image: digits side by side.
        tile_size: pixels; an image is `digits_per_image` tiles wide and one tile high.
        patch_size: pixels of a vision-tower patch.
        hidden_size: width of language model and vision tower.
        layers: layers of each.
        warm_epochs: epochs over the worked examples.
        warm_batch: worked examples per step.
        warm_learning_rate: peak of the cosine schedule.
        responses_per_question: responses sampled per question, at temperature 1.
        max_pairs: maximum number of pairs per question.
        mpo_overrides: changes to the recipe `experiment=demo`, as on the command line of `mpo train`.
    """

    seed: int = 0
    worked_sources: int = 100
    question_sources: int = 1000
    worked_examples: int = 400
    questions: int = 4000
    eval_questions: int = 1000
    digits_per_image: int = 3
    tile_size: int = 32
    patch_size: int = 16
    hidden_size: int = 128
    layers: int = 4
    warm_epochs: int = 32
    warm_batch: int = 32
    warm_learning_rate: float = 1e-3
    responses_per_question: int = 8
    max_pairs: int = 8
    mpo_overrides: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the settings as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> DemoSettings:
        """Read settings written by `write`."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def full_settings(seed: int) -> DemoSettings:
    """Settings of the full demo: five to ten minutes on two cores."""
    return DemoSettings(seed=seed)


def quick_settings(seed: int) -> DemoSettings:
    """Settings of the quick demo: about a minute on two cores. Every stage runs, but the accuracy is low."""
    return DemoSettings(
        seed=seed,
        questions=300,
        eval_questions=200,
        warm_epochs=14,
        layers=2,
        responses_per_question=4,
        max_pairs=3,
        mpo_overrides=["trainer.max_steps=30", "trainer.save_steps=10"],
    )
