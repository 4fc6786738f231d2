"""Check GPUs, their driver and their interconnect; without a GPU, report the reason."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

from mpo.preflight.doctor.finding import Finding, one_line
from mpo.preflight.doctor.machine import size

REINSTALL = "pip install --force-reinstall torch torchvision"


class Kind(NamedTuple):
    """The properties that identical GPUs share."""

    name: str
    memory: int  # bytes
    architecture: str
    bf16: str  # yes, emulated or no


def gpus() -> Iterator[Finding]:
    """Report each kind of GPU, the driver, peer access, and the communication libraries."""
    import torch

    if torch.cuda.is_available():
        yield from _available()
    else:
        yield _missing(nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader"))
    yield _collectives()


def kinds() -> dict[Kind, list[int]]:
    """Group the GPUs by kind; the indices are PyTorch's."""
    import torch

    found: dict[Kind, list[int]] = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        amd = torch.version.hip is not None
        architecture = properties.gcnArchName if amd else f"compute capability {properties.major}.{properties.minor}"
        bf16 = "yes" if amd or capability >= (8, 0) else _slow_bf16(index)
        found.setdefault(Kind(properties.name, properties.total_memory, architecture, bf16), []).append(index)
    return found


def numbers(indices: list[int]) -> str:
    """Format the indices of GPUs.

    >>> numbers([0, 1, 2, 3]), numbers([0, 2])
    ('GPU 0-3', 'GPU 0,2')
    """
    first, last = indices[0], indices[-1]
    if len(indices) > 1 and indices == list(range(first, last + 1)):
        return f"GPU {first}-{last}"
    return "GPU " + ",".join(map(str, indices))


def nvidia_smi(*arguments: str) -> str | None:
    """Return the output of nvidia-smi; None if it is not installed or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _slow_bf16(index: int) -> str:
    import torch

    with torch.cuda.device(index):
        return "emulated" if torch.cuda.is_bf16_supported() else "no"


def _available() -> Iterator[Finding]:
    import torch

    found = kinds()
    for kind, indices in found.items():
        free = min(torch.cuda.mem_get_info(index)[0] for index in indices)
        value = f"{kind.name}, {size(kind.memory)} ({size(free)} free), {kind.architecture}, bf16: {kind.bf16}"
        if free < kind.memory / 2:
            yield Finding(numbers(indices), f"{value}; memory is in use by other processes", "note", "nvidia-smi")
        elif kind.bf16 != "yes":
            yield Finding(numbers(indices), value, "note", "mpo train ... trainer.bf16=false trainer.fp16=true")
        else:
            yield Finding(numbers(indices), value)
    driver = (nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader") or "").splitlines()
    if driver:
        yield Finding("driver", f"NVIDIA {driver[0]}")
    count = torch.cuda.device_count()
    if count > 1:
        yield peers(count, torch.cuda.can_device_access_peer, nvidia_smi("topo", "-m") or "")


def peers(count: int, reaches: Callable[[int, int], bool], topology: str) -> Finding:
    """Check whether all GPUs have peer access to each other, and whether NVLink connects them.

    Args:
        count: number of GPUs.
        reaches: whether the first GPU can access the memory of the second one.
        topology: output of ``nvidia-smi topo -m``.
    """
    lacking = [f"{a}-{b}" for a, b in combinations(range(count), 2) if not (reaches(a, b) and reaches(b, a))]
    links = re.findall(r"^GPU\d.*\bNV\d", re.sub(r"\x1b\[\d*m", "", topology), re.MULTILINE)
    link = "NVLink" if links else "no NVLink"
    if not lacking:
        return Finding("between GPUs", f"peer access between all pairs, {link}")
    shown = ", ".join(lacking[:6]) + ", ..." * (len(lacking) > 6)
    return Finding("between GPUs", f"no peer access between {shown}, {link}: data is copied through CPU memory", "note")


def _missing(driver: str | None) -> Finding:
    """Report why PyTorch has no CUDA or ROCm GPU."""
    import torch

    if torch.backends.mps.is_available():
        return Finding("GPU", "Apple GPU (MPS); attention of packed rows uses one call per segment")
    if torch.accelerator.is_available():
        return Finding("GPU", f"{torch.accelerator.current_accelerator()}: mpo is not tested on it", "note")
    if not driver:
        return Finding("GPU", "none: runs use the CPU, which is sufficient for mpo demo and small models", "note")
    present = f"an NVIDIA driver ({driver.splitlines()[0]}) is installed"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("GPU", f"none: {present}, but CUDA_VISIBLE_DEVICES hides all GPUs", "note", "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return Finding("GPU", f"none: {present}, but this build of torch has no CUDA support", "problem", REINSTALL)
    try:
        torch.cuda.init()
        reason = "PyTorch finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
    fix = f"install an NVIDIA driver for CUDA {torch.version.cuda} or newer (https://www.nvidia.com/drivers)"
    return Finding("GPU", f"none: {present}, but {reason}", "problem", fix)


def _collectives() -> Finding:
    import torch

    distributed = torch.distributed
    if not distributed.is_available():
        return Finding("collectives", "none: this torch has no torch.distributed, only one rank", "note", REINSTALL)
    nccl = distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else ""
    backends = [f"NCCL {version}"] * nccl + ["gloo"] * distributed.is_gloo_available()
    value = ", ".join(backends) or "none"
    if torch.cuda.device_count() > 1 and not nccl:
        return Finding("collectives", f"{value}: several GPUs need NCCL, which PyTorch has on Linux", "problem", REINSTALL)
    return Finding("collectives", value)
