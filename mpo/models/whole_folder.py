"""Write a folder that appears under its name only when complete."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_existing(target: Path) -> None:
    """Refuse a target that exists and is not empty.

    Raises:
        ValueError: for a file, or a folder that is not empty.
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{target} already exists. Remove it, or give another folder.")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a new folder next to `target` that is renamed to it at the end; after an error it is kept for inspection.

    Args:
        target: an empty or nonexistent folder.

    Yields:
        the folder, ``TARGET.partial``, emptied of an earlier attempt.

    Raises:
        ValueError: as in `refuse_existing`.
    """
    refuse_existing(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)
