"""The settings of the demo, and the layout of its output folder."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpo.generation.generator import Request
from mpo.io import read_json_object, write_text


@dataclass(frozen=True)
class DemoSettings:
    """The settings of the demo. The defaults take about ten minutes on two cores."""

    seed: int = 0  # random seed of the demo
    worked_sources: int = 100  # handwritten digits for the worked examples; a multiple of ten
    question_sources: int = 1000  # other digits for the questions; a multiple of ten. The rest of the 1,797 is for evaluation
    worked_examples: int = 400  # questions with a worked example
    questions: int = 4000  # questions with only a ground truth
    eval_questions: int = 1000  # questions for evaluation
    digits_per_image: int = 3  # digits side by side
    tile_size: int = 32  # pixels; an image is `digits_per_image` tiles wide and one tile high
    patch_size: int = 16  # pixels of a vision-tower patch
    hidden_size: int = 128  # width of language model and vision tower
    layers: int = 4  # layers of each
    warm_epochs: int = 32  # epochs over the worked examples
    warm_batch: int = 32  # worked examples per step
    warm_learning_rate: float = 1e-3  # peak of the cosine schedule
    responses_per_question: int = 8  # responses sampled per question, at temperature 1
    max_pairs: int = 8  # maximum number of pairs per question
    # changes to the recipe `experiment=demo`, as on the command line of `mpo train`
    mpo_overrides: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write the settings as JSON."""
        write_text(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> "DemoSettings":
        """Read settings written by `write`."""
        return cls(**read_json_object(path))


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


class DemoFolder:
    """The paths in the output folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = root / "settings.json"
        self.progress = root / "progress.json"  # the finished stages, their times and their results
        self.data = root / "data"  # images and questions; their paths are relative to it, and in `pairs` to `root`
        self.sources = self.data / "sources.json"  # the handwritten digits of each split
        self.warm = root / "warm"  # the warmed-up model: MPO's initial policy and its reference
        self.samples = root / "samples.jsonl"  # responses sampled for the questions
        self.pairs = root / "pairs.jsonl"  # in MMPR's format
        self.mpo = root / "mpo"  # the run folder of MPO training, with the trained model
        self.sft = root / "sft"  # the control: the same run with SFT on the chosen completions as its loss
        self.report = root / "report.html"

    def lines(self, split: str) -> Path:
        """The questions of one split: `worked`, `questions` or `eval`."""
        return self.data / f"{split}.jsonl"

    def responses(self, when: str) -> Path:
        """Responses to the evaluation questions: `before` and `after` MPO, and of the control, `sft`."""
        return self.root / f"responses_{when}.jsonl"

    def log(self) -> dict[str, Any]:
        """Read the state of MPO training, with its log."""
        return read_json_object(self.mpo / "trainer_state.json")

    def question(self, line: dict[str, Any]) -> Request:
        """The question of a line with its image."""
        return Request.ask(line["question"], images=[self.data / line["image"]])

    def read_progress(self) -> dict[str, Any]:
        """Read the stages by name; empty for a new folder."""
        return read_json_object(self.progress) if self.progress.is_file() else {}

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Write the stages by name, atomically."""
        write_text(self.progress, json.dumps(progress, indent=2) + "\n")
