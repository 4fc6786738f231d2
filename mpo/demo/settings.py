"""How large the demo is."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class DemoSettings:
    """Every number of the demo.

    Attributes:
        seed: of everything that is drawn.
        worked_sources: handwritten digits that worked examples are made of; a multiple of ten.
        question_sources: others that questions are made of; a multiple of ten. The rest of the 1,797 are held out.
        worked_examples: questions with a full worked answer.
        questions: questions of which only the answer is known.
        eval_questions: questions to measure with.
        digits_per_image: digits side by side.
        tile_size: pixels; an image is `digits_per_image` tiles wide and one tile high.
        patch_size: pixels of a vision-tower patch.
        hidden_size: width of language model and vision tower.
        layers: layers of each.
        warm_epochs: how often the worked examples are seen.
        warm_batch: worked examples per step.
        warm_learning_rate: peak of a cosine.
        answers_per_question: sampled at temperature 1.
        max_pairs: kept per question.
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
    answers_per_question: int = 8
    max_pairs: int = 8
    mpo_overrides: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Saves the settings as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> DemoSettings:
        """Reads what `write` saved."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def full_settings(seed: int) -> DemoSettings:
    """Five to ten minutes on two cores."""
    return DemoSettings(seed=seed)


def quick_settings(seed: int) -> DemoSettings:
    """About two minutes on two cores: every stage is real, the model stays weak."""
    return DemoSettings(
        seed=seed,
        questions=600,
        warm_epochs=14,
        layers=2,
        answers_per_question=4,
        max_pairs=3,
        mpo_overrides=["trainer.max_steps=30", "trainer.save_steps=10"],
    )
