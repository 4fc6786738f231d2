"""What must not stand on a page that is pasted into an issue."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from pathlib import Path

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY", re.IGNORECASE)
"""Environment variables with such a name hold secrets."""

SHORTEST = 8
"""Characters of a value that is taken for a secret: shorter ones (true, 1) stand in ordinary text."""


def masked(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """A text without home folder and user name (~), secrets (***) and colours.

    >>> masked("https://ann:pw@proxy:80 said no to hf_abcdefghijklmnopqrstuvwxyz", {})
    'https://***@proxy:80 said no to ***'
    """
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    secrets = {value for name, value in environ.items() if SECRET.search(name) and len(value) >= SHORTEST}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "***", text)
    text = re.sub(r"(?<=://)[^/@\s]+@", "***@", text)
    for home in _homes():
        text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    user = _user()
    return re.sub(rf"(?<=[/\\]){re.escape(user)}(?![\w.-])", "~", text) if user else text


def _homes() -> list[str]:
    """The home folder as it is called and where it really lies; the longer name first."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without one
        return []
    names = {str(home), os.path.realpath(home)} - {os.sep}
    return sorted(names, key=len, reverse=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container's number without a name
        return ""
