"""``samples.jsonl``: a JSONL log of the sampled responses of a run, one per line."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpo.io import append_json_lines, write_text

FILE = "samples.jsonl"


class SampleLog:
    """Write sampled responses, each step once, however often the run is interrupted.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / FILE

    def resume(self, step: int) -> None:
        """Drop the lines of steps after `step`, from which training resumes and which it will write again; at 0, drop all."""
        if not self.path.exists():
            return
        kept = [] if step == 0 else [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append the responses of a step; each row has its ``step``."""
        append_json_lines(self.path, rows)


def _step(line: str) -> float:
    """The step of a line; infinity for a line truncated by a crash."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
