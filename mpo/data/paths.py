"""Find the files that a data file names: only inside their folder, and only regular files."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

LIST_AFTER = 64
"""Number of look-ups in one folder after which it is listed."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device"}
_KINDS[stat.S_IFBLK] = "a device"


def inside(root: str | os.PathLike[str], path: Any, what: str = "image", *, where: str = "", setting: str = "image_root") -> str:
    """Resolve the path of a file that a data file names, relative or absolute, and that must be inside the folder `root`.

    ``..``, absolute paths and links may lead anywhere inside it, but not outside. `what` (the file), `where` (the record) and the
    `setting` of the folder are for messages. Raises ValueError for a path that is not text, a URL, a path that leaves the folder,
    and anything but a regular file.
    """
    name = f"{where}: the {what} {str(path)[:200]!r}" if where else f"The {what} {str(path)[:200]!r}"
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"{name} is not a path. Give the path of a file, relative to {setting}.")
    if _URL.match(path):
        raise ValueError(f"{name} is a URL, and nothing is downloaded while data is read. Download it into {setting} ({root}).")
    try:
        folder = _real(os.path.join(os.getcwd(), root))  # a relative one means another folder after chdir
        full = _real_file(os.path.join(folder, path))
        if os.path.commonpath((folder, full)) != folder:
            raise ValueError(f"{name} lies outside {folder}. Set {setting} to a folder that contains all {what}s.")
        kind = stat.S_IFMT(os.lstat(full).st_mode)
    except FileNotFoundError:
        raise ValueError(
            f"{name}: there is no {what} {path!r} in {os.path.normpath(root)}. Set {setting} to the folder of the {what}s."
        ) from None
    except (OSError, RuntimeError) as error:  # a loop of links, a name that is too long, no permission
        raise ValueError(f"{name} cannot be reached in {root} ({error}). Fix the path or leave the record out.") from error
    if kind != stat.S_IFREG:
        raise ValueError(f"{name} is {_KINDS.get(kind, 'no file')}, not a file. Fix the path or leave the record out.")
    return full


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _real_file(path: str) -> str:
    folder, name = os.path.split(path)
    if name in ("", ".", ".."):
        return os.path.realpath(path)
    full = os.path.join(_real(folder), name)
    return os.path.realpath(full, strict=True) if stat.S_ISLNK(os.lstat(full).st_mode) else full


class Folders:
    """Finds files inside a root as `inside` does, with fewer system calls: a folder that contains many of them is listed once."""

    def __init__(self, root: str | Path) -> None:
        self._root = os.path.join(os.getcwd(), root)  # whatever the current folder is later
        self._real: dict[str, str] = {}
        self._asked: Counter[str] = Counter()
        self._names: dict[str, set[str]] = {}

    def __call__(self, path: str, kind: str = "image") -> str:
        """Return the real path of a file; arguments and errors as in `inside`."""
        is_plain = isinstance(path, str) and path != "" and path[0] not in "/\\~"
        if not is_plain or ".." in path or ":" in path or "\0" in path:
            return inside(self._root, path, what=kind)
        folder, _, name = path.rpartition("/")
        real = self._real.get(folder)
        if real is not None and self._is_plain_file(real, name):
            return f"{real}/{name}"
        full = inside(self._root, path, what=kind)
        if real is None:
            real = os.path.realpath(os.path.join(self._root, folder))
            if full == f"{real}/{name}":  # otherwise it is a link, which may point to another folder
                self._real[folder] = real
        return full

    def _is_plain_file(self, folder: str, name: str) -> bool:
        self._asked[folder] += 1
        if self._asked[folder] > LIST_AFTER:
            if folder not in self._names:
                with os.scandir(folder) as entries:
                    self._names[folder] = {entry.name for entry in entries if entry.is_file(follow_symlinks=False)}
            return name in self._names[folder]
        try:
            return stat.S_ISREG(os.lstat(f"{folder}/{name}").st_mode)
        except (OSError, ValueError):
            return False


def regular_file(path: str | os.PathLike[str], where: str, what: str) -> str:
    """Refuse a URL, and all but a regular file, which alone can be opened without blocking."""
    path = os.fspath(path)
    if _URL.match(path):
        raise ValueError(f"{where}: this is a URL, and nothing is downloaded while data is read. Give the path of the {what}.")
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a zero byte in the name
        raise ValueError(f"{where}: there is no such {what} file. Paths are relative to the current folder.") from None
    if kind != stat.S_IFREG:
        raise ValueError(f"{where}: this is {_KINDS.get(kind, 'no file')}, not a file. Fix the path.")
    return path


def check_unmoved(path: str, where: str) -> None:
    """Refuse a path that has become a link, or contains one, since `inside` returned it: it may lead out of the record's root."""
    real = os.path.realpath(path)
    if real != path:
        raise ValueError(f"{where}: {path} has become a link to {real} since the data was read. Put the file itself there.")
