"""The layout of the demo's output folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.generation.generator import Question
from mpo.io import write_text


@dataclass(frozen=True)
class DemoFolder:
    """The paths in the output folder.

    Attributes:
        root: the output folder.
    """

    root: Path

    @property
    def settings(self) -> Path:
        """The settings of this demo."""
        return self.root / "settings.json"

    @property
    def progress(self) -> Path:
        """The finished stages, their times and their results."""
        return self.root / "progress.json"

    @property
    def data(self) -> Path:
        """Images and questions. Image paths in all files of the demo are relative to this folder."""
        return self.root / "data"

    def lines(self, split: str) -> Path:
        """The questions of one split: `worked`, `questions` or `eval`."""
        return self.data / f"{split}.jsonl"

    @property
    def sources(self) -> Path:
        """The handwritten digits of each split."""
        return self.data / "sources.json"

    @property
    def warm(self) -> Path:
        """The warmed-up model: MPO's initial policy and its reference."""
        return self.root / "warm"

    def responses(self, when: str) -> Path:
        """Responses to the evaluation questions, `before` or `after` MPO."""
        return self.root / f"responses_{when}.jsonl"

    @property
    def samples(self) -> Path:
        """Responses sampled for the questions."""
        return self.root / "samples.jsonl"

    @property
    def pairs(self) -> Path:
        """Preference pairs in MMPR's format."""
        return self.root / "pairs.jsonl"

    @property
    def mpo(self) -> Path:
        """The run folder of MPO training, with the trained model."""
        return self.root / "mpo"

    @property
    def mpo_log(self) -> Path:
        """The log of MPO training."""
        return self.mpo / "trainer_state.json"

    @property
    def report(self) -> Path:
        """The report of the results."""
        return self.root / "report.html"

    def question(self, line: dict[str, Any]) -> Question:
        """Return the question of a line with its image."""
        return Question(line["question"], (self.data / line["image"],))

    def read_progress(self) -> dict[str, Any]:
        """Read the stages by name; empty for a new folder."""
        if not self.progress.is_file():
            return {}
        return dict(json.loads(self.progress.read_text(encoding="utf-8")))

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Write the stages by name, atomically."""
        write_text(self.progress, json.dumps(progress, indent=2) + "\n")
