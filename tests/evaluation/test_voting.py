"""Majority vote and best of N against every subset, taken one by one."""

from itertools import combinations
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.evaluation.voting import answer_classes, best_at, majority_at
from mpo.schema import Question
from mpo.verification import final_answer, verify

SAMPLES = st.lists(st.tuples(st.sampled_from([None, 0, 1, 2]), st.integers(0, 2)), min_size=1, max_size=7)


def test_answers_vote_by_what_they_mean():
    question = Question([], ground_truths=["0.5"])
    responses = [
        "Answer: 1/2",
        "Answer: 3",
        "I think so. Answer: 0.50",
        "It cannot be told.",
        "Answer: 3.0",
        r"Answer: \boxed{0.5}",
    ]
    assert answer_classes(responses, question) == [0, 1, 0, None, 1, 0]


def test_choices_vote_by_letter_and_text():
    question = Question([], ground_truths=["B"], choices=["red", "blue"])
    assert answer_classes(["Answer: B", "Answer: blue", "Answer: (A)", "Answer: red"], question) == [0, 0, 1, 1]


def test_votes_are_the_answers_that_are_verified():
    """A question that is repeated as a statement is its answer, and a number of the question is none."""
    question = Question([{"role": "user", "content": "Is the car red?"}], ground_truths=["yes"])
    responses = ["The car is red.", "The car is not red.", "Answer: yes", "No.", "It is a car."]
    assert answer_classes(responses, question) == [0, 1, 0, 1, None]
    for response in responses:
        assert (verify(response, question).method == "none") == (final_answer(response, question).answer is None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: best_at(2, [1.0], [0.0, 1.0]),
        lambda: best_at(1, [float("nan"), 1.0], [0.0, 1.0]),
        lambda: majority_at(1, [0, 0], [1.0]),
    ],
)
def test_each_response_has_one_rank_or_class(wrong):
    with pytest.raises(ValueError, match="each"):
        wrong()


def majority(classes):
    """By hand: the place of the first response of the largest class, of the one seen first among equals; None without answers."""
    answered = [one for one in classes if one is not None]
    return classes.index(max(dict.fromkeys(answered), key=answered.count)) if answered else None


def test_of_equal_votes_the_first_wins():
    assert majority_at(4, [2, 1, 1, 2], [1, 0, 0, 1]) == 1 and majority_at(4, [1, 2, 2, 1], [0, 1, 1, 0]) == 0
    assert majority_at(4, [None, 1, 0, 0], [0, 0, 1, 1]) == 1 and majority_at(2, [None, None], [1, 1]) == 0


@given(SAMPLES, st.data())
def test_the_curves_are_the_means_over_all_subsets(samples, data):
    classes, ranks = [one for one, _ in samples], [rank for _, rank in samples]
    scores = [float(one == 1) for one in classes]
    k = data.draw(st.integers(1, len(samples)))
    voted, best = [], []
    for subset in combinations(range(len(samples)), k):
        place = majority([classes[one] for one in subset])
        voted.append(0.0 if place is None else scores[subset[place]])
        best.append(scores[max(subset, key=lambda one: (ranks[one], -one))])
    assert majority_at(k, classes, scores) == pytest.approx(mean(voted))
    assert best_at(k, ranks, scores) == pytest.approx(mean(best))


def test_pass_at_k_by_hand():
    """Two of five are right: 1 - C(3, 2) / C(5, 2) = 0.7."""
    assert best_at(2, [1, 0, 1, 0, 0], [1, 0, 1, 0, 0]) == pytest.approx(0.7)


def test_many_subsets_are_drawn():
    """20 of 32 agree: the majority of 8 is right about as often as 5 or more of them are."""
    classes = [0] * 20 + list(range(1, 13))
    value = majority_at(8, classes, [float(one == 0) for one in classes])
    assert value == majority_at(8, classes, [float(one == 0) for one in classes]) and value > 0.99


@pytest.mark.parametrize("k", [0, 4, True, 1.0])
def test_k_is_a_number_of_samples(k):
    with pytest.raises(ValueError, match="number of responses, 3"):
        majority_at(k, [0, 0, 1], [1, 1, 0])
    with pytest.raises(ValueError, match="number of responses, 3"):
        best_at(k, [0, 0, 1], [1, 1, 0])
