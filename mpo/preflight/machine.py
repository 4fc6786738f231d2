"""Check the machine: memory, disks and the Hub, GPUs and the attention kernel of packed rows."""

import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

from mpo.preflight.doctor import Finding, attempted, one_line
from mpo.visible import size

GIB = 2**30
SHARED_MEMORY = 1 * GIB
"""Minimum of free shared memory without a note: data workers pass batches through it. Docker's default is 64 MiB."""
CGROUP = Path("/sys/fs/cgroup/memory.max")
NETWORK = ("nfs", "cifs", "smb", "lustre", "beegfs", "gpfs", "ceph", "gluster", "fuse.", "afs", "9p", "panfs", "weka", "s3", "gcs")
"""Prefixes of the types of network file systems; ``fuse.`` is usually sshfs or a bucket."""
HUB_SECONDS = 2.0
"""Timeout of a request to the Hub."""
HUB_FIX = "export HF_ENDPOINT=https://MIRROR, or HTTPS_PROXY=http://PROXY, or HF_HUB_OFFLINE=1 if all files are cached"
REINSTALL = "pip install --force-reinstall torch torchvision"


def _free(path: str | Path) -> tuple[int, str]:
    usage = shutil.disk_usage(path)
    return usage.free, f"{size(usage.free)} free of {size(usage.total)}"


def machine() -> Iterator[Finding]:
    """Report memory and /dev/shm."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    memory = psutil.virtual_memory()
    limit = CGROUP.read_text().strip() if CGROUP.exists() else ""
    container = f"; limit of this container: {size(int(limit))}" if limit.isdigit() and int(limit) < memory.total else ""
    yield Finding("memory", f"{size(memory.available)} free of {size(memory.total)}{container}")
    if Path("/dev/shm").is_dir():
        free, value = _free("/dev/shm")
        if free >= SHARED_MEMORY:
            yield Finding("/dev/shm", value)
        else:
            fix = "docker run --shm-size=16g ..., or mpo train ... trainer.dataloader_num_workers=0"
            yield Finding("/dev/shm", f"{value}: data workers crash with a bus error when it is full", "note", fix)


def disk(runs: Path) -> Iterator[Finding]:
    """Check the folders of runs, of the Hugging Face cache and of cached reference log-probs."""
    hub, references = "huggingface_hub.constants:HF_HUB_CACHE", "mpo.training.reference.filling:default_folder"
    folders: tuple[tuple[Any, ...], ...] = (
        ("runs", lambda: runs, 50 * GIB, 1 * GIB, "mpo train ... run_dir=/larger/disk/runs"),
        ("Hugging Face", lambda: resolve_name(hub), 50 * GIB, 1 * GIB, "export HF_HOME=/larger/disk/huggingface"),
        ("references", lambda: resolve_name(references)(), 1 * GIB, GIB // 10, "export MPO_CACHE=/larger/disk/mpo"),
    )
    for name, find, *how in folders:
        yield from attempted(name, lambda name=name, find=find, how=how: [folder(name, find(), *how)])


def folder(name: str, path: str | Path, roomy: int, least: int, fix: str) -> Finding:
    """Check a folder, which may not exist yet: fewer free bytes than `roomy` are a note, than `least` a problem."""
    path = Path(os.path.abspath(path))
    existing = next(parent for parent in (path, *path.parents) if parent.is_dir())
    free, value = _free(existing)
    value, kind = f"{path}: {value}", file_system(existing)
    if kind.startswith(NETWORK):
        value += f", network file system ({kind})"
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"mpo")
            file.flush()
    except OSError as error:
        return Finding(name, f"{value}, not writable ({error.strerror or type(error).__name__})", "problem", fix)
    if free < least:
        return Finding(name, f"{value}: disk full", "problem", fix)
    return Finding(name, f"{value}: little free space", "note", fix) if free < roomy else Finding(name, f"{value}, writable")


def file_system(path: Path) -> str:
    """Return the type of a folder's file system, such as ext4 or nfs4; empty if it is unknown."""
    import psutil  # type: ignore[import-untyped, unused-ignore]

    real = Path(os.path.realpath(path))
    # The last mount of a path hides earlier ones.
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((mounts[parent] for parent in (real, *real.parents) if parent in mounts), "")


def hub() -> Iterator[Finding]:
    """Check access to the Hub, or report offline mode, and report whether a token is set."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("access", "offline mode (HF_HUB_OFFLINE): only cached files are used")
    else:
        yield _access(constants.ENDPOINT)
    yield Finding("token", "set" if get_token() else "not set; public models and data do not need one")


def _access(endpoint: str) -> Finding:
    from huggingface_hub import get_session

    results: list[int | BaseException] = []

    def request() -> None:
        try:
            results.append(get_session().head(endpoint, timeout=HUB_SECONDS).status_code)
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=request, daemon=True)  # the timeout of a request does not cover the DNS lookup
    thread.start()
    thread.join(2 * HUB_SECONDS)
    result = results[0] if results else TimeoutError("the DNS lookup timed out")
    if isinstance(result, int) and result < 400:
        return Finding("access", f"{endpoint} responds")
    how = f"responds with status {result}" if isinstance(result, int) else f"does not respond ({one_line(result)})"
    return Finding("access", f"{endpoint} {how}", "note", HUB_FIX)


class Kind(NamedTuple):
    """The properties that identical GPUs share."""

    name: str
    memory: int  # bytes
    architecture: str
    bf16: str  # yes, emulated or no


def kinds() -> dict[Kind, list[int]]:
    """Group the GPUs by kind; the indices are PyTorch's."""
    import torch

    found: dict[Kind, list[int]] = {}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        amd = torch.version.hip is not None
        architecture = about.gcnArchName if amd else f"compute capability {about.major}.{about.minor}"
        bf16 = "yes" if amd or (about.major, about.minor) >= (8, 0) else _slow_bf16(index)
        found.setdefault(Kind(about.name, about.total_memory, architecture, bf16), []).append(index)
    return found


def _slow_bf16(index: int) -> str:
    import torch

    with torch.cuda.device(index):
        return "emulated" if torch.cuda.is_bf16_supported() else "no"


def numbers(indices: list[int]) -> str:
    """Format the indices of GPUs.

    >>> numbers([0, 1, 2, 3]), numbers([0, 2])
    ('GPU 0-3', 'GPU 0,2')
    """
    first, last = indices[0], indices[-1]
    in_a_row = len(indices) > 1 and indices == list(range(first, last + 1))
    return f"GPU {first}-{last}" if in_a_row else "GPU " + ",".join(map(str, indices))


def nvidia_smi(*arguments: str) -> str:
    """Return the output of nvidia-smi; empty if it is not installed or fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def gpus() -> Iterator[Finding]:
    """Report each kind of GPU, the driver, peer access, and the communication libraries."""
    import torch

    if not torch.cuda.is_available():
        yield _missing()
    for kind, indices in (kinds() if torch.cuda.is_available() else {}).items():
        free = min(torch.cuda.mem_get_info(index)[0] for index in indices)
        value = f"{kind.name}, {size(kind.memory)} ({size(free)} free), {kind.architecture}, bf16: {kind.bf16}"
        if free < kind.memory / 2:
            yield Finding(numbers(indices), f"{value}; memory is in use by other processes", "note", "nvidia-smi")
        elif kind.bf16 != "yes":
            yield Finding(numbers(indices), value, "note", "mpo train ... trainer.bf16=false trainer.fp16=true")
        else:
            yield Finding(numbers(indices), value)
    several = torch.cuda.device_count() > 1
    if several:
        yield peers(torch.cuda.device_count(), torch.cuda.can_device_access_peer, nvidia_smi("topo", "-m"))
    yield _collectives(torch.distributed, several)


def peers(count: int, reaches: Callable[[int, int], bool], topology: str) -> Finding:
    """Check whether all GPUs have access to each other's memory, and whether NVLink connects them (``nvidia-smi topo -m``)."""
    lacking = [f"{a}-{b}" for a, b in combinations(range(count), 2) if not (reaches(a, b) and reaches(b, a))]
    links = re.search(r"^GPU\d.*\bNV\d", re.sub(r"\x1b\[\d*m", "", topology), re.MULTILINE)
    link = "NVLink" if links else "no NVLink"
    if not lacking:
        return Finding("between GPUs", f"peer access between all pairs, {link}")
    shown = ", ".join(lacking[:6]) + ", ..." * (len(lacking) > 6)
    return Finding("between GPUs", f"no peer access between {shown}, {link}: data is copied through CPU memory", "note")


def _missing() -> Finding:
    import torch

    if torch.backends.mps.is_available():
        return Finding("GPU", "Apple GPU (MPS); attention of packed rows uses one call per segment")
    if torch.accelerator.is_available():
        return Finding("GPU", f"{torch.accelerator.current_accelerator()}: mpo is not tested on it", "note")
    driver = nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader")
    if not driver:
        return Finding("GPU", "none: runs use the CPU, which is sufficient for mpo demo and small models", "note")
    present = f"none: an NVIDIA driver ({driver.splitlines()[0]}) is installed, but"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Finding("GPU", f"{present} CUDA_VISIBLE_DEVICES hides all GPUs", "note", "unset CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return Finding("GPU", f"{present} this build of torch has no CUDA support", "problem", REINSTALL)
    try:
        torch.cuda.init()
        reason = "PyTorch finds no device"
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)
    fix = f"install an NVIDIA driver for CUDA {torch.version.cuda} or newer (https://www.nvidia.com/drivers)"
    return Finding("GPU", f"{present} {reason}", "problem", fix)


def _collectives(distributed: Any, several: bool) -> Finding:
    if not distributed.is_available():
        return Finding("collectives", "none: this torch has no torch.distributed, only one rank", "note", REINSTALL)
    nccl = distributed.is_nccl_available()
    value = ", ".join(["NCCL"] * nccl + ["gloo"] * distributed.is_gloo_available()) or "none"
    if several and not nccl:
        return Finding("collectives", f"{value}: several GPUs need NCCL, which PyTorch has on Linux", "problem", REINSTALL)
    return Finding("collectives", value)


def attention() -> Iterator[Finding]:
    """Report the kernel for each kind of GPU, or for the CPU."""
    import torch

    from mpo.batching.attention import kernel_for

    found = kinds() if torch.cuda.is_available() else {}
    for kind, indices in found.items():
        dtype = torch.float16 if kind.bf16 == "no" else torch.bfloat16
        yield Finding(f"on {numbers(indices)}", kernel_for(torch.device("cuda", indices[0]), dtype))
    if not found:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        yield Finding(f"on the {device.type.upper()}", kernel_for(device, torch.bfloat16))
