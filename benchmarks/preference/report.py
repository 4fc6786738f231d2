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

from preference import plan

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
    _plot_ways(found, results / "ways.png")


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
    return [task for task in ("reason", "strategy") if task in present]  # "cool" has too few rates for a plot


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


CLAIMS = (
    ("1", "strategy", "mpo_wg_0.1", "sft"),
    ("2", "strategy", "dpo", "sft"),
    ("3", "strategy", "mpo", "sft"),
    ("4", "strategy", "mpo_wg_0.1", "dpo"),
    ("5", "reason", "mpo", "sft"),
    ("6", "reason", "mpo_wg_0.1", "sft"),
    ("7", "reason", "mpo_beta_1", "mpo"),
    ("9", "reason", "mpo_beta_1", "sft"),
    ("8", "strategy", "mpo", "mpo_no_delta"),
    ("8", "reason", "mpo", "mpo_no_delta"),
)
"""The claims of `../methods2.md`: number, task, method, less another one."""
PAPER = {"start": 57.0, "sft": 68.5, "dpo": 72.7, "bco": 78.4, "dpo_sft": 78.9, "bco_sft": 78.4, "mpo": 79.1}
"""Table 6 of arXiv 2411.10442, M3CoT with chain of thought."""


def registered_tables(results: Path, output: IO[str]) -> None:
    """Write the tables of the registered run, of the seeds that are done (every method of a seed), and its plot."""
    found = read(results / "run")
    test = slice(500, 1000)
    of_task: dict[str, dict[str, list[float]]] = {}
    for task in plan.TASKS_REGISTERED:
        rates = {method: plan.tried_rates(results / "run", task, method)[1] for method in plan.REGISTERED}
        if None in rates.values():
            output.write(f"\n{task}: rates are not chosen yet\n")
            continue
        names = {m: {s: plan.registered_job(task, m, r, s).name for s in plan.SEEDS} for m, r in rates.items() if r is not None}
        done = [seed for seed in plan.SEEDS if all(of[seed] in found for of in names.values())]
        output.write(f"\n{task}: seeds {done} of {list(plan.SEEDS)} are done\n\n")
        if not done:
            continue
        runs = {"start": [found[f"start_{task}_{seed}"] for seed in done]}
        runs |= {method: [found[of[seed]] for seed in done] for method, of in names.items()}
        right = of_task[task] = {method: [share(run, test) for run in some] for method, some in runs.items()}
        heads = "method, rate, right %, less SFT, sampled %, without steps %, unparsable %, chosen, rejected, paper".split(", ")
        output.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
        for method, some in runs.items():
            moved = [run["probe"][-1]["sum"] for run in some if "probe" in run]
            cells = [
                method,
                f"{rates[method]:.0e}" if method in rates else "-",
                f"{np.mean(right[method]):.1f}",
                "-" if method == "sft" else points(np.subtract(right[method], right["sft"]).tolist()),
                f"{100 * np.mean([run['sampled'] for run in some]):.1f}",
                *(f"{np.mean([100 * run[key] / len(run['correct']) for run in some]):.1f}" for key in ("short", "unparsable")),
                *([f"{value:+.2f}" for value in np.mean(moved, axis=0)] if moved else ["-", "-"]),
                f"{PAPER[method]:.1f}" if method in PAPER else "-",
            ]
            output.write(f"| {' | '.join(cells)} |\n")
        output.write("\n| claim | difference | points |\n|---|---|---|\n")
        for number, of, first, second in CLAIMS:
            if of == task:
                less = points(np.subtract(right[first], right[second]).tolist())
                output.write(f"| {number} | {first} less {second} | {less} |\n")
    if of_task:
        _plot_registered(of_task, results / "registered.png")


def _plot_registered(of_task: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Plot right responses by method: a dot per seed, joined where it is the same seed, and the mean."""
    figure, all_axes = _axes(len(of_task), height=3.4)
    for axes, (task, right) in zip(all_axes, of_task.items(), strict=True):
        axes.plot(range(len(right)), list(right.values()), "o-", color="#9aa5b1", ms=3, lw=0.5)
        for place, values in enumerate(right.values()):
            axes.plot([place - 0.3, place + 0.3], [np.mean(values)] * 2, color="#2563a8", lw=2.5)
        axes.set_xticks(range(len(right)), list(right), rotation=45, ha="right", fontsize=7)
        axes.set_title(task, fontsize=10)
    all_axes[0].set_ylabel("right, greedy, %", fontsize=8)
    figure.savefig(path, dpi=100)


def points(differences: Sequence[float]) -> str:
    """Format the mean of differences in points with its interval."""
    mean, low, high = interval(differences)
    return f"{mean:+.1f}" + ("" if math.isinf(low) else f" ({low:+.1f} to {high:+.1f})")


def _plot_ways(found: Mapping[str, Result], path: Path) -> None:
    """Plot accuracy and share of responses with steps in the task `strategy`, and the two parts of a gradient by length."""
    shown = {
        "start": "start_strategy_100",
        "SFT": "rate_strategy_sft_3e-04",
        "MPO": "rate_strategy_mpo_3e-04",
        "MPO, SFT by token": "average_strategy_mpo_token_3e-04",
        "MPO, w_g 0.1": "average_strategy_mpo_wg_0.1_1e-04",
        "DPO": "rate_strategy_dpo_1e-04",
    }
    if not all(name in found for name in shown.values()):
        return
    figure, (left, right) = _axes(2)
    for place, name in enumerate(shown.values()):
        run, count = found[name], len(found[name]["correct"])
        left.bar(place - 0.2, share(run, slice(0, 500)), 0.38, color="#2563a8", label="right" if not place else None)
        left.bar(place + 0.2, 100 - 100 * run["short"] / count, 0.38, color="#9aa5b1", label=None if place else "with steps")
    left.set_xticks(range(len(shown)), list(shown), rotation=30, ha="right", fontsize=7)
    left.set_ylabel("greedy responses, %", fontsize=8)
    left.legend(fontsize=8, frameon=False)
    lengths = np.array([4, 600])
    for weight, style in ((1.0, "-"), (0.1, "--")):
        right.loglog(lengths, 0.1 * (0.8 + 0.2) / 2 * lengths / weight, style, color="#2563a8", label=f"w_g = {weight:g}")
    for length, label in ((6, "answer alone"), (36, "with steps"), (300, "the paper's")):
        right.axvline(length, color="#9aa5b1", lw=0.8, ls=":")
        right.text(length, 0.03, label, rotation=90, fontsize=7, color="#52606d", ha="right", transform=right.get_xaxis_transform())
    right.axhline(1, color="#9aa5b1", lw=0.8)
    right.set_xlabel("tokens of a completion", fontsize=8)
    right.set_ylabel("preference / SFT, weight of a token", fontsize=8)
    right.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


def report(results: Path, output: IO[str]) -> None:
    """Write everything that is done so far."""
    explored(results, output)
    registered_tables(results, output)
