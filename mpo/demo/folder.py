"""Where the demo keeps things."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.inference.sampler import Question


@dataclass(frozen=True)
class DemoFolder:
    """The output folder and what lies where in it.

    Attributes:
        root: the folder.
    """

    root: Path

    @property
    def settings(self) -> Path:
        """The settings the folder was made with."""
        return self.root / "settings.json"

    @property
    def progress(self) -> Path:
        """Which stages are finished, their time and their numbers."""
        return self.root / "progress.json"

    @property
    def data(self) -> Path:
        """Images, and lines about them. Image paths in all files of the demo are relative to this folder."""
        return self.root / "data"

    def lines(self, split: str) -> Path:
        """Lines of one split: `worked`, `questions` or `eval`."""
        return self.data / f"{split}.jsonl"

    @property
    def sources(self) -> Path:
        """Which handwritten digits are in which split."""
        return self.data / "sources.json"

    @property
    def warm(self) -> Path:
        """The warmed-up model, where MPO starts and what it is held against."""
        return self.root / "warm"

    def answers(self, when: str) -> Path:
        """Answers to the held-out questions, `before` or `after` MPO."""
        return self.root / f"answers_{when}.jsonl"

    @property
    def samples(self) -> Path:
        """Answers sampled to the questions."""
        return self.root / "samples.jsonl"

    @property
    def pairs(self) -> Path:
        """Preference pairs in MMPR's form."""
        return self.root / "pairs.jsonl"

    @property
    def mpo(self) -> Path:
        """The run folder of MPO training, with the trained model."""
        return self.root / "mpo"

    @property
    def mpo_log(self) -> Path:
        """What MPO training logged."""
        return self.mpo / "trainer_state.json"

    @property
    def report(self) -> Path:
        """The page that shows everything."""
        return self.root / "report.html"

    def question(self, line: dict[str, Any]) -> Question:
        """The question of a line, with its image."""
        return Question(line["question"], (self.data / line["image"],))

    def read_progress(self) -> dict[str, Any]:
        """Stages by name; empty at the start."""
        if not self.progress.is_file():
            return {}
        return dict(json.loads(self.progress.read_text(encoding="utf-8")))

    def write_progress(self, progress: dict[str, Any]) -> None:
        """Saves the stages, whole or not at all."""
        unfinished = self.progress.with_name(self.progress.name + ".unfinished")
        unfinished.write_text(json.dumps(progress, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(self.progress)
