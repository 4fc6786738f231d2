"""Parse responses and compare their final answers with the ground truth."""

import pytest

from mpo.verification.ground_truth import is_correct
from mpo.pipelines.mmpr.strict_format import ParsedResponse, parse_response


@pytest.mark.parametrize(
    ("response", "rationale", "answer"),
    [
        ("Read 3 4\n3 + 4 = 7\nFinal answer: 7", "Read 3 4\n3 + 4 = 7", "7"),
        ("Read 3 4\n3 + 4 = 7\nFinal Answer:   7  \n", "Read 3 4\n3 + 4 = 7", "7"),
        ("a\nFinal answer: 1\nno, wait\nFinal answer: 2", "a\nFinal answer: 1\nno, wait", "2"),
        ("数\n三加四\n答案: 7", "数\n三加四", "7"),
        ("a\n\nFinal answer: a cat, on a chair", "a", "a cat, on a chair"),
    ],
)
def test_final_answer_is_found(response, rationale, answer):
    assert parse_response(response) == ParsedResponse(rationale, answer)


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
    assert parse_response(response) is None


@pytest.mark.parametrize(
    ("answer", "ground_truth", "right"),
    [
        ("7", "7", True),
        ("7.0", "7", True),
        ("7.", "7", True),
        (" Yes ", "yes", True),
        ("a  cat", "A cat.", True),
        ("1,200", "1200", True),
        ("-3", "-3.00", True),
        ("17", "7", False),
        ("7 apples", "7", False),
        ("", "7", False),
        ("nan", "7", False),
        ("inf", "7", False),
        ("1 3 8", "138", False),
    ],
)
def test_checking(answer, ground_truth, right):
    assert is_correct(answer, ground_truth) is right
