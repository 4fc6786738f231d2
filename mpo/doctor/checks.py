"""All checks, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path

from mpo.doctor.finding import Finding, Section, attempted
from mpo.doctor.private import masked

STEP = "Training step"

CHECKS: dict[str, tuple[str, ...]] = {
    "Packages": ("packages:required",),
    "Optional packages": ("packages:optional", "four_bits:four_bits"),
    "Machine": ("machine:machine",),
    "GPUs": ("gpus:gpus",),
    "Attention of packed rows": ("attention:attention",),
    "Disk": ("disk:disk",),
    "Hugging Face hub": ("hub:hub",),
    STEP: ("step:training_step",),
}
"""Title and functions of each, imported when they run: what they lean on may be what is broken."""


def check(title: str, runs: Path) -> Section:
    """Run a check.

    Args:
        title: of `CHECKS`.
        runs: folder of runs.
    """
    found = chain.from_iterable(attempted("this check", partial(_run, place, runs)) for place in CHECKS[title])
    return Section(title, tuple(replace(one, value=masked(one.value), fix=masked(one.fix)) for one in found))


def _run(place: str, runs: Path) -> Iterable[Finding]:
    module, _, name = place.partition(":")
    function: Callable[..., Iterable[Finding]] = getattr(import_module(f"mpo.doctor.{module}"), name)
    return function(runs) if name == "disk" else function()
