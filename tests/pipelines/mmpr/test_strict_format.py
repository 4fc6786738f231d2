"""The strict format: its final answer, or nothing."""

import pytest

from mpo.pipelines.mmpr.verify import line_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Read 3 4\n3 + 4 = 7\nFinal answer: 7", "7"),
        ("Read 3 4\n3 + 4 = 7\nFinal Answer:   7  \n", "7"),
        ("a\nFinal answer: 1\nno, wait\nFinal answer: 2", "2"),
        ("数\n三加四\n答案: 7", "7"),
        ("a\n\nFinal answer: a cat, on a chair", "a cat, on a chair"),
    ],
)
def test_final_answer_is_found(response, answer):
    assert line_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "",
        "7",
        "Read 3 4\n3 + 4 = 7\n7",  # no trigger
        "Read 3 4\nFinal answer: 7",  # one line break only
        "\n\nFinal answer: 7",  # no reasoning
        "a\nb\nFinal answer:",  # no answer
        "a\nb\nFinal answer: 7\nor 8",  # two lines of answer
        "a\nFinal answer: 1\nFinal answer: 2\nFinal answer: 3",  # three triggers
        "a\nb\nfinal answer: 7",  # not one of the triggers
    ],
)
def test_anything_else_is_wrong_format(response):
    assert line_answer(response) is None
