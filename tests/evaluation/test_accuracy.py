"""Accuracy of responses that reason before their final answer."""

import pytest

from mpo.evaluation.accuracy import measure_accuracy
from mpo.generation.generator import Request, Response


class Parrot:
    """A generator that returns given responses and keeps its settings."""

    def __init__(self, *responses):
        self.responses = responses

    def generate(self, questions, **settings):
        self.settings = settings
        return [[Response(text, "stop", 1, 1)] for text in self.responses]


def test_right_wrong_and_unparsable():
    """Of four responses two are correct, one is incorrect, one has no final answer: 50 %, one unparsable."""
    parrot = Parrot("Final answer: 1", "Final answer: 2.0", "Final answer: 4", "hm")
    accuracy = measure_accuracy(parrot, [Request.ask("?")] * 4, ["1", "2", "3", "4"], max_new_tokens=9)
    assert accuracy.correct == [True, True, False, False]
    assert accuracy.share == 0.5
    assert accuracy.unparsable == 1
    assert accuracy.interval == (pytest.approx(0.150, abs=1e-3), pytest.approx(0.850, abs=1e-3))
    assert parrot.settings == {"temperature": 0.0, "max_new_tokens": 9}


@pytest.mark.parametrize(("questions", "truths"), [([], []), ([Request.ask("?")], [])])
def test_one_ground_truth_per_question(questions, truths):
    with pytest.raises(ValueError, match=f"{len(questions)} questions and 0 ground truths"):
        measure_accuracy(Parrot(), questions, truths)
