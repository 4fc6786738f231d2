"""Lines of every kind: what is shown of them, what edits and swaps make of them, and how that is read."""

import json

import pytest

from mpo.data.records import to_records
from mpo.review.corrections import Stale, changed, corrected, new_value, refused
from mpo.review.documents import at, read_line
from mpo.review.facets import facets

USER, SAYS = {"role": "user", "content": "q"}, "assistant"
PAIRS = {
    "mmpr": {"id": "a", "image": "x.png", "question": "<image>\nq", "chosen": "c", "rejected": "r", "answer_gt": "7"},
    "trl": {
        "prompt": [USER],
        "chosen": [{"role": SAYS, "content": "c"}],
        "rejected": [{"role": SAYS, "content": "r"}],
        "margin": 2,
    },
    "text": {"prompt": "q", "chosen": "c", "rejected": "r"},
    "no prompt": {"chosen": [USER, {"role": SAYS, "content": "c"}], "rejected": [USER, {"role": SAYS, "content": "r"}]},
    "ultra": {"prompt": "q", "chosen": [USER, {"role": SAYS, "content": "c"}], "rejected": [USER, {"role": SAYS, "content": "r"}]},
    "swift": {"messages": [USER, {"role": SAYS, "content": "c"}], "rejected_response": "r"},
    "swift 2": {"messages": [USER, {"role": SAYS, "content": "c"}], "rejected_messages": [USER, {"role": SAYS, "content": "r"}]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "c"},
        "rejected": {"from": "gpt", "value": "r"},
    },
    "rlhf_v": {"text": json.dumps({"question": "q", "chosen": "c", "rejected": "r"}), "image": "x.png", "idx": 3},
    "rlaif_v": {"question": "q", "chosen": "c", "rejected": "r", "image": "x.png", "ds_name": "d", "idx": 1},
}


def said(messages):
    return "".join(part["text"] or "" for message in messages for part in message["content"])


def part(document, text):
    return next(one for one in document.texts() if one.get("text", one.get("value")) == text)


@pytest.mark.parametrize("line", PAIRS.values(), ids=PAIRS)
def test_edit_and_swap_of_every_format_are_read_back(line):
    document = read_line(line)
    assert document.kind == "pair" and [one["name"] for one in document.completions] == ["chosen", "rejected"]
    prompt = next(one for turn in document.turns for one in turn["parts"])
    edits = [
        {"paths": one["paths"], "old": at(line, one["paths"][0]), "value": value}
        for one, value in ((prompt, "Q"), (part(document, "c"), "C"))
    ]
    before = json.dumps(line)
    new = corrected(line, "swap", edits)
    assert json.dumps(line) == before and refused(line, new) is None
    row = to_records(new, where="", find=lambda path, _: path)[0]
    assert (said(row["prompt"]), said(row["chosen"]), said(row["rejected"])) == ("Q", "r", "C") and row["margin"] is None
    assert corrected(line, "accept", []) == line and corrected(corrected(line, "swap", []), "swap", []) == {
        name: value for name, value in line.items() if name != "margin"
    }


def test_everything_said_of_a_side_is_swapped_with_it():
    line = PAIRS["mmpr"] | {"chosen_meta": {"model": "m"}, "rejected_meta": {"model": "n", "negative": "wrong_answer"}}
    line |= {"metadata": {"score_chosen": 2, "score_rejected": 1, "other": 3}}
    new = corrected(line, "swap", [])
    assert new["chosen_meta"] == {"model": "n"} and new["rejected_meta"] == {"model": "m", "negative": "wrong_answer"}
    assert new["metadata"] == {"score_chosen": 1, "score_rejected": 2, "other": 3}


@pytest.mark.parametrize("inner", [lambda own: own, json.dumps], ids=["object", "text"])
def test_what_is_said_of_one_side_alone_goes_with_it(inner):
    said = {"chosen_model": "m", "score_rejected": 1}
    new = corrected(PAIRS["mmpr"] | said | {"metadata": inner({**said, "other": 3})}, "swap", [])
    turned = {"rejected_model": "m", "score_chosen": 1}
    assert {name: new.get(name) for name in (*said, *turned)} == {**dict.fromkeys(said), **turned}
    assert new["metadata"] == inner({**turned, "other": 3})
    swift = corrected(PAIRS["swift"] | {"rejected_images": ["x.png"], "images": ["x.png"]}, "swap", [])
    assert swift["rejected_images"] == ["x.png"] and swift["rejected_response"] == "c"


def test_provenance_has_what_was_dropped_and_who_was_there_before():
    event = {"by": "ben", "at": "now", "action": "swap", "edits": []}
    new = changed(PAIRS["mmpr"] | {"margin": 2, "metadata": {"review": {"by": "anna"}}}, event)["metadata"]["review"]
    assert new["was"] == [{"path": ["margin"], "value": 2}] and new["earlier"] == {"by": "anna"}


def test_an_edit_of_another_content_is_refused():
    edit = {"paths": [["chosen"]], "old": "other", "value": "x"}
    with pytest.raises(Stale, match="chosen"):
        corrected(PAIRS["mmpr"], "accept", [edit])


def test_the_key_is_of_the_content_alone():
    """Not of the folder of an image, nor of placeholders in front, which `mpo mmpr` leaves out of its files."""
    line = PAIRS["mmpr"]
    moved = {**line, "image": "/else/where/x.png", "question": "q"}
    assert read_line(line).key() == read_line(moved).key()
    for other in ({"image": "y.png"}, {"chosen": "d"}, {"answer_gt": "8"}, {"id": "b"}):
        assert read_line({**line, **other}).key() != read_line(line).key()
    edit = {"paths": [["question"]], "old": "q", "value": "Q"}
    assert corrected(line, "accept", [edit])["question"] == "<image>\nQ"


OTHERS = {
    "conversation": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "image": "x.png"},
    "query": {"query": "q", "response": "a", "history": [["b", "c"]]},
    "question": {"question": "q", "answer": 7, "choices": ["a", "b"], "kind": "number"},
    "responses": {
        "id": "1",
        "messages": [USER],
        "responses": [{"text": "a", "verdict": "correct"}],
        "accuracy": 1.0,
        "ground_truths": ["7"],
    },
    "answers": {"id": "1", "greedy": [{"text": "a", "score": 0.0}], "sampled": [], "benchmark": "b"},
    "vlfeedback": {
        "prompt": "q",
        "img_path": "x",
        "completions": [{"response": "a", "annotations": {}}, {"response": "b", "annotations": {}}],
    },
    "empty": {},
    "odd": {"messages": 7, "responses": "x", "chosen": None, "metadata": [1]},
}


@pytest.mark.parametrize("line", OTHERS.values(), ids=OTHERS)
def test_every_shown_text_can_be_edited(line):
    for one in read_line(line).texts():
        old = at(line, one["paths"][0])
        given = ["z"] if isinstance(one.get("value"), list) else "z"
        value = new_value(old, given)
        new = corrected(line, "accept", [{"paths": one["paths"], "old": old, "value": value}])
        assert all(at(new, path) == value for path in one["paths"])
    facets(line)


def test_a_verdict_of_a_person_is_kept_and_counted():
    """Two responses, one of them right; a person finds the other right, too: accuracy 2/2, also after `mpo mmpr verify`."""
    from mpo.pipelines.mmpr.verify import Verify

    line = OTHERS["responses"] | {"responses": [{"text": "7", "verdict": "correct"}, {"text": "seven", "verdict": "wrong_answer"}]}
    edit = {"paths": [["responses", 1, "verdict"]], "old": "wrong_answer", "value": "correct"}
    new = corrected(line, "accept", [edit])
    assert new["accuracy"] == 1.0
    again = Verify(format="any").finish({**new, "responses": [*new["responses"], {"text": "8"}]}, ())
    assert [one["verdict"] for one in again["responses"]] == ["correct", "correct", "wrong_answer"]


def test_numbers_stay_numbers_and_lists_lists():
    assert [new_value(old, given) for old, given in ((7, "8"), (0.5, "1.5"), (7, "a"), ("7", "8"), (None, "x"))] == [
        8,
        1.5,
        "a",
        "8",
        "x",
    ]
    assert new_value([1, "b"], ["1", "c"]) == [1, "c"]
    for old, given in (("a", ["b"]), (["a"], "b"), ("a", 3), (["a"], [3]), ("a", "\ud800")):
        with pytest.raises(ValueError):
            new_value(old, given)


def test_hardest_is_what_is_most_often_wrong():
    assert facets(OTHERS["answers"]) == ("b", "wrong", "", 1.0)
    assert facets(OTHERS["responses"])[1:] == ("all right", "", 0.0)
    assert facets({"margin": 3})[3] == 0.25 and facets({"metadata": {"accuracy": 0.25, "type": "t"}})[2:] == ("t", 0.75)


def test_a_pair_that_becomes_unreadable_is_named():
    assert "same completion" in refused(PAIRS["mmpr"], {**PAIRS["mmpr"], "chosen": "r"})
    bad = {**PAIRS["mmpr"], "img": "x.png"}
    assert refused(bad, {**bad, "chosen": "new"}) is None  # it was so before


def test_a_line_has_its_number_in_the_file(tmp_path):
    from mpo.review.files import Records

    path = tmp_path / "a.jsonl"
    path.write_text('\n \n{"id": "a"}\n\n{"id": "b"}\n{"id": "c"}\n\n')
    records = Records(path)
    assert len(records) == 3 and [records.where(place).rpartition(":")[2] for place in range(3)] == ["3", "5", "6"]
