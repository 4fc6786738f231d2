"""Pairs of correct and incorrect responses."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.io import read_json_lines, write_json_lines
from mpo.pipelines.mmpr.lines import build_pairs
from mpo.pipelines.mmpr.pairing import judge, pair_completions


def response(answer, reasoning="because"):
    return f"{reasoning}\nso\nFinal answer: {answer}"


RESPONSES = st.lists(
    st.one_of(
        st.builds(response, st.integers(0, 40), st.sampled_from(["because", "therefore", "clearly"])),
        st.sampled_from(["no format", "neither\nthis"]),
    ),
    max_size=16,
)


@given(responses=RESPONSES, truth=st.integers(0, 40).map(str), max_pairs=st.integers(1, 20), seed=st.integers())
def test_pairs_are_what_they_say(responses, truth, max_pairs, seed):
    judged = [judge(text, truth) for text in responses]
    pairs = pair_completions(judged, max_pairs=max_pairs, rng=random.Random(seed))
    assert len(pairs) <= max_pairs
    assert len({(pair.chosen, pair.rejected) for pair in pairs}) == len(pairs)
    for pair in pairs:
        chosen, rejected = judge(pair.chosen, truth), judge(pair.rejected, truth)
        assert chosen.verdict == "correct"
        assert rejected.verdict == pair.negative
        assert rejected.answer is None or chosen.answer not in rejected.answer
        assert pair.chosen in responses and pair.rejected in responses


@given(responses=RESPONSES, truth=st.integers(0, 40).map(str))
def test_all_pairs_are_kept_when_there_is_room(responses, truth):
    """Their number is distinct correct times distinct incorrect responses, without those that contain the correct final answer."""
    judged = {text: judge(text, truth) for text in responses}.values()
    positives = [r for r in judged if r.verdict == "correct"]
    negatives = [r for r in judged if r.verdict != "correct" and (r.answer is None or truth not in r.answer)]
    pairs = pair_completions(judged, max_pairs=1000, rng=random.Random(0))
    assert len(pairs) == len(positives) * len(negatives)


@given(responses=RESPONSES, seed=st.integers(0, 9))
def test_the_seed_decides(responses, seed):
    judged = [judge(text, "7") for text in responses]
    first, again = (pair_completions(judged, max_pairs=2, rng=random.Random(seed)) for _ in range(2))
    assert first == again


def test_an_empty_response_is_in_no_pair():
    judged = [judge(text, "7") for text in (response(7), "", " \n", "no format")]
    assert [pair.rejected for pair in pair_completions(judged, rng=random.Random(0))] == ["no format"]


def test_right_answer_inside_the_wrong_one_is_no_pair():
    """`7 or 8` and `17` contain `7`; `8` does not. Case does not matter."""
    judged = [judge(response(answer), "7") for answer in ("7", "7 or 8", "17", "8")]
    assert [pair.rejected for pair in pair_completions(judged, rng=random.Random(0))] == [response("8")]
    judged = [judge(response(answer), "Cat") for answer in ("cat", "a CAT sleeps")]
    assert pair_completions(judged, rng=random.Random(0)) == []


def test_at_least_one_pair_must_be_allowed():
    with pytest.raises(ValueError, match="max_pairs=0"):
        pair_completions([], max_pairs=0, rng=random.Random(0))


QUESTION = {"id": "q1", "image": "images/1.png", "question": "What is the sum?", "ground_truth": "7"}


def test_lines_have_mmprs_fields_and_tell_negatives_apart():
    lines, report = build_pairs([QUESTION], [[response("7"), response("8"), "neither"]])
    assert lines[0] == {
        "id": "q1/0",
        "image": "images/1.png",
        "question": "What is the sum?",
        "chosen": response("7"),
        "rejected": response("8"),
        "answer_gt": "7",
        "rejected_meta": {"negative": "wrong_answer"},
    }
    assert lines[1]["rejected"] == "neither"
    assert lines[1]["rejected_meta"] == {"negative": "wrong_format"}
    assert report.responses == {"correct": 1, "wrong_answer": 1, "wrong_format": 1}
    assert report.pairs == {"wrong_answer": 1, "wrong_format": 1}


def test_questions_without_a_pair_are_counted():
    """Only correct responses; only incorrect ones; an incorrect final answer that contains the correct one; one with a pair."""
    questions = [{**QUESTION, "id": f"q{number}"} for number in range(4)]
    responses = [[response("7")], [response("8")], [response("7"), response("77")], [response("7"), response("8")]]
    lines, report = build_pairs(questions, responses)
    assert [line["id"] for line in lines] == ["q3/0"]
    assert (report.questions, report.all_right, report.all_wrong, report.paired) == (4, 1, 1, 1)


def test_a_questions_pairs_do_not_depend_on_other_questions():
    responses = [response(answer, reasoning) for answer in (7, 8, 9) for reasoning in ("because", "therefore", "clearly")]
    other = {**QUESTION, "id": "q0"}
    alone, _ = build_pairs([QUESTION], [responses], max_pairs=4, seed=3)
    together, _ = build_pairs([other, QUESTION], [responses[::-1], responses], max_pairs=4, seed=3)
    assert alone == together[4:]


def test_counts_must_match():
    with pytest.raises(ValueError, match="1 questions and 0 lists"):
        build_pairs([QUESTION], [])


def test_a_file_is_whole_or_not_there(tmp_path):
    def interrupted():
        yield QUESTION
        raise KeyboardInterrupt

    path = tmp_path / "new" / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt):
        write_json_lines(path, interrupted())
    assert not path.exists()
    write_json_lines(path, [QUESTION])
    assert read_json_lines(path) == [QUESTION]
    assert json.loads(path.read_text()) == QUESTION
