"""Refuse what cannot be written before any work is done, and what would overwrite a user's files."""

import os
from collections.abc import Mapping
from pathlib import Path


def refuse_unwritable(name: str, target: Path) -> None:
    """Refuse a file or folder, by its name on the command line, in a folder that cannot be created or written."""
    above = next(path for path in target.absolute().parents if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "cannot be written" if above.is_dir() else "is not a folder"
        raise ValueError(f"{name}={target} cannot be written: {above} {reason}. Give another path.")


def refuse_targets(targets: Mapping[str, Path | None]) -> None:
    """Refuse new targets, by their names on the command line, that exist, are the same, or cannot be written."""
    seen: dict[str, str] = {}
    for name, target in targets.items():
        if target is None:
            continue
        if os.path.lexists(target):
            raise ValueError(f"{name}={target} already exists. Choose a new name.")
        refuse_unwritable(name, target)
        if (other := seen.setdefault(os.path.realpath(target), name)) != name:
            raise ValueError(f"{other} and {name} are both {target}. Give each its own name.")


def refuse_replacing(name: str, target: Path | None, start: str) -> None:
    """Refuse to replace a file, by its name on the command line, that does not start as those of the command (`start`)."""
    if target is None:
        return
    if target.is_dir():
        raise ValueError(f"{name}={target} is a folder. Give the name of a file.")
    if target.is_file():
        with open(target, "rb") as file:
            found = file.read(len(start.encode()))
        if found and found != start.encode():
            raise ValueError(f"{name}={target} exists, and this command has not written it. Give another file.")
    refuse_unwritable(name, target)
