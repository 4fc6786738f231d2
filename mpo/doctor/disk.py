"""Where a run writes: room, permission, and whether it is a network's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mpo.doctor.finding import Finding, attempted
from mpo.doctor.machine import GIB, size

NETWORK = ("nfs", "cifs", "smb", "lustre", "beegfs", "gpfs", "ceph", "gluster", "fuse.", "afs", "9p", "panfs", "weka", "s3", "gcs")
"""How types of file systems begin that are on other machines; ``fuse.`` is sshfs and buckets, as a rule."""


def disk(runs: Path) -> Iterator[Finding]:
    """The folders of runs, of the Hugging Face cache and of cached references."""
    yield from attempted("runs", partial(folder, "runs", runs, 50 * GIB, 1 * GIB, "mpo train ... run_dir=/larger/disk/runs"))
    yield from attempted("Hugging Face", _hugging_face)
    yield from attempted("references", _references)


def folder(name: str, path: Path, roomy: int, least: int, fix: str) -> Iterator[Finding]:
    """A folder that a run writes into.

    Args:
        name: what it is for.
        path: it need not be there yet.
        roomy: free bytes below which it is worth knowing.
        least: free bytes below which a run fails.
        fix: moves it.
    """
    path = Path(os.path.abspath(path))
    there = next(parent for parent in (path, *path.parents) if parent.is_dir())
    usage = shutil.disk_usage(there)
    value = f"{path}: {size(usage.free)} free of {size(usage.total)}"
    kind = file_system(there)
    if kind.startswith(NETWORK):
        value += f", on a network ({kind})"
    reason = _unwritable(there)
    if reason is not None:
        yield Finding(name, f"{value}, not writable ({reason})", "problem", fix)
    elif usage.free < least:
        yield Finding(name, f"{value}: full", "problem", fix)
    elif usage.free < roomy:
        yield Finding(name, f"{value}: little", "note", fix)
    else:
        yield Finding(name, f"{value}, writable")


def file_system(path: Path) -> str:
    """The type of file system that a folder is on, such as ext4 or nfs4; empty where that cannot be told."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    real = Path(os.path.realpath(path))
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}  # the last one covers those before
    return next((mounts[parent] for parent in (real, *real.parents) if parent in mounts), "")


def _hugging_face() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    yield from folder("Hugging Face", Path(HF_HUB_CACHE), 50 * GIB, 1 * GIB, "export HF_HOME=/larger/disk/huggingface")


def _references() -> Iterator[Finding]:
    from mpo.reference.filling import default_folder

    yield from folder("references", default_folder(), 1 * GIB, GIB // 10, "export MPO_CACHE=/larger/disk/mpo")


def _unwritable(there: Path) -> str | None:
    """Why nothing can be written into a folder; None: a file was."""
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"mpo")
            file.flush()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
