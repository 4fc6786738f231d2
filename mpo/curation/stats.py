"""Compute statistics of pairs: lengths, tiles, differences between chosen and rejected completions, by source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from mpo.curation.dedupe import texts
from mpo.curation.similar import normalised, overlap
from mpo.data.eval_part import content_keys, encoded
from mpo.visible import table

Numbers = NDArray[Any]
WORDS = ("question", "chosen", "rejected")


@dataclass(frozen=True, eq=False)
class Stats:
    """Statistics of N pairs.

    Attributes:
        source: source of each pair, shape (N,).
        prompts: number of distinct prompts (question and images).
        images: number of images of each pair, shape (N,).
        words: number of words of ``question``, ``chosen`` and ``rejected``, each shape (N,).
        overlap: Jaccard overlap of the words of both completions, shape (N,).
        tokens: number of a model's tokens of ``prompt``, ``chosen`` and ``rejected``, each shape (N,); empty without a model.
        tiles: number of tiles of each pair's images, shape (N,); None without a model.
    """

    source: NDArray[np.str_]
    prompts: int
    images: Numbers
    words: dict[str, Numbers]
    overlap: Numbers
    tokens: dict[str, Numbers]
    tiles: Numbers | None

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
        pairs: records.
        processor: a model's processor or tokenizer, for tokens and tiles.
        num_proc: number of processes that read the records.

    Raises:
        ValueError: for a record that cannot be encoded.
    """
    bare = encoded(pairs, ["prompt", "chosen", "rejected", "images"])
    features = {**{name: Value("int32") for name in (*WORDS, "images")}, "overlap": Value("float32")}
    found = bare.map(
        _count,
        remove_columns=bare.column_names,
        features=Features(features),
        new_fingerprint=Hasher.hash([bare._fingerprint, "stats", 1]),
        num_proc=num_proc,
        desc="Counting words",
    )
    column = {name: np.asarray(found.data.column(name).to_numpy()) for name in features}
    tokens, tiles = {}, None
    if processor is not None:
        from mpo.encoding.costs import measure

        costs = measure(pairs, processor, num_proc=num_proc)
        tokens, tiles = {"prompt": costs.prompt, "chosen": costs.chosen, "rejected": costs.rejected}, costs.tiles
    keys = content_keys(pairs, num_proc=num_proc)
    prompts = {
        (question, *own)
        for question, own in zip(keys.data.column("question").to_pylist(), keys.data.column("images").to_pylist(), strict=True)
    }
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


def stats_text(stats: Stats) -> str:
    """Format statistics as tables for a terminal."""
    count = len(stats.source)
    imaged = int((stats.images > 0).sum())
    head = (
        f"{count:,} pairs of {stats.prompts:,} prompts ({count / max(stats.prompts, 1):.1f} pairs per prompt), {imaged:,} with "
        f"images ({int(stats.images.sum()):,} images)"
    )
    rows: list[Sequence[str]] = [("", "mean", "min", "5 %", "median", "95 %", "max")]
    for name, values in stats.measures().items():
        quantiles = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
        rows.append((name, *(_number(value) for value in (values.mean(), *quantiles))))
    sources: list[Sequence[str]] = [
        ("source", "pairs", "fraction", f"chosen, {stats.unit}", f"rejected, {stats.unit}", "chosen longer", "overlap")
    ]
    lengths = stats.tokens or stats.words
    for name, places in stats.by_source():
        longer = float((stats.gap[places] > 0).mean())
        means = (_number(lengths[side][places].mean()) for side in ("chosen", "rejected"))
        mean_overlap = f"{stats.overlap[places].mean():.2f}"
        sources.append((name, f"{len(places):,}", f"{len(places) / count:.1%}", *means, f"{longer:.0%}", mean_overlap))
    return "\n\n".join([head, table(rows), table(sources)])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or float(value).is_integer() else f"{value:.2f}"
