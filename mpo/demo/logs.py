"""Keeps trainers' printed logs out of the terminal and in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path


@contextmanager
def logs_to(path: Path) -> Iterator[None]:
    """Appends what is printed to a file. Progress bars and warnings go to stderr and stay visible.

    Args:
        path: the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file):
        yield
