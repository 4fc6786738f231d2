"""Questions of the demo."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.demo.data import KINDS
from mpo.pipelines.mmpr.verify import judge
from mpo.schema import Question

DIGITS = st.lists(st.integers(0, 9), min_size=2, max_size=4)


@pytest.mark.parametrize(
    ("kind", "ground_truth"),
    [("sum", "12"), ("order", "1 3 8"), ("double", "6 16 2")],
)
def test_ground_truths_by_hand(kind, ground_truth):
    assert KINDS[kind].ground_truth([3, 8, 1]) == ground_truth


@pytest.mark.parametrize("kind", KINDS)
@given(digits=DIGITS)
def test_worked_examples_are_judged_correct(kind, digits):
    question = Question([], ground_truths=[KINDS[kind].ground_truth(digits)])
    assert judge(KINDS[kind].worked_example(digits), question).verdict == "correct"
