"""Check the folders that a run writes to: free space, write permission, and network file systems."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mpo.preflight.doctor.finding import Finding, attempted
from mpo.preflight.doctor.machine import GIB, size

NETWORK = ("nfs", "cifs", "smb", "lustre", "beegfs", "gpfs", "ceph", "gluster", "fuse.", "afs", "9p", "panfs", "weka", "s3", "gcs")
"""Prefixes of the types of network file systems; ``fuse.`` is usually sshfs or a bucket."""


def disk(runs: Path) -> Iterator[Finding]:
    """Check the folders of runs, of the Hugging Face cache and of cached reference log-probs."""
    yield from attempted("runs", partial(folder, "runs", runs, 50 * GIB, 1 * GIB, "mpo train ... run_dir=/larger/disk/runs"))
    yield from attempted("Hugging Face", _hugging_face)
    yield from attempted("references", _references)


def folder(name: str, path: Path, roomy: int, least: int, fix: str) -> Iterator[Finding]:
    """Check a folder that a run writes to.

    Args:
        name: name of the finding.
        path: the folder; it may not exist yet.
        roomy: free bytes below which the finding is a note.
        least: free bytes below which the finding is a problem.
        fix: command that selects another folder.
    """
    path = Path(os.path.abspath(path))
    existing = next(parent for parent in (path, *path.parents) if parent.is_dir())
    usage = shutil.disk_usage(existing)
    value = f"{path}: {size(usage.free)} free of {size(usage.total)}"
    kind = file_system(existing)
    if kind.startswith(NETWORK):
        value += f", network file system ({kind})"
    reason = _unwritable(existing)
    if reason is not None:
        yield Finding(name, f"{value}, not writable ({reason})", "problem", fix)
    elif usage.free < least:
        yield Finding(name, f"{value}: disk full", "problem", fix)
    elif usage.free < roomy:
        yield Finding(name, f"{value}: little free space", "note", fix)
    else:
        yield Finding(name, f"{value}, writable")


def file_system(path: Path) -> str:
    """Return the type of a folder's file system, such as ext4 or nfs4; empty if it is unknown."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    real = Path(os.path.realpath(path))
    # The last mount of a path hides earlier ones.
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (real, *real.parents) if parent in mounts), "")


def _hugging_face() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    yield from folder("Hugging Face", Path(HF_HUB_CACHE), 50 * GIB, 1 * GIB, "export HF_HOME=/larger/disk/huggingface")


def _references() -> Iterator[Finding]:
    from mpo.training.reference.filling import default_folder

    yield from folder("references", default_folder(), 1 * GIB, GIB // 10, "export MPO_CACHE=/larger/disk/mpo")


def _unwritable(path: Path) -> str | None:
    """Write a temporary file into a folder; return the reason if that fails, else None."""
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"mpo")
            file.flush()
    except OSError as error:
        return error.strerror or type(error).__name__
    return None
