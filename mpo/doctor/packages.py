"""The packages that a run needs, and those that some runs need: there, of a supported version, and importable."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from functools import partial
from importlib.metadata import metadata, version

from packaging.specifiers import SpecifierSet

from mpo.doctor.finding import Finding, attempted, one_line
from mpo.doctor.imports import fix_import, import_failure
from mpo.doctor.versions import Supported, install_command, installed, judge, supported

REQUIRED = ("torch", "torchvision", "transformers", "trl", "accelerate", "peft", "datasets", "hydra-core", "pillow")

OPTIONAL = {
    "bitsandbytes": "QLoRA, 8-bit optimisers",
    "flash-attn": "trainer.packed_attention=flash_attn_2",
    "flash-attn-3": "trainer.packed_attention=flash_attn_3",
    "liger-kernel": "trainer.use_liger_kernel=true",
    "deepspeed": "launch=zero1, zero2, zero3",
}
"""What each is for."""

INSTALL = {
    "flash-attn": "pip install --no-build-isolation 'mpo-trainer[flash]'",
    "flash-attn-3": "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
}
"""Where the plain command is not enough."""


def required() -> Iterator[Finding]:
    """Mpo-trainer, Python and `REQUIRED`."""
    yield Finding("mpo-trainer", version("mpo-trainer"))
    yield from attempted("Python", _python)
    asked = supported()
    for name in REQUIRED:
        yield from attempted(name, partial(_package, name, asked.get(name, Supported())))


def optional() -> Iterator[Finding]:
    """`OPTIONAL`: what is installed must work."""
    asked = supported()
    for name, purpose in OPTIONAL.items():
        yield from attempted(name, partial(_package, name, asked.get(name, Supported()), purpose))


def _python() -> Iterator[Finding]:
    found = judge("Python", platform.python_version(), SpecifierSet(metadata("mpo-trainer")["Requires-Python"]))
    yield found if found.status == "ok" else Finding("Python", found.value, "problem", "conda create -n mpo python=3.12")


def _package(name: str, asked: Supported, purpose: str | None = None) -> Iterator[Finding]:
    there = installed(name)
    if there is None:
        command = INSTALL.get(name) or install_command(name)
        if purpose is None:
            yield Finding(name, "not installed", "problem", command)
        else:
            yield Finding(name, f"not installed ({purpose})", "ok", command)
        return
    found = judge(name, there, asked.versions, _build() if name == "torch" else "")
    failure = None if found.status == "problem" else import_failure(name)
    if failure is not None:
        found = Finding(name, f"{there} does not import: {one_line(failure)}", "problem", fix_import(failure, name))
    yield found


def _build() -> str:
    """What torch was built for; nothing where it does not import."""
    if import_failure("torch") is not None:
        return ""
    import torch

    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    if not torch.version.cuda:
        return "for CPUs"
    number = torch.backends.cudnn.version() or 0
    cudnn = f"{number // 10_000}.{number // 100 % 100}.{number % 100}" if number >= 90_000 else str(number)
    return f"CUDA {torch.version.cuda}, cuDNN {cudnn}"
