"""The plots of the report."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpo.demo.data import KINDS
from mpo.evaluation.statistics import wilson_interval

BEFORE, AFTER, THIRD, GREY = "#9aa5b1", "#2563a8", "#c2571a", "#52606d"


def accuracy_figure(before: Mapping[str, Any], sft: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Plot the evaluation accuracy of start, control and MPO, with 95 % intervals: all questions, each kind, and reading.

    Args:
        before: results of the stage `before`.
        sft: results of the stage `control`.
        after: results of the stage `after`.

    Returns:
        A PNG as a data URL, like every function here.
    """
    asked = [name for name in KINDS if before["kinds"][name][1]]
    figure, axes = _figure()
    for offset, found, colour, label in (
        (-0.27, before, BEFORE, "start"),
        (0, sft, THIRD, "SFT (control)"),
        (0.27, after, AFTER, "MPO"),
    ):
        counts = [(found["correct"], found["total"]), *(found["kinds"][name] for name in asked), (found["read"], found["total"])]
        shares = np.array([100 * right / total for right, total in counts])
        low, high = 100 * np.array([wilson_interval(right, total) for right, total in counts]).T
        positions = np.arange(len(counts)) + offset
        whiskers = {"ecolor": "#1f2933", "capsize": 3, "lw": 1}
        axes.bar(positions, shares, 0.26, color=colour, label=label, yerr=[shares - low, high - shares], error_kw=whiskers)
        for position, share, top in zip(positions, shares, high, strict=True):
            axes.annotate(f"{share:.0f}", (position, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xticks(range(len(asked) + 2), ["all questions", *asked, "digits read"])
    axes.set_ylim(0, 108)
    axes.set_ylabel("correct, %")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3, frameon=False)
    return _as_url(figure)


def terms_figure(log: Sequence[Mapping[str, float]]) -> str:
    """Plot the weighted loss and each unweighted term over the steps of MPO training."""
    figure, axes = _figure()
    _line(axes, log, "loss", "loss = 0.2 preference + 0.05 quality + generation", "#1f2933")
    _line(axes, log, "loss/sigmoid", "preference (DPO)", AFTER)
    _line(axes, log, "loss/bco_pair", "quality (BCO)", THIRD)
    _line(axes, log, "loss/sft", "generation (SFT)", GREY)
    axes.set_ylim(0, 1.45 * axes.get_ylim()[1])  # room for the legend
    axes.set_ylabel("nats")
    axes.legend(fontsize=8, frameon=False, loc="upper right")
    return _as_url(figure)


def rewards_figure(log: Sequence[Mapping[str, float]]) -> str:
    """Plot the rewards of chosen and rejected completions, and the reward shift delta."""
    figure, axes = _figure()
    _line(axes, log, "rewards/chosen", "reward of chosen", AFTER)
    _line(axes, log, "rewards/rejected", "reward of rejected", THIRD)
    _line(axes, log, "reward_shift", "reward shift delta (running mean)", "#1f2933", style="--")
    axes.axhline(0, color="#cbd2d9", lw=0.8, zorder=0)
    axes.legend(fontsize=8, frameon=False)
    return _as_url(figure)


def margin_figure(log: Sequence[Mapping[str, float]]) -> str:
    """Plot the reward margin, and the fraction of pairs whose chosen completion has the higher reward."""
    figure, axes = _figure()
    _line(axes, log, "rewards/margins", "margin (left)", AFTER)
    axes.axhline(0, color="#cbd2d9", lw=0.8, zorder=0)
    axes.set_ylabel("margin")
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    _line(right, log, "rewards/accuracies", "chosen above rejected (right)", GREY)
    right.set_ylim(0, 1.05)
    axes.legend(handles=[*axes.get_lines()[:1], *right.get_lines()], fontsize=8, frameon=False, loc="lower right")
    return _as_url(figure)


def _line(axes: Axes, log: Sequence[Mapping[str, float]], key: str, label: str, colour: str, style: str = "-") -> None:
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    axes.plot([step for step, _ in points], [value for _, value in points], style, color=colour, label=label, lw=1.5)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _as_url(figure: Figure) -> str:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=160)
    return png_url(png.getvalue())


def png_url(png: bytes) -> str:
    """Encode a PNG as a data URL, to embed it in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
