"""The machine apart from its GPUs: system, cores, memory, and the shared memory that data workers use."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from mpo.doctor.finding import Finding

GIB = 2**30

SHARED_MEMORY = 1 * GIB
"""Below this, warn: data workers pass whole batches of image tiles through it. Docker gives 64 MiB unless asked."""

CGROUP = Path("/sys/fs/cgroup/memory.max")


def machine() -> Iterator[Finding]:
    """System, cores, memory, /dev/shm."""
    yield Finding("system", f"{_system()}, {platform.machine()}")
    cores = os.cpu_count() or 1
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    yield Finding("CPU cores", f"{usable}" + (f" of {cores}" if usable < cores else ""))
    yield _memory()
    if Path("/dev/shm").is_dir():
        yield _shared_memory()


def size(number: float) -> str:
    """Bytes in GiB, or MiB below half of one.

    >>> size(79.6 * 2**30), size(64 * 2**20)
    ('79.6 GiB', '64 MiB')
    """
    return f"{number / GIB:.1f} GiB" if number >= GIB / 2 else f"{number / 2**20:.0f} MiB"


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:  # no Linux
        return platform.platform()
    return f"{name}, Linux {platform.release()}"


def _memory() -> Finding:
    import psutil  # type: ignore[import-untyped, unused-ignore]

    memory = psutil.virtual_memory()
    limit = CGROUP.read_text().strip() if CGROUP.exists() else ""
    container = f"; this container may use {size(int(limit))}" if limit.isdigit() and int(limit) < memory.total else ""
    return Finding("memory", f"{size(memory.available)} free of {size(memory.total)}{container}")


def _shared_memory() -> Finding:
    usage = shutil.disk_usage("/dev/shm")
    value = f"{size(usage.free)} free of {size(usage.total)}"
    if usage.free >= SHARED_MEMORY:
        return Finding("/dev/shm", value)
    fix = "docker run --shm-size=16g ..., or mpo train ... trainer.dataloader_num_workers=0"
    return Finding("/dev/shm", f"{value}: data workers die of a bus error when it is full", "note", fix)
