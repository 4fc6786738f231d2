"""Write statistics as one HTML page with plots."""

from __future__ import annotations

from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from mpo.curation.page import html_page, png_url
from mpo.curation.stats import Stats, stats_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN, REJECTED, GREY = "#2563a8", "#c2571a", "#9aa5b1"
MAX_SOURCES = 20
"""Maximum number of sources in the plot of length differences; the largest are shown."""


def stats_page(stats: Stats, title: str) -> str:
    """Build a self-contained HTML page with the tables of `stats_text` and plots.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError(
            "The page has plots and needs matplotlib, which is not installed. Install it: pip install matplotlib"
        ) from None
    figures = [
        ("Length of completions", _lengths(stats)),
        ("Length of the chosen minus the rejected completion", _gaps(stats)),
        ("Words that both completions share", _histogram(stats.overlap, "shared words over all words", whole=False)),
        ("Length of prompts", _histogram(stats.tokens.get("prompt", stats.words["question"]), f"{stats.unit} of a prompt")),
    ]
    if stats.tiles is not None and stats.tiles.any():
        figures.append(("Tiles", _histogram(stats.tiles, "tiles of a pair's images")))
    elif stats.images.any():
        figures.append(("Images", _histogram(stats.images, "images of a pair")))
    plots = "\n".join(
        f'<figure><img alt="{escape(name)}" src="{_as_url(figure)}"><figcaption>{escape(name)}</figcaption></figure>'
        for name, figure in figures
    )
    return html_page(title, f'<pre>{escape(stats_text(stats))}</pre>\n<div class="figures">\n{plots}\n</div>')


def _lengths(stats: Stats) -> Figure:
    lengths = stats.tokens or stats.words
    figure, axes = _figure()
    most = max(float(np.quantile(np.concatenate([lengths["chosen"], lengths["rejected"]]), 0.995)), 1.0)
    edges = np.linspace(0, most, 50)
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        axes.hist(np.minimum(lengths[side], most), edges, histtype="step", lw=1.6, color=colour, label=side)
    axes.set_xlabel(f"{stats.unit} (the longest 0.5 % in the last bar)")
    axes.set_ylabel("pairs")
    axes.legend(frameon=False)
    return figure


def _gaps(stats: Stats) -> Figure:
    groups = stats.by_source()[:MAX_SOURCES]
    figure, axes = _figure(height=max(3.2, 0.32 * len(groups) + 1.2))
    boxes = axes.boxplot([stats.gap[places] for _, places in groups], orientation="horizontal", showfliers=False, patch_artist=True)
    for box in boxes["boxes"]:
        box.set(facecolor="#dbe7f3", edgecolor=CHOSEN)
    axes.set_yticks(range(1, len(groups) + 1), [name if len(name) <= 28 else name[:25] + "..." for name, _ in groups], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8, zorder=0)
    axes.set_xlabel(f"{stats.unit} of the chosen minus the rejected completion")
    return figure


def _histogram(values: Any, label: str, *, whole: bool = True) -> Figure:
    figure, axes = _figure()
    low, high = float(values.min()), float(values.max())
    edges = np.unique(np.linspace(low, high + 1, int(min(50, high - low + 1)) + 1).astype(int)) if whole else np.linspace(0, 1, 41)
    axes.hist(values, edges, color=CHOSEN)
    axes.set_xlabel(label)
    axes.set_ylabel("pairs")
    return figure


def _figure(height: float = 3.2) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _as_url(figure: Figure) -> str:
    png = BytesIO()
    figure.savefig(png, format="png", dpi=130)
    return png_url(png.getvalue())
