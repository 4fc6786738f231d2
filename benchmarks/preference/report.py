"""Tables and plots of what is done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t

COLOURS = {"sft": "#52606d", "mpo": "#2563a8", "dpo": "#c2571a"}
Result = Mapping[str, Any]


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of a folder by name; those of starts begin with `start_`."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def share(result: Result, part: slice) -> float:
    """Percentage of right responses to a part of the evaluation questions."""
    correct = result["correct"][part]
    return float(100 * correct.count("1") / len(correct))


def explored(results: Path, output: IO[str]) -> None:
    """Write the exploration's table and plots."""
    found = read(results / "explore")
    part = slice(0, 500)
    lines = [
        "| job | greedy, % | sampled, % | short | chosen | rejected | before, at, after the first difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in found.items():
        cells = [name, f"{share(result, part):.1f}", f"{100 * result['sampled']:.1f}", str(result["short"])]
        if "probe" in result:
            last = result["probe"][-1]
            cells += [f"{value:+.2f}" for value in last["sum"]]
            cells.append("; ".join(" ".join(f"{last[key][side]:+.2f}" for key in ("before", "first", "after")) for side in (0, 1)))
        else:
            cells += ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    output.write("\n".join(lines) + "\n")
    _plot_rates(found, results / "rates.png")
    _plot_moved(found, results / "moved.png")


def _axes(columns: int, height: float = 3.0) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(4 * columns, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
    return figure, axes


def _rates(found: Mapping[str, Result], task: str, method: str) -> list[Result]:
    chosen = [result for name, result in found.items() if name.startswith(f"rate_{task}_{method}_")]
    return sorted(chosen, key=lambda result: result["job"]["rate"])


def _tasks(found: Mapping[str, Result]) -> list[str]:
    present = {result["task"] for name, result in found.items() if name.startswith("rate_")}
    return [task for task in ("reason", "cool", "strategy") if task in present]


def _plot_rates(found: Mapping[str, Result], path: Path) -> None:
    tasks = _tasks(found)
    figure, all_axes = _axes(len(tasks))
    for axes, task in zip(all_axes, tasks, strict=True):
        for method, colour in COLOURS.items():
            runs = _rates(found, task, method)
            values = [share(run, slice(0, 500)) for run in runs]
            axes.semilogx([run["job"]["rate"] for run in runs], values, "o-", color=colour, label=method.upper(), ms=4)
        start = next(result for name, result in found.items() if name.startswith(f"start_{task}_"))
        axes.axhline(share(start, slice(0, 500)), color="#9aa5b1", ls=":", label="start")
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("learning rate", fontsize=8)
    all_axes[0].set_ylabel("right, greedy, %", fontsize=8)
    all_axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def _plot_moved(found: Mapping[str, Result], path: Path) -> None:
    """Plot the change of log-probs on evaluation pairs against the rate: chosen, rejected, and the tokens before they differ."""
    tasks = _tasks(found)
    figure, all_axes = _axes(len(tasks))
    for axes, task in zip(all_axes, tasks, strict=True):
        for method, colour in COLOURS.items():
            runs = _rates(found, task, method)
            rates = [run["job"]["rate"] for run in runs]
            for side, style in ((0, "o-"), (1, "x--")):
                axes.semilogx(rates, [run["probe"][-1]["sum"][side] for run in runs], style, color=colour, ms=4, lw=1)
            axes.semilogx(rates, [run["probe"][-1]["before"][0] for run in runs], ":", color=colour, lw=1)
        axes.axhline(0, color="#9aa5b1", lw=0.8)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel("learning rate", fontsize=8)
    all_axes[0].set_ylabel("change of log-prob, nats", fontsize=8)
    for style, label in (("o-", "chosen"), ("x--", "rejected"), (":", "shared tokens before")):
        all_axes[0].plot([], [], style, color="black", label=label, ms=4, lw=1)
    all_axes[0].legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=100)


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of differences over seeds with Student's 95 % interval; infinite for one seed."""
    mean, seeds = float(np.mean(differences)), len(differences)
    if seeds < 2:
        return mean, -math.inf, math.inf
    half = float(t.ppf(0.975, seeds - 1) * np.std(differences, ddof=1) / math.sqrt(seeds))
    return mean, mean - half, mean + half


def report(results: Path, output: IO[str]) -> None:
    """Write everything that is done so far."""
    explored(results, output)
