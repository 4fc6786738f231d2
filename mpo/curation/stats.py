"""Compute statistics of pairs or conversations, by source, and show them as text or as a page: lengths, tiles, differences."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Value
from numpy.typing import NDArray

from mpo.curation.dedupe import texts
from mpo.curation.show import STYLE, png_url
from mpo.data.eval_part import content_keys, content_text, per_record
from mpo.data.similar import normalised, overlap
from mpo.figure import new_figure
from mpo.pipelines.report import html_page
from mpo.visible import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = NDArray[Any]
SIDES = ("question", "chosen", "rejected")
QUANTILES, POINTS = ("min", "5 %", "median", "95 %", "max"), (0, 0.05, 0.5, 0.95, 1)
CHOSEN, REJECTED, GREY = "#2563a8", "#c2571a", "#9aa5b1"
MAX_SOURCES = 20
"""Maximum number of sources in the plot of length differences; the largest are shown."""
SHARES = {"fraction": "{:.1%}", "chosen longer": "{:.0%}", "overlap": "{:.2f}"}
"""Formats of a source's values that are no lengths or counts."""


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of N records, each array of shape (N,)."""

    records: str  # what they are: pairs or conversations
    unit: str  # of lengths: tokens with a model, else words
    source: NDArray[np.str_]
    prompts: int  # number of distinct prompts (question and images)
    measures: dict[str, Numbers]  # by name

    def side(self, side: str) -> Numbers:
        """Lengths of the chosen or the rejected completions, in `unit`."""
        return self.measures[f"{side}, {self.unit}"]

    @property
    def gap(self) -> Numbers:
        """Length of the chosen minus the rejected completion, in `unit`."""
        return self.side("chosen - rejected")

    def by_source(self) -> list[tuple[str, NDArray[np.int64]]]:
        """Every source with the indices of its records, the largest source first."""
        names, inverse = np.unique(self.source, return_inverse=True)
        groups = [(str(name), np.flatnonzero(inverse == place)) for place, name in enumerate(names)]
        return sorted(groups, key=lambda group: -len(group[1]))


def compute_stats(records: Dataset, processor: Any = None, *, num_proc: int | None = None) -> Stats:
    """Compute the statistics of pairs or conversations.

    Args:
        processor: a model's processor or tokenizer, for tokens and tiles.
        num_proc: number of processes that read the records.

    Raises:
        ValueError: for a record that cannot be encoded.
    """
    is_pair = "messages" not in records.column_names
    words = [f"{side}, words" for side in SIDES] if is_pair else ["turns", "user, words", "assistant, words"]
    features = {**{name: Value("int32") for name in (*words, "images")}, **({"overlap": Value("float32")} if is_pair else {})}
    columns, key = (["prompt", "chosen", "rejected", "images"], "stats") if is_pair else (["messages", "images"], "turns")
    compute = _count if is_pair else _count_turns
    counted = per_record(records, columns, compute, features, (key, 2), "Counting words", num_proc)
    found = {name: np.asarray(counted.data.column(name).to_numpy()) for name in features}
    measures, unit, tiles = {name: found[name] for name in words}, "words", {}
    images = {"images": found["images"]}
    if processor is not None:
        from mpo.encoding.costs import measure
        from mpo.encoding.turns import CONVERSATION
        from mpo.encoding.turns import SIDES as COMPLETIONS

        costs, unit = measure(records, processor, num_proc=num_proc, sides=COMPLETIONS if is_pair else CONVERSATION), "tokens"
        tiles = {"tiles": costs.tiles}
        if is_pair:
            measures |= {f"{name}, tokens": getattr(costs, name) for name in ("prompt", "chosen", "rejected")}
        else:
            images["tokens"] = costs.tokens()
    prompts = 0
    if is_pair:
        gap = measures[f"chosen, {unit}"].astype(np.int64) - measures[f"rejected, {unit}"]
        measures |= {f"chosen - rejected, {unit}": gap, "overlap of words": found["overlap"]}
        keys = content_keys(records, num_proc=num_proc).data
        columns = [keys.column(name).to_pylist() for name in keys.column_names]
        prompts = len({(one, *own) for one, own in zip(*columns, strict=True)})
    sources = records.select_columns(["source"])[:]["source"] if "source" in records.column_names else [None] * len(records)
    named = np.array([name or "(no source)" for name in sources], dtype=str)
    return Stats("pairs" if is_pair else "conversations", unit, named, prompts, {**measures, **images, **tiles})


def _count(record: dict[str, Any]) -> dict[str, Any]:
    written = texts(record)
    chosen, rejected = (np.unique(np.array(normalised(text).split() or [""])) for text in written[1:])
    words = {f"{name}, words": len(text.split()) for name, text in zip(SIDES, written, strict=True)}
    return {**words, "images": len(record.get("images") or ()), "overlap": overlap(chosen, rejected)}


def _count_turns(record: dict[str, Any]) -> dict[str, int]:
    found = {"turns": 0, "user, words": 0, "assistant, words": 0, "images": len(record.get("images") or ())}
    for message in record["messages"]:
        found["turns"] += message["role"] == "assistant"
        if message["role"] in ("user", "assistant"):
            found[f"{message['role']}, words"] += len(content_text(message["content"]).split())
    return found


def stats_data(stats: Stats) -> dict[str, Any]:
    """Summarize statistics as numbers: of all records, per measure (mean, minimum, quantiles, maximum) and per source (means)."""
    measures, count = stats.measures, len(stats.source)
    is_pair = stats.records == "pairs"
    means = measures
    if is_pair:
        means = {f"{side}, {stats.unit}": stats.side(side) for side in ("chosen", "rejected")}
        means |= {"chosen longer": stats.gap > 0, "overlap": measures["overlap of words"]}
    sources = [
        {
            "source": name,
            stats.records: len(places),
            **({"fraction": len(places) / count} if is_pair else {}),
            **{measure: float(values[places].mean()) for measure, values in means.items()},
        }
        for name, places in stats.by_source()
    ]
    return {
        stats.records: count,
        **({"prompts": stats.prompts} if is_pair else {}),
        f"{stats.records}_with_images": int((measures["images"] > 0).sum()),
        "images": int(measures["images"].sum()),
        "measures": {
            name: dict(zip(("mean", *QUANTILES), map(float, [values.mean(), *np.quantile(values, POINTS)]), strict=True))
            for name, values in measures.items()
        },
        "sources": sources,
    }


def stats_text(stats: Stats) -> str:
    """Format statistics as tables for a terminal."""
    found, records = stats_data(stats), stats.records
    head = f"{found[records]:,} {records}"
    if "prompts" in found:
        per_prompt = found[records] / max(found["prompts"], 1)
        head += f" of {found['prompts']:,} prompts ({per_prompt:.1f} pairs per prompt)"
    head += f", {found[f'{records}_with_images']:,} with images ({found['images']:,} images)"
    measures = [("", "mean", *QUANTILES), *((name, *map(_number, of.values())) for name, of in found["measures"].items())]
    sources = [tuple(found["sources"][0])]
    for source, *values in (one.items() for one in found["sources"]):
        sources.append((source[1], *(SHARES[name].format(value) if name in SHARES else _number(value) for name, value in values)))
    return "\n\n".join([head, table(measures), table(sources)])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.2f}"


# As a page


def stats_page(stats: Stats, title: str) -> str:
    """Build a self-contained HTML page of pairs with the tables of `stats_text` and plots; errors as in `stats_figures`."""
    plots = "\n".join(
        f'<figure><img alt="{name}" src="{png_url(figure.savefig, dpi=130)}"><figcaption>{name}</figcaption></figure>'
        for name, figure in stats_figures(stats).items()
    )
    return html_page(title, f'<pre>{escape(stats_text(stats))}</pre>\n<div class="figures">\n{plots}\n</div>', STYLE)


def stats_figures(stats: Stats) -> dict[str, Figure]:
    """Draw the plots of `stats_page`, by title; a notebook shows each. Raises ValueError if matplotlib is not installed."""
    measures = stats.measures
    prompts = measures.get("prompt, tokens", measures["question, words"])
    figures = {
        "Length of completions": _lengths(stats),
        "Length of the chosen minus the rejected completion": _gaps(stats),
        "Words that both completions share": _histogram(measures["overlap of words"], "shared words over all words", whole=False),
        "Length of prompts": _histogram(prompts, f"{stats.unit} of a prompt"),
    }
    for name, title, label in (("tiles", "Tiles", "tiles of a pair's images"), ("images", "Images", "images of a pair")):
        if name in measures and measures[name].any():
            return {**figures, title: _histogram(measures[name], label)}
    return figures


def _lengths(stats: Stats) -> Figure:
    most = max(float(np.quantile(np.concatenate([stats.side("chosen"), stats.side("rejected")]), 0.995)), 1.0)
    figure, axes = _figure(f"{stats.unit} (the longest 0.5 % in the last bar)")
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        shown = np.minimum(stats.side(side), most)
        axes.hist(shown, np.linspace(0, most, 50), histtype="step", lw=1.6, color=colour, label=side)
    axes.set_ylabel("pairs")
    axes.legend(frameon=False)
    return figure


def _gaps(stats: Stats) -> Figure:
    groups = stats.by_source()[:MAX_SOURCES]
    label = f"{stats.unit} of the chosen minus the rejected completion"
    figure, axes = _figure(label, max(3.2, 0.32 * len(groups) + 1.2))
    look = {"showfliers": False, "patch_artist": True, "boxprops": {"facecolor": "#dbe7f3", "edgecolor": CHOSEN}}
    axes.boxplot([stats.gap[places] for _, places in groups], orientation="horizontal", **look)
    axes.set_yticks(range(1, len(groups) + 1), [name if len(name) <= 28 else name[:25] + "..." for name, _ in groups], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=GREY, lw=0.8, zorder=0)
    return figure


def _histogram(values: Any, label: str, *, whole: bool = True) -> Figure:
    figure, axes = _figure(label)
    low, high = float(values.min()), float(values.max())
    edges = np.unique(np.linspace(low, high + 1, int(min(50, high - low + 1)) + 1).astype(int)) if whole else np.linspace(0, 1, 41)
    axes.hist(values, edges, color=CHOSEN)
    axes.set_ylabel("pairs")
    return figure


def _figure(label: str, height: float = 3.2) -> tuple[Figure, Any]:
    figure = new_figure(5.6, height)
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
