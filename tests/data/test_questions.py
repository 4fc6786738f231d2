"""Questions of files, one at a time."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import make_image

from mpo.data import load_questions
from mpo.io import BadRecord
from mpo.verification import match

TEXT = [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]


def write(folder, *lines):
    make_image(0).save(folder / "a.png")
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "q.jsonl"


def test_a_question(tmp_path):
    line = {"question": "How many?", "image": "a.png", "answer": 3, "options": ["2", 3], "kind": "number", "split": "test"}
    (question,) = load_questions(write(tmp_path, line))
    assert question.messages == [{"role": "user", "content": TEXT}]
    assert question.images == [str(tmp_path / "a.png")] and question.id == "q.jsonl:1"
    assert (question.ground_truths, question.choices, question.kind) == (["3"], ["2", "3"], "number")
    assert question.metadata == {"split": "test"}


def test_parquet_with_images_inside(tmp_path):
    write(tmp_path)
    data = (tmp_path / "a.png").read_bytes()
    rows = {
        "id": ["x", "y"],
        "prompt": ["How many?"] * 2,
        "images": [[{"bytes": data, "path": "a.png"}]] * 2,
        "answers": [["3", "three"], []],
    }
    pq.write_table(pa.table(rows), tmp_path / "q.parquet")
    questions = load_questions(tmp_path / "q.parquet")
    assert [(one.id, one.images, one.ground_truths) for one in questions] == [("x", [data], ["3", "three"]), ("y", [data], [])]
    assert len(list(questions)) == 2 and [one.id for one in load_questions(tmp_path / "q.parquet", limit=1)] == ["x"]


@pytest.mark.parametrize(
    ("line", "choices"),
    [
        ({"question": "How many?", "answer": "B"}, None),
        ({"question": "How many?", "answer": "B", "A": "2", "B": 3, "C": None}, ["2", "3"]),
        ({"question": "How many?", "answer": "B", "options": "['2', '3']"}, ["2", "3"]),
        ({"question": "How many?", "answer": "B", "options": ["A. 2", "B: 3"]}, ["2", "3"]),
        ({"question": "How many?", "answer": "B", "A": "（A）2", "B": "(B) 3"}, ["2", "3"]),
        ({"question": "How many?", "answer": "B", "options": ["A. Smith", "C. Lee"]}, ["A. Smith", "C. Lee"]),
        ({"question": "How many?", "answer": ["B", " "], "options": ["A. Smith", "B Lee"]}, ["A. Smith", "B Lee"]),
        (
            {"conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "3."}], "answer": "B"},
            None,
        ),
        ({"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3."}], "answer": "B"}, None),
    ],
)
def test_prompt_files_benchmarks_and_conversations(tmp_path, line, choices):
    (question,) = load_questions(write(tmp_path, {**line, "image": "a.png"}))
    assert question.messages == [{"role": "user", "content": TEXT}] and question.choices == choices
    assert question.ground_truths == ["B"]
    assert question.metadata == ({"response": "3."} if len(line) == 2 and "question" not in line else {})


@pytest.mark.parametrize(
    ("line", "truths"),
    [
        ({"answer": [0, 0, 10, 10], "kind": "box"}, ["[0, 0, 10, 10]"]),
        ({"answer": [[0, 0, 9, 9], [1, 1, 5, 5]], "kind": "box"}, ["[[0, 0, 9, 9], [1, 1, 5, 5]]"]),
        ({"ground_truth": ["红", "blue"], "kind": "list"}, ['["红", "blue"]']),
        ({"answer": [0, 1], "kind": "interval"}, ["[0, 1]"]),
        ({"answers": ["1, 2", "2, 1"], "kind": "list"}, ["1, 2", "2, 1"]),
        ({"answer": [1, "one"], "kind": "number"}, ["1", "one"]),
        ({"answer": [""], "kind": "text"}, []),
    ],
)
def test_an_answer_that_is_a_list_and_several_answers(tmp_path, line, truths):
    (question,) = load_questions(write(tmp_path, {"question": "Which?", **line}))
    assert question.ground_truths == truths
    for truth in truths:
        assert match(truth, truth.replace("10", "10.0"), kind=question.kind).correct


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ({"image": "a.png"}, "the fields image"),
        ({"question": "Why?", "prompt": "Why?"}, "both 'question' and 'prompt'"),
        ({"question": "Why?", "answer": "a", "ground_truth": "b"}, "both 'ground_truth' and 'answer'"),
        ({"question": "Why?", "image_path": "a.png"}, "'image_path'"),
        ({"question": "Why?", "image": "b.png"}, "b.png"),
        ({"question": "Why?", "image": "../a.png"}, "../a.png"),
        ({"question": "<image> <image>", "image": "a.png"}, "2 <image>"),
        ({"question": "Why?", "choices": {"A": "x"}}, "'choices' has an object"),
        ({"question": "Why?", "answer": True}, "'answer' has a boolean"),
        ({"question": "Why?", "answer": [1, float("nan")]}, "'answer' has nan"),
        ({"question": "Why?", "A": "x", "B": float("nan")}, "'choices' has nan"),
        ({"question": "Why?", "choices": "A. x\nB. y"}, "'choices' has text"),
        ({"question": "Why?", "A": "x", "C": "y"}, "'A'"),
        ({"question": "Why?", "options": "[x, y"}, "'options' looks like a list"),
        ({"question": "Why?", "tolerance": "5 %"}, "'tolerance'"),
        ({"question": "Why?", "id": ["x"]}, "'id'"),
        ({"conversations": ["Why?", {"from": "human", "value": "Why?"}]}, "where a message"),
        ({"conversations": [{"from": "human", "value": "Why?"}, "Because."], "answer": "a"}, "role None"),
        ({"conversations": [{"from": ["human"], "value": "Why?"}]}, "['human']"),
        ({"question": "Why?", "id": "first"}, "'first' is that of"),
    ],
)
def test_a_line_that_is_no_question(tmp_path, line, name):
    path = write(tmp_path, {"question": "First?", "id": "first"}, line)
    with pytest.raises(BadRecord, match="q.jsonl:2: ") as refused:
        list(load_questions(path))
    assert name in str(refused.value)


def test_questions_on_one_line_of_an_array_have_a_place_each(tmp_path):
    (tmp_path / "q.json").write_text('[\n{"question": "a?"}, {"question": "b?"},\n{"question": "c?"}]')
    assert [question.id for question in load_questions(tmp_path / "q.json")] == ["q.json:2", "q.json:2.1", "q.json:3"]
