"""Redirect the trainers' printed logs to a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path


@contextmanager
def logs_to(path: Path) -> Iterator[None]:
    """Append everything printed to stdout to a file. Progress bars and warnings go to stderr and stay visible.

    Args:
        path: the file; its folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as file, redirect_stdout(file):
        yield
