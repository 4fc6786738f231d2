"""Format the findings as text to paste into an issue, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from mpo.preflight.doctor.checks import STEP
from mpo.preflight.doctor.finding import Finding, Section

SYMBOLS = {"ok": " ", "note": "*", "problem": "!"}
LONGEST = 120
"""Maximum length of a line with a finding and its fix, in characters."""

WIDTH = 14
"""Width of the column of names. It is fixed, because each section is printed when its check ends."""


def section_text(section: Section) -> str:
    r"""Format a section without the fixes of its problems, which `summary` lists.

    >>> print(section_text(Section("Machine", (Finding("CPU cores", "2"), Finding("disk", "full", "problem", "rm -r old")))))
    Machine
        CPU cores       2
      ! disk            full
    """
    return "\n".join([section.title, *map(_line, section.findings)])


def summary(sections: Sequence[Section]) -> str:
    """Count the problems and notes, and list the commands that fix the problems."""
    found = [finding for section in sections for finding in section.findings]
    problems, notes = ([finding for finding in found if finding.status == status] for status in ("problem", "note"))
    known = f"{_count(len(notes), 'note')} (*)"
    if problems:
        fixes: dict[str, list[str]] = {}
        for finding in problems:
            fixes.setdefault(finding.fix, []).append(finding.name)
        who = [names[0] + f" and {len(names) - 1} more" * (len(names) > 1) for names in fixes.values()]
        width = max(WIDTH, *map(len, who))
        lines = [f"    {names:<{width}}  {fix}" for names, fix in zip(who, fixes, strict=True)]
        return "\n".join([f"{_count(len(problems), 'problem')} (!), {known}. Fix before a run:", *lines])
    tried = any(section.title == STEP and all(finding.status == "ok" for finding in section.findings) for section in sections)
    return f"No problems, {known}. The training step succeeded." if tried else f"No problems, {known}. Training was not tested."


def as_json(sections: Iterable[Section]) -> str:
    """Format the findings as JSON."""
    listed = [asdict(section) for section in sections]
    problems = sum(finding["status"] == "problem" for section in listed for finding in section["findings"])
    return json.dumps({"problems": problems, "sections": listed}, indent=2)


def _line(finding: Finding) -> str:
    line = f"  {SYMBOLS[finding.status]} {finding.name:<{WIDTH}}  {finding.value}"
    if not finding.fix or finding.status == "problem":
        return line
    gap = " " if len(line) + len(finding.fix) + 4 <= LONGEST else "\n" + " " * (WIDTH + 6)
    return f"{line}{gap}-> {finding.fix}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
