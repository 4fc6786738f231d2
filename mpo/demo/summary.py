"""Summarize the demo's result as text."""

from __future__ import annotations

import textwrap
from typing import Any

from mpo.evaluation.intervals import wilson_interval

CONTROL = (
    "The warmed-up model is not the control. At full size and seed 0, plain SFT on the chosen completions reached 51.8 % from "
    "the same model with the same pairs, steps and rate, and MPO 49.6 % (standard error 1.6 points each): "
    "benchmarks/demo_control.py."
)
"""The accuracy of the control (SFT), measured on one seed as its result file states."""


def percent(successes: int, trials: int) -> str:
    """Format a proportion in percent with its 95 % interval.

    >>> percent(50, 100)
    '50.0 % (40.4 to 59.6)'
    """
    low, high = wilson_interval(successes, trials)
    return f"{successes / trials:.1%} ({low * 100:.1f} to {high * 100:.1f})".replace("%", " %")


def summarize(progress: dict[str, Any]) -> str:
    """Summarize the accuracy before and after, with intervals and the p-value of the change.

    Args:
        progress: the result of `mpo.demo.run.run_demo`.
    """
    before, after = progress["before"]["numbers"], progress["after"]["numbers"]
    paired = after["paired"]
    seconds = sum(stage["seconds"] for stage in progress.values())
    return "\n".join(
        [
            f"Evaluation accuracy, {after['total']} questions, 95 % intervals (total {seconds / 60:.1f} min):",
            f"  before MPO  {percent(before['correct'], before['total'])}",
            f"  after MPO   {percent(after['correct'], after['total'])}",
            f"  {paired['gained']} questions gained, {paired['lost']} lost, p = {paired['p_value']:.2g} (exact McNemar test)",
            *textwrap.wrap(CONTROL, 110),
        ]
    )
