"""What was found, as text to paste into an issue, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from mpo.doctor.checks import STEP
from mpo.doctor.finding import Finding, Section

MARKS = {"ok": " ", "note": "*", "problem": "!"}
LONGEST = 120
"""Characters of a line that a fix may still stand on."""

WIDTH = 14
"""Characters of the names' column: sections are printed one by one, as they are there."""


def section_text(section: Section) -> str:
    r"""A section; fixes of problems are left to the end.

    >>> print(section_text(Section("Machine", (Finding("CPU cores", "2"), Finding("disk", "full", "problem", "rm -r old")))))
    Machine
        CPU cores       2
      ! disk            full
    """
    return "\n".join([section.title, *map(_line, section.findings)])


def summary(sections: Sequence[Section]) -> str:
    """How many problems and notes there are, and what fixes the problems."""
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
        return "\n".join([f"{_count(len(problems), 'problem')} (!), {known}. Before a run:", *lines])
    tried = any(section.title == STEP and all(finding.status == "ok" for finding in section.findings) for section in sections)
    return f"No problem, {known}: a run can start." if tried else f"No problem, {known}; whether a run can start was not tried."


def as_json(sections: Iterable[Section]) -> str:
    """The same as JSON."""
    listed = [asdict(section) for section in sections]
    problems = sum(finding["status"] == "problem" for section in listed for finding in section["findings"])
    return json.dumps({"problems": problems, "sections": listed}, indent=2)


def _line(finding: Finding) -> str:
    line = f"  {MARKS[finding.status]} {finding.name:<{WIDTH}}  {finding.value}"
    if not finding.fix or finding.status == "problem":
        return line
    gap = " " if len(line) + len(finding.fix) + 4 <= LONGEST else "\n" + " " * (WIDTH + 6)
    return f"{line}{gap}-> {finding.fix}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
