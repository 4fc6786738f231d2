"""A folder that appears under its name only when it is whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_existing(target: Path) -> None:
    """Refuse a target that holds something.

    Raises:
        ValueError: for a file, or a folder that is not empty.
    """
    if target.exists() and any(target.iterdir() if target.is_dir() else [target]):
        raise ValueError(f"{target} is already there. Remove it, or give another folder.")


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A new folder beside `target` to write into, which takes its name at the end; after an error it is left for a look.

    Args:
        target: a folder that is empty or not there.

    Yields:
        the folder, ``TARGET.partial``; what an earlier attempt left in it is gone.

    Raises:
        ValueError: as of `refuse_existing`.
    """
    refuse_existing(target)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if target.exists():
        target.rmdir()
    partial.rename(target)
