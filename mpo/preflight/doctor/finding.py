"""The findings of a check. A check that fails is also reported as a finding."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "note", "problem"]

TRACEBACK = "MPO_TRACEBACK=1 mpo doctor"
"""Shows the traceback; the fix of problems without a specific one."""

LONGEST = 160
"""Maximum length of an error message in characters."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: subject of the check.
        value: result of the check.
        status: ``ok``, ``note``, or ``problem``, which must be fixed before a run.
        fix: command that fixes the problem.
    """

    name: str
    value: str
    status: Status = "ok"
    fix: str = ""


@dataclass(frozen=True)
class Section:
    """The findings of one check."""

    title: str
    findings: tuple[Finding, ...]


def attempted(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. If the check raises an error, yield a note and print the traceback to stderr."""
    try:
        yield from check()
    except Exception as error:
        traceback.print_exc()
        yield Finding(name, f"could not be checked: {one_line(first_cause(error))}", "note", TRACEBACK)


def one_line(error: BaseException) -> str:
    r"""Format an error as one line.

    >>> one_line(ValueError("no space,\n  nowhere"))
    'ValueError: no space, nowhere'
    """
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip().removesuffix(":")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def first_cause(error: BaseException) -> BaseException:
    """Return the original error of a chain: lazy imports wrap it once or twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
