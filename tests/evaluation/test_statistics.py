"""Intervals and comparisons against numbers derived by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.evaluation.statistics import (
    PairedComparison,
    clustered_interval,
    compare_paired,
    difference_interval,
    holm,
    smallest_difference,
    wilson_interval,
)

TWO_SIGMA = 0.9544997361036416  # the probability within two standard deviations


def test_wilson_by_hand():
    """8 of 10, z = 2: centre (0.8 + 4 / 20) / 1.4 = 0.714286; half width 2 / 1.4 * sqrt(0.16 / 10 + 4 / 400) = 0.230350."""
    low, high = wilson_interval(8, 10, confidence=TWO_SIGMA)
    assert low == pytest.approx(0.714286 - 0.230350, abs=1e-6)
    assert high == pytest.approx(0.714286 + 0.230350, abs=1e-6)


def test_wilson_at_the_ends():
    """0 of n: the upper bound is z^2 / (n + z^2), which is 1/4 for z = 2 and n = 12."""
    assert wilson_interval(0, 12, confidence=TWO_SIGMA) == (0.0, pytest.approx(0.25))
    assert wilson_interval(12, 12, confidence=TWO_SIGMA) == (pytest.approx(0.75), 1.0)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_is_symmetric(counts):
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1
    mirrored_low, mirrored_high = wilson_interval(trials - successes, trials)
    assert (mirrored_low, mirrored_high) == (pytest.approx(1 - high), pytest.approx(1 - low))


@pytest.mark.parametrize("counts", [(0, 0), (3, 2), (-1, 2)])
def test_wilson_needs_trials(counts):
    with pytest.raises(ValueError, match="trial"):
        wilson_interval(*counts)


def test_mcnemar_by_hand():
    """Gained 5, lost 1: 2 * (C(6, 0) + C(6, 1)) / 2^6 = 14 / 64."""
    before = [False] * 5 + [True] + [True] * 4
    after = [True] * 5 + [False] + [True] * 4
    assert compare_paired(before, after) == PairedComparison(gained=5, lost=1, p_value=14 / 64)


def test_mcnemar_without_a_change_is_no_evidence():
    assert compare_paired([True, False], [True, False]).p_value == 1.0
    assert compare_paired([True, False], [False, True]).p_value == 1.0


def test_mcnemar_of_many_changes_does_not_overflow():
    assert 0 < compare_paired([False] * 3000 + [True] * 2000, [True] * 3000 + [False] * 2000).p_value < 1e-40


def test_mcnemar_needs_the_same_questions():
    with pytest.raises(ValueError, match="2 results before and 1 after"):
        compare_paired([True, False], [True])


def test_an_interval_of_clusters_by_hand():
    """Two clusters of two, each of equal scores: variance 2 / 1 * (1 + 1) / 16 = 1 / 4, so one effective trial."""
    assert clustered_interval([1, 1, 0, 0], "aabb") == wilson_interval(0.5, 1)
    assert clustered_interval([1, 0, 1, 0], "abcd") == wilson_interval(2 * 0.75, 3)  # variance 1 / 12: three trials
    assert clustered_interval([1, 1, 1], "aab") == wilson_interval(2, 2)  # equal scores count once per cluster


def test_clustered_intervals_cover_the_mean():
    """Of 400 draws of 60 images with 3 questions each that agree, 95 % intervals miss the mean about 20 times."""
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        scores = np.repeat(generator.random(60) < 0.3, 3).astype(float)
        low, high = clustered_interval(scores, [f"i{place // 3}" for place in range(180)])
        missed += not low <= 0.3 <= high
    assert 8 <= missed <= 36


@pytest.mark.parametrize(("scores", "clusters"), [([], []), ([1, 0], "a"), ([1.5], "a"), ([float("nan")], "a")])
def test_scores_and_clusters_belong_together(scores, clusters):
    with pytest.raises(ValueError, match="each with its cluster"):
        clustered_interval(scores, clusters)


def test_the_interval_of_a_difference():
    """Two of three clusters gain: over 27 equally likely draws the mean is 0 with probability 1/27, 1 with 8/27."""
    assert difference_interval([0, 0, 1], [1, 1, 1], "abc") == (0.0, 1.0)
    low, high = difference_interval([0] * 400, [1, 0] * 200, [*range(400)])
    assert low == pytest.approx(0.45, abs=0.01) and high == pytest.approx(0.55, abs=0.01)
    same = difference_interval([0, 0] * 200, [1, 0] * 200, [place // 2 for place in range(400)])
    assert same == (0.5, 0.5)  # drawn by clusters, each of which gains one half


def test_holm_by_hand():
    """Three tests: 3 * 0.01, then 2 * 0.02, then the largest so far."""
    assert holm({"a": 0.02, "b": 0.01, "c": 0.03}) == {"b": 0.03, "a": 0.04, "c": 0.04}
    assert holm({}) == {} and holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


@pytest.mark.parametrize("questions", [30, 60, 400])
def test_the_smallest_difference_is_shown_in_four_of_five(questions):
    """Where a fifth of the verdicts change, or of few questions as many as the difference."""
    least = smallest_difference(questions)
    changed = max(0.2, least)
    generator, shown = np.random.default_rng(0), 0
    for turned in generator.random((500, questions)):
        gained, lost = (turned < (changed + least) / 2).sum(), (turned > 1 - (changed - least) / 2).sum()
        shown += bool(gained + lost) and compare_paired([0] * gained + [1] * lost, [1] * gained + [0] * lost).p_value < 0.05
    assert 0.7 < shown / 500 < 0.95


def test_the_smallest_difference():
    """(1.96 + 0.84) * sqrt(0.2 / 100) = 0.125; a fourth of the questions doubles it."""
    assert smallest_difference(100) == pytest.approx(0.1253, abs=1e-4)
    assert smallest_difference(100) == pytest.approx(2 * smallest_difference(400))
    with pytest.raises(ValueError, match="questions=0"):
        smallest_difference(0)


def test_the_test_of_a_change_counts_clusters():
    """Five images of 20 questions, all better: 2 of 32 turns are as large. One image is no evidence, fractions or not."""
    before, images = [0.0] * 100, [place % 5 for place in range(100)]
    assert compare_paired(before, [1.0] * 100, images) == PairedComparison(100, 0, 2 / 32)
    assert compare_paired(before, [0.7] * 100, ["a"] * 100).p_value == 1
    uneven = [0.5 + place % 5 / 10 for place in range(100)]
    assert compare_paired(before, uneven, images).p_value == pytest.approx(2 / 32, abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: wilson_interval(1, 2, confidence=95),
        lambda: clustered_interval([1, 0], "ab", confidence=1),
        lambda: difference_interval([1, 0], [1, 1], "ab", confidence=0),
        lambda: difference_interval([], [], []),
        lambda: difference_interval([1], [0, 1], "a"),
        lambda: difference_interval([float("nan")], [1], "a"),
        lambda: smallest_difference(10, power=1),
        lambda: compare_paired([1], [1], "ab"),
    ],
)
def test_arguments_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match="Expected"):
        wrong()
