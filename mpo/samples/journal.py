"""``samples.jsonl``: the sampled answers of a run, one a line."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = "samples.jsonl"


class Journal:
    """Writes sampled answers, each step once, however often the run is interrupted.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / FILE

    def begin(self, step: int) -> None:
        """Keep what was written up to `step`, from which training goes on; later steps will come again. At 0 nothing is kept."""
        if not self.path.exists():
            return
        kept = [] if step == 0 else [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        aside = self.path.with_name(f"{FILE}.new")
        aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        aside.replace(self.path)

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the answers of a step; each row has its ``step``."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _step(line: str) -> float:
    """The step of a line; beyond all steps for one that was cut when the machine went down."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
