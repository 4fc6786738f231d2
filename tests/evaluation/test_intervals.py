"""Intervals and comparisons against numbers derived by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.evaluation.intervals import PairedComparison, compare_paired, wilson_interval


def test_wilson_by_hand():
    """8 of 10, z = 2: centre (0.8 + 4 / 20) / 1.4 = 0.714286; half width 2 / 1.4 * sqrt(0.16 / 10 + 4 / 400) = 0.230350."""
    low, high = wilson_interval(8, 10, z=2.0)
    assert low == pytest.approx(0.714286 - 0.230350, abs=1e-6)
    assert high == pytest.approx(0.714286 + 0.230350, abs=1e-6)


def test_wilson_at_the_ends():
    """0 of n: the upper bound is z^2 / (n + z^2), which is 1/4 for z = 2 and n = 12."""
    assert wilson_interval(0, 12, z=2.0) == (0.0, pytest.approx(0.25))
    assert wilson_interval(12, 12, z=2.0) == (pytest.approx(0.75), 1.0)


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
