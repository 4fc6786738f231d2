"""Print to a terminal: tables, and untrusted text whose control characters are escaped."""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters without tabs and line breaks: escape codes and changes of the text direction."""


def visible(text: str) -> str:
    r"""Escape control characters as in Python source.

    >>> print(visible("\x1b[2J"))
    \x1b[2J
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)


def size(number: float) -> str:
    """Format bytes in GiB, MiB or KiB.

    >>> size(1.5 * 2**30), size(3 * 2**20), size(512), size(0)
    ('1.50 GiB', '3.0 MiB', '0.5 KiB', '0')
    """
    if number >= 2**30:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.1f} MiB" if number >= 0.1 * 2**20 else f"{number / 2**10:.1f} KiB" if number else "0"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of cells in columns: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append(f"{row[0]:<{widths[0]}}{numbers}".rstrip())
    return "\n".join(lines)
