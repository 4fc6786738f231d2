"""Escape control characters of untrusted text before it is printed to a terminal."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters without tabs and line breaks: escape codes and changes of the text direction."""


def visible(text: str) -> str:
    r"""Escape control characters as in Python source.

    >>> print(visible("\x1b[2J"))
    \x1b[2J
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
