"""Report findings in data as a table and as lines of a file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TextIO

from mpo.io import json_line

PROBLEMS = (
    *("no pair", "empty text", "equal completions", "placeholders and images", "image not there", "image not decoded"),
    *("video not decoded", "file damaged", "not encoded", "too long", "in eval too"),
)
"""Findings that prevent training."""
NOTES = (
    *("truncated by max_length", "image in eval too", "tiny image", "duplicate", "equal but for space", "refusal", "unfinished"),
    *("control token", "gives no pair", "pairs left out"),
)
"""Findings to inspect, which do not prevent training."""
_KINDS = {
    "equal completions": r"are the same completion",
    "empty text": r"\bis empty\b",
    "file damaged": r"^not JSON from here on|^not JSON after|after the end of the array",
    "placeholders and images": r"placeholders for \d+ (?:images|videos)",
    "image not there": r"there is no (?:image|video)|lies outside|is a URL|not a (?:image|video) file|cannot be reached",
}
WIDEST = 100
"""Maximum characters of an example's reason in the table."""


@dataclass(frozen=True)
class Finding:
    """A finding in the record at ``where`` (``file:line``)."""

    kind: str
    where: str
    reason: str


@dataclass
class Tally:
    """Counts each kind of finding and keeps its first example. Every finding is written to ``file`` as a line of JSON."""

    file: TextIO | None = None
    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, Finding] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        """Count findings and write them to the file."""
        for one in findings:
            self.counts[one.kind] = self.counts.get(one.kind, 0) + 1
            self.examples.setdefault(one.kind, one)
            if self.file is not None:
                line = {"where": one.where, "reason": one.reason, "finding": one.kind, "problem": one.kind in PROBLEMS}
                self.file.write(json_line(line))

    @property
    def problems(self) -> int:
        """Number of findings that prevent training."""
        return sum(count for kind, count in self.counts.items() if kind in PROBLEMS)


def kind_of(reason: str) -> str:
    """Classify the reason of a BadRecord.

    >>> kind_of("'chosen' is empty. A pair needs a prompt, a chosen and a rejected completion.")
    'empty text'
    """
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, reason)), "no pair")


def findings_table(tally: Tally) -> str:
    """Format a table with a row per kind, problems (!) first: its count and an example."""
    kinds = [kind for kind in (*PROBLEMS, *NOTES) if kind in tally.counts]
    if not kinds:
        return "  nothing found"
    name, count = max(map(len, kinds)), max(len(f"{tally.counts[kind]:,}") for kind in kinds)
    lines = []
    for kind in kinds:
        example = tally.examples[kind]
        reason = example.reason if len(example.reason) <= WIDEST else example.reason[: WIDEST - 3] + "..."
        flag = "!" if kind in PROBLEMS else " "
        lines.append(f"  {flag} {kind:<{name}}  {tally.counts[kind]:>{count},}  {example.where}: {' '.join(reason.split())}")
    return "\n".join(lines)
