"""Check required and optional packages: installed, a supported version, and importable."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import partial
from importlib.metadata import metadata, version

from packaging.specifiers import SpecifierSet

from mpo.preflight.doctor.finding import Finding, attempted, one_line
from mpo.preflight.doctor.imports import fix_import, import_failure
from mpo.preflight.doctor.versions import Supported, install_command, installed, judge, supported

REQUIRED = ("torch", "torchvision", "transformers", "trl", "accelerate", "peft", "datasets", "hydra-core", "pillow")

OPTIONAL = {
    "bitsandbytes": "QLoRA, 8-bit optimizers",
    "flash-attn": "trainer.packed_attention=flash_attn_2",
    "flash-attn-3": "trainer.packed_attention=flash_attn_3",
    "liger-kernel": "trainer.use_liger_kernel=true",
    "deepspeed": "launch=zero1, zero2, zero3",
}
"""The settings that need each package."""

INSTALL = {
    "flash-attn": "pip install --no-build-isolation 'mpo-trainer[flash]'",
    "flash-attn-3": "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
}
"""Install commands of packages that need special options."""


def required() -> Iterator[Finding]:
    """Check mpo-trainer, Python and the packages of `REQUIRED`."""
    yield Finding("mpo-trainer", version("mpo-trainer"))
    yield from attempted("Python", _python)
    asked = supported()
    for name in REQUIRED:
        yield from attempted(name, partial(_package, name, asked.get(name, Supported())))


def optional() -> Iterator[Finding]:
    """Check the packages of `OPTIONAL`, which must work if they are installed."""
    asked = supported()
    for name, purpose in OPTIONAL.items():
        yield from attempted(name, partial(_package, name, asked.get(name, Supported()), purpose))


def _python() -> Iterator[Finding]:
    found = judge("Python", platform.python_version(), SpecifierSet(metadata("mpo-trainer")["Requires-Python"]))
    yield found if found.status == "ok" else Finding("Python", found.value, "problem", "conda create -n mpo python=3.12")


def _package(name: str, asked: Supported, purpose: str | None = None) -> Iterator[Finding]:
    current = installed(name)
    if current is None:
        command = INSTALL.get(name) or install_command(name)
        if purpose is None:
            yield Finding(name, "not installed", "problem", command)
        else:
            yield Finding(name, f"not installed ({purpose})", "ok", command)
        return
    found = judge(name, current, asked.versions, _build() if name == "torch" else "")
    failure = None if found.status == "problem" else import_failure(name)
    if failure is not None:
        found = Finding(name, f"{current} cannot be imported: {one_line(failure)}", "problem", fix_import(failure, name))
    yield found


def _build() -> str:
    """Describe the build of torch; empty if torch cannot be imported."""
    if import_failure("torch") is not None:
        return ""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if not torch.version.cuda:
        return "CPU build"
    number = torch.backends.cudnn.version() or 0
    cudnn = f"{number // 10_000}.{number // 100 % 100}.{number % 100}" if number >= 90_000 else str(number)
    return f"CUDA {torch.version.cuda}, cuDNN {cudnn}"
