"""Summarize the numbers of all jobs: paired intervals, a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t

from comparison.jobs import METHODS
from comparison.task import PROMPTS

AGAINST = "mpo"
CLAIMS = {
    "1: MPO less SFT on the chosen": ("mpo", "sft"),
    "2a: DPO less the warmed-up model": ("dpo", "warm_up"),
    "2b: DPO less SFT on the chosen": ("dpo", "sft"),
    "3: DPO + SFT less DPO": ("dpo_sft", "dpo"),
    "4: MPO less MPO without delta": ("mpo", "mpo_no_delta"),
}
"""The claims of `../methods.md`, as the difference of two methods."""


def paired_interval(first: Sequence[float], second: Sequence[float]) -> dict[str, float | None]:
    """Mean difference of two methods over the same seeds, with Student's 95 % interval.

    Args:
        first: one number per seed.
        second: the numbers of the other method, in the same order.

    Returns:
        `mean`, `low` and `high`; without bounds for a single seed.
    """
    differences = np.subtract(first, second)
    mean, seeds = float(differences.mean()), len(differences)
    if seeds < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, seeds - 1) * differences.std(ddof=1) / math.sqrt(seeds))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarize(
    before: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[Mapping[str, Any]]], rates: Mapping[str, float]
) -> dict[str, Any]:
    """Means over seeds and paired differences of each method.

    Args:
        before: measurements of the warmed-up model of each seed.
        runs: for each method, the measurements of its job of each seed, in the same order.
        rates: learning rate of each method.

    Returns:
        `methods`: name -> per form `accuracy` (one per seed), `unparsable` (fraction), `tokens`; `gain` (reasoned minus direct
        accuracy), `margin`, `learning_rate`, `against_mpo` (paired intervals, per form). `claims`: those of `../methods.md`.
    """
    everything = {"warm_up": [{**found, "margin": 0.0} for found in before], **runs}
    methods: dict[str, Any] = {}
    for name, found in everything.items():
        forms = {form: _form([run[form] for run in found]) for form in PROMPTS}
        methods[name] = {
            **forms,
            "gain": np.subtract(forms["reasoned"]["accuracy"], forms["direct"]["accuracy"]).tolist(),
            "margin": [run["margin"] for run in found],
            "learning_rate": rates.get(name),
        }
    for numbers in methods.values():
        numbers["against_mpo"] = {
            form: paired_interval(numbers[form]["accuracy"], methods[AGAINST][form]["accuracy"]) for form in PROMPTS
        }
    claims = {
        claim: {"of": first, "less": second, **_differences(methods[first], methods[second])}
        for claim, (first, second) in CLAIMS.items()
    }
    return {"methods": methods, "claims": claims}


def _form(found: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    total = len(found[0]["correct"])
    return {
        "accuracy": [sum(one["correct"]) / total for one in found],
        "unparsable": [one["unparsable"] / total for one in found],
        "tokens": [one["tokens"] for one in found],
        "read": [one["read"] / total for one in found],
    }


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "reasoned": paired_interval(first["reasoned"]["accuracy"], second["reasoned"]["accuracy"]),
        "direct": paired_interval(first["direct"]["accuracy"], second["direct"]["accuracy"]),
        "gain": paired_interval(first["gain"], second["gain"]),
        "unparsable": paired_interval(first["reasoned"]["unparsable"], second["reasoned"]["unparsable"]),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Format the summary as a Markdown table, with the paper's Table 6."""
    lines = [
        "| method | lr | direct, % | reasoned, % | less MPO, points | unparsable, % | tokens | margin | paper: direct | reasoned |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, numbers in summary["methods"].items():
        title, paper = ("warmed-up model", (59.3, 57.0)) if name == "warm_up" else (METHODS[name].title, METHODS[name].paper)
        cells = [
            title,
            f"{numbers['learning_rate']:.0e}" if numbers["learning_rate"] else "-",
            *(f"{100 * np.mean(numbers[form]['accuracy']):.1f}" for form in PROMPTS),
            "-" if name == AGAINST else points(numbers["against_mpo"]["reasoned"]),
            f"{100 * np.mean(numbers['reasoned']['unparsable']):.1f}",
            f"{np.mean(numbers['reasoned']['tokens']):.0f}",
            f"{np.mean(numbers['margin']):.2f}",
            *(f"{value:.1f}" for value in paper or ()),
            *([] if paper else ["-", "-"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| claim | reasoned, points | reasoned less direct, points | unparsable, points |", "|---|---|---|---|"]
    for claim, found in summary["claims"].items():
        lines.append(f"| {claim} | {' | '.join(points(found[name]) for name in ('reasoned', 'gain', 'unparsable'))} |")
    return "\n".join(lines)


def points(interval: Mapping[str, float | None]) -> str:
    """Format an interval in percentage points."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    assert mean is not None
    return f"{100 * mean:+.1f}" + ("" if low is None or high is None else f" ({100 * low:+.1f} to {100 * high:+.1f})")


def plot(summary: Mapping[str, Any], path: Path) -> None:
    """Plot direct and reasoned accuracy of every method, a dot per seed and a line for their mean."""
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    all_axes = figure.subplots(1, len(PROMPTS), sharey=True)
    names = list(summary["methods"])[::-1]
    for axes, form in zip(all_axes, PROMPTS, strict=True):
        for place, name in enumerate(names):
            values = [100 * value for value in summary["methods"][name][form]["accuracy"]]
            colour = "#2563a8" if name == AGAINST else "#52606d"
            axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.5, ms=4)
            axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=colour, lw=2)
        axes.axvline(100 * np.mean(summary["methods"][AGAINST][form]["accuracy"]), color="#2563a8", lw=0.8, ls=":", zorder=0)
        axes.set_title(f"{form} responses", fontsize=10)
        axes.set_xlabel("right, %")
        axes.spines[["top", "right"]].set_visible(False)
    titles = {name: method.title for name, method in METHODS.items()}
    all_axes[0].set_yticks(range(len(names)), [titles.get(name, "warmed-up model") for name in names])
    figure.savefig(path, dpi=130)
