"""Text of others for a terminal, which obeys some of its characters."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Characters that a terminal obeys, but for tabs and line breaks: escape codes, and changes of the direction of writing."""


def visible(text: str) -> str:
    r"""Text whose control characters are written out, as Python has them.

    >>> print(visible("\x1b[2J"))
    \x1b[2J
    """
    return _CONTROLS.sub(lambda found: repr(found[0])[1:-1], text)
