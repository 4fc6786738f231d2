"""Verdicts of responses, and pairs of right and wrong ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo.pipelines.mmpr.pair import ABOUT, Pair
from mpo.pipelines.mmpr.verify import Verify, judge
from mpo.pipelines.step import Dropped
from mpo.schema import Question


def response(answer, reasoning="because"):
    return f"{reasoning}\nso\nFinal answer: {answer}"


def judged(texts, truth="7", **question):
    responses = [{"text": text, "finish_reason": "stop", "model": "m", "sample": i, "seed": 3} for i, text in enumerate(texts)]
    record = {"id": "q1", "messages": [], "images": ["/a/1.png"], "ground_truths": [truth], "responses": responses, **question}
    return Verify(format="line").finish({**record, "asked": {"question": "<image>\nWhat is the sum?"}}, ())


def pairs(texts, truth="7", question=None, **settings):
    try:
        return Pair(**settings).finish(judged(texts, truth, **(question or {})), ())
    except Dropped as reason:
        return str(reason)


RESPONSES = st.lists(
    st.one_of(
        st.builds(response, st.integers(0, 40), st.sampled_from(["because", "therefore", "clearly"])),
        st.sampled_from(["no format", "neither\nthis"]),
    ),
    min_size=1,
    max_size=16,
)


@given(responses=RESPONSES, truth=st.integers(0, 40).map(str), max_pairs=st.integers(1, 20), seed=st.integers(0))
def test_pairs_are_what_they_say(responses, truth, max_pairs, seed):
    found = pairs(responses, truth, max_pairs=max_pairs, seed=seed)
    if isinstance(found, str):
        return
    assert 1 <= len(found) <= max_pairs
    assert len({(pair["chosen"], pair["rejected"]) for pair in found}) == len(found)
    for pair in found:
        chosen, rejected = (judge(pair[side], Question([], ground_truths=[truth])) for side in ("chosen", "rejected"))
        assert (chosen.verdict, rejected.verdict) == ("correct", pair["rejected_meta"]["negative"])
        assert rejected.answer is None or chosen.answer not in rejected.answer
        for side in ("chosen", "rejected"):
            assert responses[pair[f"{side}_meta"]["sample"]] == pair[side]
    assert found == pairs(responses, truth, max_pairs=max_pairs, seed=seed)


@given(responses=RESPONSES, truth=st.integers(0, 40).map(str))
def test_all_pairs_are_kept_when_there_is_room(responses, truth):
    """Their number is distinct correct times distinct incorrect responses, without those that contain the correct final answer."""
    each = {one["text"]: one for one in judged(responses, truth)["responses"]}.values()
    positives = [one for one in each if one["verdict"] == "correct"]
    wrong = [one for one in each if one["verdict"] != "correct"]
    negatives = [one for one in wrong if one["answer"] is None or truth not in one["answer"]]
    found = pairs(responses, truth, max_pairs=1000)
    if positives and negatives:
        assert len(found) == len(positives) * len(negatives)
    else:
        reasons = ["contains the right one" if wrong else "responses are right"] if positives else ["are wrong", "in the format"]
        assert any(reason in found for reason in reasons)


def test_a_pair_has_mmprs_fields_and_says_where_it_is_from():
    first, second = pairs([response("7"), response("8"), "neither"], question={"source": "digits"})
    about = {"model": "m", "seed": 3, "finish_reason": "stop"}
    assert first == {
        "id": "q1",
        "source": "digits",
        "images": ["/a/1.png"],
        "question": "<image>\nWhat is the sum?",
        "chosen": response("7"),
        "rejected": response("8"),
        "answer_gt": "7",
        "accuracy": 1 / 3,
        "chosen_meta": {
            **about,
            "verdict": "correct",
            "answer": "7",
            "method": "equal",
            "reason": "the response is the ground truth",
            "sample": 0,
        }
        | {"rewritten": None},
        "rejected_meta": {**about, "verdict": "wrong_answer", "answer": "8", "method": "number", "reason": "another number"}
        | {"sample": 1, "negative": "wrong_answer"},
    }
    assert (second["rejected"], second["rejected_meta"]["negative"]) == ("neither", "wrong_format")
    assert set(second["rejected_meta"]) == {*ABOUT, "negative"}


@pytest.mark.parametrize(
    ("texts", "settings", "reason"),
    [
        ([response("7")] * 2, {}, "all responses are right"),
        ([response("8"), "neither"], {}, "all responses are wrong"),
        (["neither", "7"], {}, "no response has an answer in the format"),
        ([response("7"), response("7 or 8"), response("17")], {}, "contains the right one"),
        ([response("7"), response("8")], {"accuracy": (0.6, 0.8)}, "outside 0.6 to 0.8: 0.50"),
        (["", " \n"], {}, "all responses are empty"),
    ],
)
def test_why_there_are_no_pairs(texts, settings, reason):
    assert reason in pairs(texts, **settings)


def test_empty_truncated_and_rewritten_responses():
    assert [one["rejected"] for one in pairs([response("7"), "", " \n", "no format"])] == ["no format"]
    record = judged([response("7"), response("8")])
    record["responses"][0]["finish_reason"] = "length"
    with pytest.raises(Dropped, match="truncated"):
        Pair().finish(record, ())
    (pair,) = pairs([response("Cat"), response("a CAT sleeps"), response("dog")], "cat")
    assert pair["rejected"] == response("dog") and pair["chosen_meta"]["rewritten"] is None
    (pair,) = pairs([response("7 apples"), response("8")], rewrite=True)
    assert pair["chosen"] == response("7") and pair["chosen_meta"]["rewritten"] == "7 apples"


def test_what_is_known_of_the_answer_reaches_verification():
    """The letter of a choice, a unit, a kind, and several ground truths."""
    options = {"choices": ["red", "blue"]}
    assert [one["verdict"] for one in judged([response("(B)"), response("red")], "blue", **options)["responses"]] == [
        "correct",
        "wrong_answer",
    ]
    assert judged([response("120 mm")], "12", unit="cm")["accuracy"] == 1
    assert judged([response("103")], "100", kind="chart")["accuracy"] == 1
    assert judged([response("three")], "4", ground_truths=["4", "three"])["accuracy"] == 1


@pytest.mark.parametrize(
    ("format", "text", "verdict", "answer"),
    [
        ("boxed", "I count three and four, so \\boxed{7}.", "correct", "7"),
        ("boxed", "\\boxed{8} is wrong, I count again: \\boxed{7}", "correct", "7"),
        ("boxed", "<think>\\boxed{8}</think> They are \\boxed{7}.", "correct", "7"),
        ("boxed", "<think>perhaps \\boxed{7}, but", "wrong_format", None),
        ("boxed", "\\boxed{7}", "wrong_format", None),  # no rationale
        ("boxed", "I count three and four, so 7.", "wrong_format", None),
        ("any", "I count three and four, so the answer is 7.", "correct", "7"),
        ("any", "I cannot see the image.", "wrong_format", None),
    ],
)
def test_formats(format, text, verdict, answer):
    found = judge(text, Question([], ground_truths=["7"]), format)
    assert (found.verdict, found.answer) == (verdict, answer)


def test_refusals():
    for settings in ({"max_pairs": 0}, {"accuracy": (0.8, 0.2)}, {"accuracy": (0.2, 1.5)}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Pair(**settings)
    with pytest.raises(ValueError, match="'boxes'.*'boxed'"):
        Verify(format="boxes")
    with pytest.raises(ValueError, match="kind='nmber'"):
        Verify(kind="nmber")
    with pytest.raises(ValueError, match="ground truth"):
        Verify().finish({"id": "q", "messages": [], "responses": [{"text": "7"}]}, ())
    with pytest.raises(ValueError, match="mpo mmpr verify"):
        Pair().finish({"id": "q", "responses": []}, ())
