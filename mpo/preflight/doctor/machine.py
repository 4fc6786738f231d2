"""Check the system: operating system, CPU cores, memory, and the shared memory that data workers use."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpo.preflight.doctor.finding import Finding

GIB = 2**30

SHARED_MEMORY = 1 * GIB
"""Minimum of free shared memory without a note: data workers pass batches through it. Docker's default is 64 MiB."""

CGROUP = Path("/sys/fs/cgroup/memory.max")


def machine() -> Iterator[Finding]:
    """Report operating system, CPU cores, memory and /dev/shm."""
    yield Finding("system", f"{_system()}, {platform.machine()}")
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    yield Finding("CPU cores", f"{usable}" + (f" of {cores}" if usable < cores else ""))
    yield _memory()
    if Path("/dev/shm").is_dir():
        yield _shared_memory()


def size(number: float) -> str:
    """Format bytes in GiB, or in MiB below half a GiB.

    >>> size(79.6 * 2**30), size(64 * 2**20)
    ('79.6 GiB', '64 MiB')
    """
    return f"{number / GIB:.1f} GiB" if number >= GIB / 2 else f"{number / 2**20:.0f} MiB"


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:  # not Linux
        return platform.platform()
    return f"{name}, Linux {platform.release()}"


def _memory() -> Finding:
    import psutil  # type: ignore[import-untyped, unused-ignore]

    memory = psutil.virtual_memory()
    limit = CGROUP.read_text().strip() if CGROUP.exists() else ""
    container = f"; limit of this container: {size(int(limit))}" if limit.isdigit() and int(limit) < memory.total else ""
    return Finding("memory", f"{size(memory.available)} free of {size(memory.total)}{container}")


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    value = f"{size(usage.free)} free of {size(usage.total)}"
    if usage.free >= SHARED_MEMORY:
        return Finding("/dev/shm", value)
    fix = "docker run --shm-size=16g ..., or mpo train ... trainer.dataloader_num_workers=0"
    return Finding("/dev/shm", f"{value}: data workers crash with a bus error when it is full", "note", fix)
