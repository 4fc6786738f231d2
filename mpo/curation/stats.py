"""Compute statistics of pairs, by source, and show them as text or as a page: lengths, tiles, differences between completions."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset, Value
from numpy.typing import NDArray

from mpo.curation.dedupe import texts
from mpo.curation.show import html_page, png_url
from mpo.data.eval_part import content_keys, content_text, per_record
from mpo.data.similar import normalised, overlap
from mpo.figure import new_figure
from mpo.visible import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Numbers = NDArray[Any]
WORDS = ("question", "chosen", "rejected")
POINTS = (0, 0.05, 0.5, 0.95, 1)
QUANTILES = ("min", "5 %", "median", "95 %", "max")
"""Names of the quantiles at `POINTS`."""
CHOSEN, REJECTED, GREY = "#2563a8", "#c2571a", "#9aa5b1"
MAX_SOURCES = 20
"""Maximum number of sources in the plot of length differences; the largest are shown."""


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of N pairs, each array of shape (N,)."""

    source: NDArray[np.str_]
    prompts: int  # number of distinct prompts (question and images)
    images: Numbers  # number of images
    words: dict[str, Numbers]  # number of words of question, chosen and rejected
    overlap: Numbers  # Jaccard overlap of the words of both completions
    tokens: dict[str, Numbers]  # number of a model's tokens of prompt, chosen and rejected; empty without a model
    tiles: Numbers | None  # number of tiles of the images; None without a model

    @property
    def unit(self) -> str:
        """Unit of the completions' lengths."""
        return "tokens" if self.tokens else "words"

    @property
    def gap(self) -> Numbers:
        """Length of the chosen minus the rejected completion, in `unit`, shape (N,)."""
        lengths = self.tokens or self.words
        gap: Numbers = lengths["chosen"].astype(np.int64) - lengths["rejected"]
        return gap

    def measures(self) -> dict[str, Numbers]:
        """All measures with one number per pair, by name."""
        found = {f"{name}, words": values for name, values in self.words.items()}
        found |= {f"{name}, tokens": values for name, values in self.tokens.items()}
        found |= {f"chosen - rejected, {self.unit}": self.gap, "overlap of words": self.overlap, "images": self.images}
        return found if self.tiles is None else {**found, "tiles": self.tiles}

    def by_source(self) -> list[tuple[str, NDArray[np.int64]]]:
        """Every source with the indices of its pairs, the largest source first."""
        names, inverse = np.unique(self.source, return_inverse=True)
        groups = [(str(name), np.flatnonzero(inverse == place)) for place, name in enumerate(names)]
        return sorted(groups, key=lambda group: -len(group[1]))


def compute_stats(pairs: Dataset, processor: Any = None, *, num_proc: int | None = None) -> Stats:
    """Compute the statistics of pairs.

    Args:
        processor: a model's processor or tokenizer, for tokens and tiles.
        num_proc: number of processes that read the records.

    Raises:
        ValueError: for a record that cannot be encoded.
    """
    features = {**{name: Value("int32") for name in (*WORDS, "images")}, "overlap": Value("float32")}
    columns = ["prompt", "chosen", "rejected", "images"]
    found = per_record(pairs, columns, _count, features, ("stats", 1), "Counting words", num_proc)
    column = {name: np.asarray(found.data.column(name).to_numpy()) for name in features}
    tokens, tiles = {}, None
    if processor is not None:
        from mpo.encoding.costs import measure

        costs = measure(pairs, processor, num_proc=num_proc)
        tokens, tiles = {"prompt": costs.prompt, "chosen": costs.chosen, "rejected": costs.rejected}, costs.tiles
    keys = content_keys(pairs, num_proc=num_proc).data
    prompts = {(one, *own) for one, own in zip(*(keys.column(name).to_pylist() for name in ("question", "images")), strict=True)}
    sources = pairs.select_columns(["source"])[:]["source"] if "source" in pairs.column_names else [None] * len(pairs)
    return Stats(
        source=np.array([name or "(no source)" for name in sources], dtype=str),
        prompts=len(prompts),
        images=column["images"],
        words={name: column[name] for name in WORDS},
        overlap=column["overlap"],
        tokens=tokens,
        tiles=tiles,
    )


def _count(record: dict[str, Any]) -> dict[str, Any]:
    written = texts(record)
    chosen, rejected = (np.unique(np.array(normalised(text).split() or [""])) for text in written[1:])
    words = {name: len(text.split()) for name, text in zip(WORDS, written, strict=True)}
    return {**words, "images": len(record.get("images") or ()), "overlap": overlap(chosen, rejected)}


def conversation_stats(records: Dataset, processor: Any = None, *, num_proc: int | None = None) -> dict[str, Any]:
    """Statistics of conversations: of all, per measure, and per source; arguments and errors as in `compute_stats`."""
    features = {name: Value("int32") for name in ("turns", "user, words", "assistant, words", "images")}
    found = per_record(records, ["messages", "images"], _count_turns, features, ("turns", 1), "Counting words", num_proc)
    measures = {name: np.asarray(found.data.column(name).to_numpy()) for name in features}
    if processor is not None:
        from mpo.encoding.costs import measure
        from mpo.encoding.turns import CONVERSATION

        costs = measure(records, processor, num_proc=num_proc, sides=CONVERSATION)
        measures |= {"tokens": costs.tokens(), "tiles": costs.tiles}
    sources = records.select_columns(["source"])[:]["source"] if "source" in records.column_names else [None] * len(records)
    names, inverse = np.unique(np.array([name or "(no source)" for name in sources], dtype=str), return_inverse=True)
    own = [
        {
            "source": str(name),
            "conversations": int((inverse == place).sum()),
            **{measure: float(values[inverse == place].mean()) for measure, values in measures.items()},
        }
        for place, name in enumerate(names)
    ]
    return {
        "conversations": len(records),
        "conversations_with_images": int((measures["images"] > 0).sum()),
        "images": int(measures["images"].sum()),
        "measures": _summary(measures),
        "sources": sorted(own, key=lambda one: -one["conversations"]),
    }


def conversation_text(found: dict[str, Any]) -> str:
    """Format `conversation_stats` as tables for a terminal; of a source, means."""
    with_images = f"{found['conversations_with_images']:,} with images ({found['images']:,} images)"
    head = f"{found['conversations']:,} conversations, {with_images}"
    measures = [("", "mean", *QUANTILES), *((name, *map(_number, of.values())) for name, of in found["measures"].items())]
    sources = [tuple(found["sources"][0]), *((one["source"], *map(_number, list(one.values())[1:])) for one in found["sources"])]
    return "\n\n".join([head, table(measures), table(sources)])


def _count_turns(record: dict[str, Any]) -> dict[str, int]:
    words: dict[str, int] = dict.fromkeys(("user", "assistant"), 0)
    for message in record["messages"]:
        words[message["role"]] = words.get(message["role"], 0) + len(content_text(message["content"]).split())
    turns = sum(message["role"] == "assistant" for message in record["messages"])
    own = {f"{role}, words": words[role] for role in ("user", "assistant")}
    return {"turns": turns, **own, "images": len(record.get("images") or ())}


def _summary(measures: dict[str, Numbers]) -> dict[str, dict[str, float]]:
    return {
        name: {"mean": float(values.mean()), **dict(zip(QUANTILES, map(float, np.quantile(values, POINTS)), strict=True))}
        for name, values in measures.items()
    }


def stats_data(stats: Stats) -> dict[str, Any]:
    """Summarize statistics as numbers: of all pairs, per measure (mean, minimum, quantiles, maximum) and per source."""
    lengths = stats.tokens or stats.words
    return {
        "pairs": len(stats.source),
        "prompts": stats.prompts,
        "pairs_with_images": int((stats.images > 0).sum()),
        "images": int(stats.images.sum()),
        "measures": _summary(stats.measures()),
        "sources": [
            {
                "source": name,
                "pairs": len(places),
                "fraction": len(places) / len(stats.source),
                f"chosen, {stats.unit}": float(lengths["chosen"][places].mean()),
                f"rejected, {stats.unit}": float(lengths["rejected"][places].mean()),
                "chosen longer": float((stats.gap[places] > 0).mean()),
                "overlap": float(stats.overlap[places].mean()),
            }
            for name, places in stats.by_source()
        ],
    }


def stats_text(stats: Stats) -> str:
    """Format statistics as tables for a terminal."""
    found = stats_data(stats)
    count, prompts = found["pairs"], found["prompts"]
    head = (
        f"{count:,} pairs of {prompts:,} prompts ({count / max(prompts, 1):.1f} pairs per prompt), "
        f"{found['pairs_with_images']:,} with images ({found['images']:,} images)"
    )
    measures = [("", "mean", *QUANTILES), *((name, *map(_number, of.values())) for name, of in found["measures"].items())]
    formats: Any = (str, "{:,}".format, "{:.1%}".format, _number, _number, "{:.0%}".format, "{:.2f}".format)
    sources = [tuple(found["sources"][0])]
    for one in found["sources"]:
        sources.append(tuple(write(value) for write, value in zip(formats, one.values(), strict=True)))
    return "\n\n".join([head, table(measures), table(sources)])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.2f}"


# As a page


def stats_page(stats: Stats, title: str) -> str:
    """Build a self-contained HTML page with the tables of `stats_text` and plots.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    plots = "\n".join(
        f'<figure><img alt="{name}" src="{png_url(figure.savefig, dpi=130)}"><figcaption>{name}</figcaption></figure>'
        for name, figure in ((escape(name), figure) for name, figure in stats_figures(stats).items())
    )
    return html_page(title, f'<pre>{escape(stats_text(stats))}</pre>\n<div class="figures">\n{plots}\n</div>')


def stats_figures(stats: Stats) -> dict[str, Figure]:
    """Draw the plots of `stats_page`, by title; a notebook shows each.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    figures = {
        "Length of completions": _lengths(stats),
        "Length of the chosen minus the rejected completion": _gaps(stats),
        "Words that both completions share": _histogram(stats.overlap, "shared words over all words", whole=False),
        "Length of prompts": _histogram(stats.tokens.get("prompt", stats.words["question"]), f"{stats.unit} of a prompt"),
    }
    if stats.tiles is not None and stats.tiles.any():
        figures["Tiles"] = _histogram(stats.tiles, "tiles of a pair's images")
    elif stats.images.any():
        figures["Images"] = _histogram(stats.images, "images of a pair")
    return figures


def _lengths(stats: Stats) -> Figure:
    lengths = stats.tokens or stats.words
    most = max(float(np.quantile(np.concatenate([lengths["chosen"], lengths["rejected"]]), 0.995)), 1.0)
    figure, axes = _figure()
    for side, colour in (("chosen", CHOSEN), ("rejected", REJECTED)):
        shown = np.minimum(lengths[side], most)
        axes.hist(shown, np.linspace(0, most, 50), histtype="step", lw=1.6, color=colour, label=side)
    axes.set_xlabel(f"{stats.unit} (the longest 0.5 % in the last bar)")
    axes.set_ylabel("pairs")
    axes.legend(frameon=False)
    return figure


def _gaps(stats: Stats) -> Figure:
    groups = stats.by_source()[:MAX_SOURCES]
    figure, axes = _figure(height=max(3.2, 0.32 * len(groups) + 1.2))
    look = {"showfliers": False, "patch_artist": True, "boxprops": {"facecolor": "#dbe7f3", "edgecolor": CHOSEN}}
    axes.boxplot([stats.gap[places] for _, places in groups], orientation="horizontal", **look)
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
    figure = new_figure(5.6, height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
