"""The plots of the report, each a PNG as a data URL."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mpo.demo.data import KINDS
from mpo.evaluation.statistics import wilson_interval
from mpo.figure import new_figure, png_of

BEFORE, AFTER, THIRD, GREY, INK = "#9aa5b1", "#2563a8", "#c2571a", "#52606d", "#1f2933"


def accuracy_figure(models: Mapping[str, Mapping[str, Any]]) -> str:
    """Plot the evaluation accuracy of three models, with 95 % intervals: all questions, each kind, and reading.

    Args:
        models: results of their evaluations, by label.
    """
    figure, axes = _figure()
    for offset, colour, (label, found) in zip((-0.27, 0, 0.27), (BEFORE, THIRD, AFTER), models.items(), strict=True):
        asked = [name for name in KINDS if found["kinds"][name][1]]
        counts = [(found["correct"], found["total"]), *(found["kinds"][name] for name in asked), (found["read"], found["total"])]
        shares = np.array([100 * right / total for right, total in counts])
        low, high = 100 * np.array([wilson_interval(right, total) for right, total in counts]).T
        whiskers = {"ecolor": INK, "capsize": 3, "lw": 1}
        positions = np.arange(len(counts)) + offset
        axes.bar(positions, shares, 0.26, color=colour, label=label, yerr=[shares - low, high - shares], error_kw=whiskers)
        for position, share, top in zip(positions, shares, high, strict=True):
            axes.annotate(f"{share:.0f}", (position, top), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
        axes.set_xticks(range(len(counts)), ["all questions", *asked, "digits read"])
    axes.set_ylim(0, 108)
    axes.set_ylabel("correct, %")
    return _as_url(figure)


def curves_figure(log: Sequence[Mapping[str, float]], curves: Mapping[str, tuple[str, str]], unit: str = "") -> str:
    """Plot metrics over the steps of training.

    Args:
        log: lines with a step and metrics.
        curves: label and colour of each metric. That of the pairs ranked rightly has an axis of its own, on the right.
        unit: of the others.
    """
    figure, axes = _figure()
    axes.axhline(0, color="#cbd2d9", lw=0.8, zorder=0)
    axes.set_ylabel(unit)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for metric, (label, colour) in curves.items():
        on = axes
        if metric == "rewards/accuracies":
            on = axes.twinx()
            on.spines["top"].set_visible(False)
            on.set_ylim(0, 1.05)
        shown = [line for line in log if metric in line]
        on.plot([line["step"] for line in shown], [line[metric] for line in shown], color=colour, label=label, lw=1.5)
    return _as_url(figure)


def _figure() -> tuple[Figure, Axes]:
    figure = new_figure(5.6, 3.2)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _as_url(figure: Figure) -> str:
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    return png_url(png_of(figure, dpi=160))


def png_url(png: bytes) -> str:
    """Encode a PNG as a data URL, to embed it in a page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
