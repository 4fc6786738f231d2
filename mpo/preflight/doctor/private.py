"""Mask private data in a report that is pasted into an issue."""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from pathlib import Path

SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY", re.IGNORECASE)
"""Names of environment variables that contain secrets."""

SHORTEST = 8
"""Minimum length of a secret in characters; shorter values (true, 1) occur in ordinary text."""


def masked(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replace the home folder and the user name by ~ and secrets by ***, and remove colours.

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
    """Return the home folder and its real path, the longer one first."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home folder
        return []
    names = {str(home), os.path.realpath(home)} - {os.sep}
    return sorted(names, key=len, reverse=True)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, in a container
        return ""
