"""Questions of the demo."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.demo.questions import KINDS
from mpo.preference_data.pairing import judge

DIGITS = st.lists(st.integers(0, 9), min_size=2, max_size=4)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [("sum", "12"), ("order", "1 3 8"), ("double", "6 16 2")],
)
def test_answers_by_hand(kind, answer):
    assert KINDS[kind].answer([3, 8, 1]) == answer


@pytest.mark.parametrize("kind", KINDS)
@given(digits=DIGITS)
def test_worked_examples_are_judged_correct(kind, digits):
    assert judge(KINDS[kind].worked_example(digits), KINDS[kind].answer(digits)).verdict == "correct"
