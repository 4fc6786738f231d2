"""List and run the checks, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path

from mpo.preflight.doctor.finding import Finding, Section, attempted
from mpo.preflight.doctor.private import masked

STEP = "Training step"

CHECKS: dict[str, tuple[str, ...]] = {
    "Packages": ("packages:required",),
    "Optional packages": ("packages:optional", "four_bits:four_bits"),
    "Machine": ("machine:machine",),
    "GPUs": ("gpus:gpus",),
    "Attention of packed rows": ("attention:attention",),
    "Disk": ("disk:disk",),
    "Hugging Face Hub": ("hub:hub",),
    STEP: ("step:training_step",),
}
"""Title and functions of each check. Functions are imported when they run, because their own imports may be broken."""


def check(title: str, runs: Path) -> Section:
    """Run a check.

    Args:
        title: a key of `CHECKS`.
        runs: folder of runs.
    """
    found = chain.from_iterable(attempted("this check", partial(_run, name, runs)) for name in CHECKS[title])
    return Section(title, tuple(replace(one, value=masked(one.value), fix=masked(one.fix)) for one in found))


def _run(qualified: str, runs: Path) -> Iterable[Finding]:
    module, _, name = qualified.partition(":")
    function: Callable[..., Iterable[Finding]] = getattr(import_module(f"mpo.preflight.doctor.{module}"), name)
    return function(runs) if name == "disk" else function()
