"""Confidence intervals of a mean score and of its change, and tests of the change."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest, norm  # type: ignore[import-untyped]

RESAMPLES = 10_000


def wilson_interval(successes: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a proportion (E. B. Wilson, 1927).

    Args:
        successes: number of successful trials; a fraction for an effective number of trials (`clustered_interval`).
        trials: number of trials.
        confidence: of the interval.

    Returns:
        Lower and upper bound, between 0 and 1.

    Raises:
        ValueError: for less than one trial, or successes outside 0 to `trials`.

    >>> low, high = wilson_interval(50, 100)
    >>> round(low, 3), round(high, 3)
    (0.404, 0.596)
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"Expected trials >= 1 and 0 <= successes <= trials; got successes={successes}, trials={trials}.")
    z = _quantile(confidence)
    share = successes / trials
    spread = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / spread
    half_width = z / spread * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    # The formula gives exactly 0 and 1 here, but for rounding.
    return 0.0 if successes == 0 else centre - half_width, 1.0 if successes == trials else centre + half_width


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"Expected confidence between 0 and 1, such as 0.95; got {confidence!r}.")
    return float(norm.ppf(0.5 + confidence / 2))


def clustered_interval(scores: Sequence[float], clusters: Sequence[Any], *, confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of a mean of scores of which those of a cluster, such as an image, are not independent.

    It is Wilson's at the effective sample size: that at which independent trials would have the cluster-robust variance of the
    mean (E. L. Korn and B. I. Graubard, 1998), at most the number of scores. Scores that are all equal count once per cluster.

    Args:
        scores: each from 0 to 1.
        clusters: the cluster of each, in the same order.
        confidence: of the interval.

    Raises:
        ValueError: without scores, for other lengths, and for a score outside 0 to 1.

    >>> low, high = clustered_interval([1, 1, 0, 0], "aabb")
    >>> round(low, 2), round(high, 2)
    (0.05, 0.95)
    """
    values = _checked(scores, clusters)
    mean, (sums, sizes) = float(values.mean()), _by_cluster(values, clusters)
    groups, spread = len(sums), mean * (1 - mean)
    variance = groups / max(groups - 1, 1) * float(((sums - mean * sizes) ** 2).sum()) / len(values) ** 2
    trials = groups if variance <= 1e-15 else min(spread / variance, len(values))
    return wilson_interval(mean * max(trials, 1.0), max(trials, 1.0), confidence=confidence)


def _checked(scores: Sequence[float], clusters: Sequence[Any]) -> Any:
    values = np.asarray(scores, float)
    if not len(values) or len(values) != len(clusters) or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"Expected scores from 0 to 1, at least one, each with its cluster; got {scores!r:.80}.")
    return values


def _by_cluster(values: Any, clusters: Sequence[Any]) -> tuple[Any, Any]:
    numbers: dict[Any, int] = {}
    which = np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], int)
    return np.bincount(which, values), np.bincount(which).astype(float)


@dataclass(frozen=True)
class PairedComparison:
    """The comparison of two measurements on the same questions.

    Attributes:
        gained: questions with a higher score after: incorrect before and correct after.
        lost: questions with a lower one.
        p_value: probability of a change of the mean at least this large when the change of each cluster is as likely its opposite.
    """

    gained: int
    lost: int
    p_value: float


def compare_paired(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[Any] | None = None, *, seed: int = 0
) -> PairedComparison:
    """Are gains and losses more uneven than by chance? A test that turns the signs of the changes of clusters (R. A. Fisher, 1935).

    Exact where all changes are of one size (for clusters of one question McNemar's test, 1947), otherwise 10,000 random turns.

    Args:
        before: the score of each question before, or whether it was correct.
        after: the same after, in the same order.
        clusters: what is not independent, such as the image, for each question; None: every question is.

    Raises:
        ValueError: when the lengths differ.

    >>> compare_paired([True, False, False, False], [True, True, True, True])
    PairedComparison(gained=3, lost=0, p_value=0.25)
    >>> compare_paired([True, False, False, False], [True, True, True, True], "abbb")
    PairedComparison(gained=3, lost=0, p_value=1.0)
    """
    clusters = range(len(before)) if clusters is None else clusters
    if not len(before) == len(after) == len(clusters):
        raise ValueError(f"Expected results of the same questions; got {len(before)} results before and {len(after)} after.")
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    sums = _by_cluster(np.asarray(after, float) - np.asarray(before, float), clusters)[0].round(9)
    sums = sums[sums != 0]
    if len({*np.abs(sums)}) < 2:
        p_value = float(binomtest(int((sums > 0).sum()), len(sums)).pvalue) if len(sums) else 1.0
    else:
        as_large, least = 0, abs(sums.sum()) - 1e-9
        for count, generator in _blocks(len(sums), seed):
            turned = np.where(generator.random((count, len(sums))) < 0.5, sums, -sums).sum(1)
            as_large += int((np.abs(turned) >= least).sum())
        p_value = (as_large + 1) / (RESAMPLES + 1)
    return PairedComparison(gained, lost, p_value)


def _blocks(width: int, seed: int) -> Iterator[tuple[int, Any]]:
    """The resamples in blocks that fit into memory: how many, and the generator of their random numbers."""
    generator, block = np.random.default_rng(seed), max(1, 2_000_000 // width)
    for start in range(0, RESAMPLES, block):
        yield min(block, RESAMPLES - start), generator


def difference_interval(
    before: Sequence[float], after: Sequence[float], clusters: Sequence[Any], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the difference of two mean scores of the same questions: a paired bootstrap over clusters.

    Args:
        before: a score for each question.
        after: the same after, in the same order.
        clusters: what is drawn together, such as the image, for each question.
        confidence: of the interval.
        seed: of the 10,000 draws.

    Returns:
        Lower and upper bound of the mean of `after` minus that of `before`.

    Raises:
        ValueError: as `clustered_interval`.

    >>> difference_interval([0, 0, 0, 0], [1, 1, 1, 1], "abcd")
    (1.0, 1.0)
    """
    _quantile(confidence)
    sums, sizes = _by_cluster(_checked(after, clusters) - _checked(before, clusters), clusters)
    means: list[Any] = []
    for count, generator in _blocks(len(sums), seed):
        drawn = generator.integers(0, len(sums), (count, len(sums)))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Adjust p-values of several tests, so that the chance of any false one stays at the level (S. Holm, 1979).

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted, largest = {}, 0.0
    for place, (name, value) in enumerate(sorted(p_values.items(), key=lambda one: one[1])):
        largest = max(largest, min(1.0, value * (len(p_values) - place)))
        adjusted[name] = largest
    return adjusted


def smallest_difference(questions: int, *, changed: float = 0.2, confidence: float = 0.95, power: float = 0.8) -> float:
    """The smallest difference of two accuracies that a paired comparison is likely to show.

    No more verdicts can be better than change: of few questions, as many must change as the difference says.

    Args:
        questions: number of independent questions: of images, where several questions share one.
        changed: the expected fraction of questions whose verdict changes.
        confidence: of the test.
        power: probability that the test shows a difference of this size.

    >>> round(smallest_difference(1000), 3)
    0.04
    """
    if questions < 1 or not 0 < changed <= 1 or not 0 < power < 1:
        said = f"questions={questions}, changed={changed}, power={power}"
        raise ValueError(f"Expected questions >= 1, changed above 0, at most 1, and power between 0 and 1; got {said}.")
    quantiles = _quantile(confidence) + float(norm.ppf(power))
    least = quantiles * math.sqrt(changed / questions)
    return min(1.0, max(least, least**2 / changed))
