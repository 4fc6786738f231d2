"""How far reviewers agree, and whether they prefer a side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from mpo.review.log import Log, label


def cohens_kappa(one: Sequence[str], other: Sequence[str]) -> float | None:
    """Cohen's kappa of two raters' labels of the same items: agreement beyond chance (Cohen 1960, Educ. Psychol. Meas. 20, 37-46).

    Returns:
        (p_o - p_e) / (1 - p_e), for the observed agreement p_o and that expected of independent raters with the same frequencies
        p_e; None where it is not defined: without items, or if both gave one same label alone.

    >>> cohens_kappa(["a", "a", "b", "b"], ["a", "b", "b", "b"])  # p_o = 3/4, p_e = 1/2 * 1/4 + 1/2 * 3/4 = 1/2
    0.5
    """
    total = len(one)
    if not total:
        return None
    observed = sum(left == right for left, right in zip(one, other, strict=True)) / total
    mine, yours = Counter(one), Counter(other)
    expected = sum(mine[name] * yours[name] for name in mine) / total**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def agreement(log: Log) -> list[dict[str, Any]]:
    """For each two reviewers, what they both decided on, blind: number, fraction of equal labels, Cohen's kappa."""
    labels = list(log.labels(blind=True).values())
    found = []
    for one, other in combinations(sorted({by for own in labels for by in own}), 2):
        both = [(label(own[one]), label(own[other])) for own in labels if one in own and other in own]
        if both:
            equal = sum(left == right for left, right in both) / len(both)
            kappa = cohens_kappa([left for left, _ in both], [right for _, right in both])
            found.append({"reviewers": [one, other], "records": len(both), "equal": equal, "kappa": kappa})
    return found


def disagreements(log: Log) -> list[int]:
    """The records on which reviewers disagree and that nothing has settled, in order."""
    return sorted(place for place, own in log.labels().items() if log.final(place, own) is None)


def position_bias(log: Log) -> dict[str, dict[str, Any]]:
    """For each reviewer, how often the completion on the left was preferred, and how likely so uneven a split is by chance.

    The side of the chosen completion is random, so without a bias half of the preferred ones stand on the left (two-sided exact
    binomial test).
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]  # its imports take half a second

    preferred: dict[str, Counter[str]] = {}
    for own in log.labels(blind=True).values():
        for by, event in own.items():
            if event.get("left") in ("chosen", "rejected") and event["action"] in ("accept", "swap"):
                is_left = (event["left"] == "chosen") == (event["action"] == "accept")
                preferred.setdefault(by, Counter())["left" if is_left else "right"] += 1
    return {
        by: {"pairs": counts.total(), "left": counts["left"], "p": float(binomtest(counts["left"], counts.total()).pvalue)}
        for by, counts in sorted(preferred.items())
    }


def progress(log: Log) -> dict[str, dict[str, int]]:
    """How many records each reviewer has given each label."""
    counts: dict[str, Counter[str]] = {}
    for own in log.labels().values():
        for by, event in own.items():
            counts.setdefault(by, Counter())[label(event)] += 1
    return {by: dict(own) for by, own in sorted(counts.items())}


def summary(log: Log) -> dict[str, Any]:
    """All of it, for a report."""
    return {
        "reviewers": progress(log),
        "agreement": agreement(log),
        "informed": sum(bool(event.get("informed")) for own in log.labels().values() for event in own.values()),
        "disagreements": disagreements(log),
        "position_bias": position_bias(log),
    }


def rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A summary as text: what each row is about, and what it says."""
    said = [(by, ", ".join(f"{count:,} {name}" for name, count in own.items())) for by, own in found["reviewers"].items()]
    for one in found["agreement"]:
        kappa = "not defined" if one["kappa"] is None else f"{one['kappa']:.3f}"
        text = f"{one['records']:,} records, {one['equal']:.1%} alike, Cohen's kappa {kappa}"
        said.append((" and ".join(one["reviewers"]), text))
    if found["informed"]:
        said.append(("changed after others' were told", f"{found['informed']:,} decisions; agreement is of those before"))
    for by, one in found["position_bias"].items():
        said.append((f"{by}, position", f"left preferred in {one['left']:,} of {one['pairs']:,} pairs (p = {one['p']:.2g})"))
    return said
