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
"""Characters of an error in one line."""


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Args:
        name: subject of the check.
        value: result of the check.
        status: ``note`` is worth knowing, ``problem`` must be fixed before a run.
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
    """What a check finds. Should it fail itself, the failure is one more finding and its traceback goes to stderr."""
    try:
        yield from check()
    except Exception as error:
        traceback.print_exc()
        yield Finding(name, f"could not be checked: {one_line(first_cause(error))}", "note", TRACEBACK)


def one_line(error: BaseException) -> str:
    r"""An error as one line.

    >>> one_line(ValueError("no room,\n  nowhere"))
    'ValueError: no room, nowhere'
    """
    text = re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip().removesuffix(":")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def first_cause(error: BaseException) -> BaseException:
    """The error at the bottom: lazy imports wrap it once or twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
