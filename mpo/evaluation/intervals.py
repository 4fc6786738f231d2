"""Confidence intervals of a proportion and of its change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def wilson_interval(successes: int, trials: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Confidence interval of a proportion (E. B. Wilson, 1927).

    Args:
        successes: number of successful trials.
        trials: number of trials.
        z: quantile of the normal distribution; the default gives 95 %.

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
    share = successes / trials
    spread = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / spread
    half_width = z / spread * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    # The formula gives exactly 0 and 1 here, but for rounding.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == trials else centre + half_width
    return low, high


@dataclass(frozen=True)
class PairedComparison:
    """The comparison of two measurements on the same questions.

    Attributes:
        gained: questions incorrect before and correct after.
        lost: questions correct before and incorrect after.
        p_value: probability of a split of the changed questions at least this uneven when gains and losses are equally likely.
    """

    gained: int
    lost: int
    p_value: float


def compare_paired(before: Sequence[bool], after: Sequence[bool]) -> PairedComparison:
    """Exact McNemar test (Q. McNemar, 1947): are gains and losses more uneven than by chance?

    Args:
        before: for each question, whether it was correct before.
        after: the same after, in the same order.

    Raises:
        ValueError: when the lengths differ.

    >>> compare_paired([True, False, False, False], [True, True, True, True])
    PairedComparison(gained=3, lost=0, p_value=0.25)
    """
    if len(before) != len(after):
        raise ValueError(f"Expected results of the same questions; got {len(before)} results before and {len(after)} after.")
    gained = sum(b < a for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return PairedComparison(gained, lost, min(1.0, 2 * tail / 2**changed))
