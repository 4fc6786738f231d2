"""The sections of the report of a dry run, as text."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mpo.preflight.dry_run.memory import Component, MemoryEstimate
from mpo.preflight.dry_run.parts import Count
from mpo.preflight.dry_run.workload import Workload

BAR = 40
"""Length of a histogram's longest bar in characters."""


def parameters_section(counts: dict[str, Count]) -> str:
    """Show the numbers of parameters by part."""
    rows = [(part, f"{count.total:,}", f"{count.trainable:,}") for part, count in counts.items() if count.total]
    total, trained = (sum(getattr(count, name) for count in counts.values()) for name in ("total", "trainable"))
    rows.append(("total", f"{total:,}", f"{trained:,}"))
    if not counts["LM head"].total:
        rows.append(("(the LM head shares the weights of the input embeddings, which count for the language model)", "", ""))
    return _titled("Parameters", _columns(("", "all", "trained"), rows))


def memory_section(estimate: MemoryEstimate, where: str) -> str:
    """Show the memory estimate by component, and at each point of a step that can be the peak."""

    def rows(components: Iterable[Component]) -> list[tuple[str, str, str]]:
        return [(component.name, size(component.size), component.why) for component in components]

    lines = ["permanent"]
    lines += _columns(None, rows(estimate.fixed), indent=4)
    lines += ["temporary"]
    lines += _columns(None, rows(estimate.passing), indent=4)
    lines += ["temporary memory, by point of the step"]
    lines += _columns(None, [(moment, size(bytes_), "") for moment, bytes_ in estimate.moments.items()], indent=4)
    if estimate.margin:
        lines += ["margin (an allowance)"]
        lines += _columns(None, rows(estimate.margin), indent=4)
    lines.append(f"peak {size(estimate.total)} per rank, at: {estimate.peak_moment}")
    if estimate.unknown:
        lines.append(f"NOT included, no formula: activations of {', '.join(estimate.unknown)}")
    return _titled(f"Memory, {where}", lines)


def work_section(work: Workload, args: Any, ranks: int) -> str:
    """Show the steps, epochs, tokens and tiles of the run."""
    truncated = work.costs.truncate(args.max_length, skip=args.on_bad_record == "skip")
    scale = work.total / len(work.costs) * work.epochs
    about = "about " if work.sampled else ""
    lines = [
        f"{work.total:,} pairs; epochs: {work.epochs:.4g}; steps: {work.steps:,} of {work.pairs_per_step:.4g} pairs "
        f"(micro-batches per step and rank: {args.gradient_accumulation_steps}; ranks: {ranks})",
        f"{about}{int(truncated.tokens().sum() * scale):,} tokens and {int(truncated.tiles.sum() * scale):,} tiles in all epochs "
        "(prompts counted once per pair)",
    ]
    if work.sampled:
        lines.append(
            f"measured on {len(work.costs):,} records, evenly spaced (dry_run_records); the longest record may not be one of them"
        )
    if work.packing is not None:
        lines.append(f"batches: {work.packing}")
    return _titled("Work", lines)


def lengths_section(work: Workload, names: list[str]) -> str:
    """Show histograms of tokens and tiles per record, and the longest records."""
    tokens = work.costs.tokens()
    lines = [*histogram("tokens per record", tokens)]
    if work.costs.tiles.any():
        lines += ["", *histogram("tiles per record", work.costs.tiles, bins=15)]
    lines += ["", "longest records (without truncation)"]
    longest = np.argsort(-tokens, kind="stable")[: len(names)]
    costs = work.costs
    rows = [
        (
            name,
            f"{tokens[index]:,} tokens",
            f"prompt {costs.prompt[index]:,}, completions {costs.chosen[index]:,} and {costs.rejected[index]:,}, "
            f"{costs.tiles[index]} tiles",
        )
        for name, index in zip(names, longest, strict=True)
    ]
    return _titled("Lengths", lines + _columns(None, rows, indent=4))


def histogram(title: str, values: Any, bins: int = 10) -> list[str]:
    r"""Draw a histogram of integers as text.

    >>> print("\n".join(histogram("tiles", np.array([1, 1, 3]))))
    tiles: min 1, median 1, max 3
        1  2 ########################################
        2  0
        3  1 ####################
    """
    low, high = int(values.min()), int(values.max())
    edges = np.unique(np.linspace(low, high + 1, min(bins, high - low + 1) + 1).astype(int))
    counts = [int(((values >= begin) & (values < end)).sum()) for begin, end in zip(edges[:-1], edges[1:], strict=True)]
    ranges = [f"{b:,}" if e - b == 1 else f"{b:,}-{e - 1:,}" for b, e in zip(edges[:-1], edges[1:], strict=True)]
    width, most = max(map(len, ranges)), len(f"{max(counts):,}")
    lines = [f"{title}: min {low:,}, median {int(np.median(values)):,}, max {high:,}"]
    for range_, count in zip(ranges, counts, strict=True):
        bar = "#" * -(-count * BAR // max(counts))
        lines.append(f"    {range_:>{width}}  {count:>{most},} {bar}".rstrip())
    return lines


def size(number: float) -> str:
    """Format bytes in GiB or MiB.

    >>> size(1.5 * 2**30), size(3 * 2**20), size(0)
    ('1.50 GiB', '3.0 MiB', '0')
    """
    if number >= 2**30:
        return f"{number / 2**30:.2f} GiB"
    return f"{number / 2**20:.1f} MiB" if number else "0"


def _titled(title: str, lines: Iterable[str]) -> str:
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def _columns(head: tuple[str, ...] | None, rows: list[tuple[str, str, str]], indent: int = 0) -> list[str]:
    table = ([head] if head else []) + [row for row in rows if any(row[1:])]
    notes = [row[0] for row in rows if not any(row[1:])]
    widths = [max((len(row[column]) for row in table), default=0) for column in range(3)]
    numbers = head is not None  # the last column holds numbers too
    return [
        (
            " " * indent + f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}"
            if numbers
            else " " * indent + f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}"
        )
        for a, b, c in table
    ] + notes
