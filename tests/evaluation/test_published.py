"""The published forms of benchmarks. Each row has the layout of the file that is named beside it; its contents are made up."""

import base64
import csv
import io
import json
import re

import pytest
from datasets import Dataset
from PIL import Image
from stub_server import StubServer

from mpo.commands import main
from mpo.evaluation.published import FORMS, load_benchmark
from mpo.evaluation.results import score_of
from mpo.evaluation.statistics import smallest_difference
from mpo.io import BadRecord
from mpo.verification import verify

HARNESS = "EvolvingLMMs-Lab/lmms-eval@75571cfe0fa36ca5ec2e6aa2bb268f9d38295af3:lmms_eval/tasks/"
INTERNVL = "OpenGVLab/InternVL@0355722a139b2564809e70c2c84407f6664067fc:internvl_chat/eval/"
CHOICE = {"question": "Which colour?", "answer": "B", "image": "a.png"}
BOXES = ["[200.0, 200.0, 600.0, 600.0]", "[0.2, 0.2, 0.6, 0.6]"]
ROWS = [
    # name, where the layout is from, the row, then by question: ground truths, kind, choices, a right and a wrong response
    (
        "chartqa",
        HARNESS + "chartqa/utils.py",
        {"image": "a.png", "question": "How much?", "answer": "40", "type": "human_test"},
        [(["40"], "chart", None, "Answer: 41", "Answer: 43")],
    ),
    (
        "chartqa",
        "vis-nlp/ChartQA@3dab8e83b6ac559b847b7c6e2f24d1faa95a4507:ChartQA Dataset/test/test_human.json",
        {"imgname": "a.png", "query": "Which year?", "label": "red"},
        [(["red"], "chart", None, "Red", "blue")],
    ),
    (
        "chartqa",
        HARNESS + "chartqa/utils.py",  # its relaxed_correctness knows no years
        {"image": "a.png", "question": "In which year was the peak?", "answer": "2010", "type": "human_test"},
        [(["2010"], "chart", None, "1990", "1890")],
    ),
    (
        "docvqa",
        HARNESS + "docvqa/utils.py",
        {"questionId": "7", "question": "Who signed?", "answers": ["John Smith", "J. Smith"], "image": "a.png", "docId": 3},
        [(["John Smith", "J. Smith"], "document", None, "John Smith", "Mary Poppins")],
    ),
    (
        "m3cot",
        "LightChen233/M3CoT@44e7dcbe12531f1f99fb61af299708a9c83b8e6f:utils/data.py",
        {
            **{"id": "physics-1", "category": "c", "image_id": "1", "context": "Two magnets.", "choices": ["attract", "repel"]},
            **{"rationale": "r", "split": "test", "domain": "science", "topic": "physics", **CHOICE},
        },
        [(["B"], "choice", ["attract", "repel"], r"So \boxed{B}", "Answer: A")],
    ),
    (
        "mathvista",
        HARNESS + "mathvista/utils.py",
        {
            **{"pid": "1", "question": "Which?", "decoded_image": "a.png", "choices": ["3", "4"], "unit": None, "precision": None},
            **{"answer": "4", "question_type": "multi_choice", "answer_type": "text", "metadata": {"task": "geometry"}},
        },
        [(["B"], "choice", ["3", "4"], "Answer: (B)", "Answer: A")],
    ),
    (
        "mathvista",
        HARNESS + "mathvista/utils.py",
        {
            **{"pid": "2", "question": "How far?", "decoded_image": "a.png", "choices": None, "unit": "km", "precision": 1.0},
            **{"answer": "1.2", "question_type": "free_form", "answer_type": "float", "metadata": {"task": "geometry"}},
        },
        [(["1.2"], "number", None, "Answer: 1.2 km", "Answer: 1.4")],
    ),
    (
        "mmbench",
        HARNESS + "mmbench/en_utils.py",
        {
            **{
                "index": 5,
                "hint": "nan",
                "A": "red",
                "B": "blue",
                "C": "nan",
                "D": "nan",
                "category": "colour",
                "L2-category": "x",
            },
            **{"source": "s", "split": "dev", **CHOICE},
        },
        [
            (["B"], "choice", ["red", "blue"], "B", "A"),
            (["A"], "choice", ["blue", "red"], "A", "B"),
        ],
    ),
    (
        "mmmu",
        HARNESS + "mmmu/utils.py",
        {
            **{"id": "validation_Art_3", "question": "Which is <image 1>?", "options": "['a cat', 'not <image 2>']", "answer": "B"},
            **{"question_type": "multiple-choice", "image_1": "a.png", "image_2": "b.png", "image_3": None, "explanation": ""},
        },
        [(["B"], "choice", ["a cat", "not [image 2]"], "B", "A")],
    ),
    (
        "mmmu",
        HARNESS + "mmmu/utils.py",
        {
            **{"id": "validation_Math_1", "question": "Solve <image 1>.", "options": "[]", "answer": "['8', '8.0']"},
            **{"question_type": "open", "image_1": "a.png"},
        },
        [(["8", "8.0"], None, None, "Answer: 8", "Answer: 9")],
    ),
    (
        "muirbench",
        HARNESS + "muirbench/utils.py",
        {
            **{"idx": "4", "task": "Counting", "image_relation": "r", "image_type": "t", "image_list": ["a.png", "b.png"]},
            **{"question": "<image> <image> How many?", "options": ["one", "two"], "answer": "A"},
        },
        [(["A"], "choice", ["one", "two"], "A", "B")],
    ),
    (
        "pope",
        HARNESS + "pope/utils.py",
        {"question_id": "1", "question": "Is there a dog?", "answer": "no", "image": "a.png", "category": "random"},
        [(["no"], "yes_no", None, "No, there is none.", "Yes.")],
    ),
    (
        "pope",
        INTERNVL + "pope/evaluate_pope.py",
        {"question_id": 2, "image": "a.png", "text": "Is there a cat?", "label": "yes", "category": "popular"},
        [(["yes"], "yes_no", None, "yes", "no")],
    ),
    (
        "refcoco",
        HARNESS + "refcoco/utils_rec.py",
        {"question_id": "9", "image": "a.png", "bbox": [20.0, 10.0, 40.0, 20.0], "answer": ["a dog", "the left one"]},
        [
            (BOXES, "box", None, "[[200, 200, 600, 610]]", "[0, 0, 300, 300]"),
            (BOXES, "box", None, "Answer: [0.21, 0.2, 0.6, 0.6]", "Answer: [20, 10, 60, 30]"),
        ],
    ),
    (
        "refcoco",
        INTERNVL + "refcoco/evaluate_grounding.py",
        {"image": "a.png", "sent": "a dog", "bbox": [20, 10, 60, 30], "height": 50, "width": 100},
        [(BOXES, "box", None, "[200, 200, 600, 600]", "[1, 1, 2, 2]")],
    ),
    (
        "mvbench",
        HARNESS + "mvbench/utils.py",
        {"video": "v.mp4", "question": "What happens?", "candidates": ["a fall", "a jump"], "answer": "a jump"},
        [(["B"], "choice", ["a fall", "a jump"], "(B) a jump", "A")],
    ),
    (  # choices that are letters: the answer is the text of one, and the model says its letter
        "mvbench",
        HARNESS + "mvbench/utils.py",
        {"video": "v.mp4", "question": "Which is first?", "candidates": ["B", "C", "A"], "answer": "C"},
        [(["B"], "choice", ["B", "C", "A"], "B", "C")],
    ),
]


def load(tmp_path, name, *rows):
    for image in ("a.png", "b.png", "png/a.png"):
        (tmp_path / image).parent.mkdir(exist_ok=True)
        Image.new("RGB", (100, 50)).save(tmp_path / image)
    (tmp_path / "v.mp4").write_bytes(b"video")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list(load_benchmark(name, tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(("name", "layout", "row", "expected"), ROWS, ids=[f"{row[0]}-{place}" for place, row in enumerate(ROWS)])
def test_a_row_is_its_questions(tmp_path, name, layout, row, expected):
    questions = load(tmp_path, name, row)
    assert len({question.id for question in questions}) == len(questions)
    for question, (truths, kind, choices, right, wrong) in zip(questions, expected, strict=True):
        assert (list(question.ground_truths), question.kind, question.choices) == (truths, kind, choices)
        shown = [*question.images, *question.videos]
        assert shown and len(shown) == sum(part["type"] in ("image", "video") for part in question.messages[-1]["content"])
        for response, score in ((right, 1.0), (wrong, 0.0)):
            assert score_of(response, question, verify(response, question).correct) == score, (response, layout)


@pytest.mark.parametrize("name", sorted(FORMS))
def test_a_row_without_a_promised_column_names_it(tmp_path, name):
    row = next(row for form, _, row, _ in ROWS if form == name)
    for column in FORMS[name].columns.split():
        less = {key: value for key, value in row.items() if key not in column.split("|")}
        with pytest.raises(BadRecord, match=r"rows.jsonl:1") as error:
            load(tmp_path, name, less)
        assert column in str(error.value)


def test_files_that_hold_a_whole_benchmark(tmp_path):
    """MMBench's TSV, with images in base64 and rotations of its own (index 1000005), which count no second time (INTERNVL
    mmbench/evaluate_mmbench.py, HARNESS mmbench/mmbench_evals.py); DocVQA's list `data` (INTERNVL vqa/infographicsvqa_eval.py);
    MathVista's rows by their ids (lupantech/MathVista@53d525874bdde205128e6b160b7357a88277d479:data/testmini.json)."""
    image = io.BytesIO()
    Image.new("RGB", (100, 50), "red").save(image, "PNG")
    image.seek(0)
    row = {"index": 5, "question": 'Which "colour"?', "hint": "", "A": "red", "B": "blue", "C": "", "D": "", "answer": "B"}
    row["image"] = base64.b64encode(image.getvalue()).decode()
    with open(tmp_path / "mmbench.tsv", "w", newline="") as file:
        lines = csv.DictWriter(file, [*row], delimiter="\t")
        lines.writeheader()
        lines.writerows([row, {**row, "index": 1000005, "A": "blue", "B": "red", "answer": "A"}, {**row, "index": 6}])
    first, turned, *others = load_benchmark("mmbench", tmp_path / "mmbench.tsv")
    assert len([*load_benchmark("mmbench", tmp_path / "mmbench.tsv", limit=1)]) == 2  # no question without its rotations
    assert (first.id, first.choices, turned.ground_truths, len(others)) == ("5/0", ["red", "blue"], ["A"], 2)
    assert first.images[0] == image.getvalue() and first.messages[-1]["content"][-1]["text"] == 'Which "colour"?'
    load(tmp_path, "docvqa")
    for name, place in (
        ("docvqa", lambda rows: {"dataset_name": "docvqa", "data": rows}),
        ("mathvista", lambda rows: {"1": rows[0]}),
    ):
        row = {**next(row for form, _, row, _ in ROWS if form == name), "image": "a.png"}
        row.pop("decoded_image", None)
        (tmp_path / f"{name}.json").write_text(json.dumps(place([row]), indent=4))
        [question] = load_benchmark(name, tmp_path / f"{name}.json")
        assert question.ground_truths and [*question.images] == [str(tmp_path / "a.png")]
        row.pop("question")
        (tmp_path / f"{name}.json").write_text(json.dumps(place([row])))
        with pytest.raises(BadRecord, match=rf"{name}.json, row 1: this row of {name} lacks question"):
            list(load_benchmark(name, tmp_path / f"{name}.json"))


def test_the_rotations_of_a_question_are_a_group(tmp_path):
    row = next(row for form, _, row, _ in ROWS if form == "mmbench")
    assert {question.metadata["group"] for question in load(tmp_path, "mmbench", row, {**row, "index": 6})} == {"5", "6"}


@pytest.mark.parametrize(
    ("choices", "right", "truths"),
    [
        ({"A": 0, "B": 1, "C": 2, "D": 3}, "B", ["B", "A", "D", "C"]),
        ({"A": False, "B": True, "C": None, "D": ""}, "A", ["A", "B"]),
        ({"A": "x", "B": "x", "C": "y"}, "B", ["B", "A", "C"]),
        ({"A": "D", "B": "C", "C": "B", "D": "nan"}, "C", ["C", "B", "A"]),
    ],
)
def test_a_rotation_moves_the_right_choice_and_no_other(tmp_path, choices, right, truths):
    row = {**next(row for form, _, row, _ in ROWS if form == "mmbench"), "hint": None, **choices, "answer": right}
    questions = load(tmp_path, "mmbench", {key: value for key, value in row.items() if key not in "EFGHIJ"})
    assert [question.ground_truths[0] for question in questions] == truths
    for question, truth in zip(questions, truths, strict=True):
        assert question.choices[ord(truth) - 65] == str(choices[right])


def test_documents_score_by_their_distance(tmp_path):
    """ "Jahn Smith" has 1 of 10 letters wrong: 0.9; with half of them wrong it is 0."""
    [question] = load(tmp_path, "docvqa", next(row for form, _, row, _ in ROWS if form == "docvqa"))
    assert score_of("Jahn Smith", question, False) == pytest.approx(0.9)
    assert score_of("Jxxx xxxth", question, False) == 0.0


@pytest.mark.parametrize("truth", ["T.F. Riehl", "3. Company: ACME", "Jan. 5, 1998", "Fig. 3: Sales", "the answer is 5"])
@pytest.mark.parametrize("said", ["{}", "Answer: {}", "It is at the top.\n\nFinal answer: {}"])
def test_a_document_that_is_transcribed_as_it_is_has_the_whole_score(tmp_path, truth, said):
    row = {**next(row for form, _, row, _ in ROWS if form == "docvqa"), "answers": ["other words", truth]}
    [question] = load(tmp_path, "docvqa", row)
    assert score_of(said.format(truth), question, False) == 1.0


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("m3cot", "choices", ["attract", "repel"]),
        ("muirbench", "options", ["one", "two"]),
        ("mvbench", "candidates", ["a fall", "a jump"]),
    ],
)
def test_choices_may_be_the_text_of_a_list(tmp_path, name, column, value):
    row = next(row for form, _, row, _ in ROWS if form == name)
    assert [question.choices for question in load(tmp_path, name, {**row, column: str(value)})] == [value]


def test_an_open_answer_that_is_no_list_is_one_answer(tmp_path):
    row = next(row for form, _, row, _ in ROWS if form == "mmmu" and row["question_type"] == "open")
    assert [question.ground_truths for question in load(tmp_path, "mmmu", {**row, "answer": "[0, 2)"})] == [["[0, 2)"]]


def test_an_index_that_is_a_float_is_that_number(tmp_path):
    row = next(row for form, _, row, _ in ROWS if form == "mmbench")
    found = load(tmp_path, "mmbench", {**row, "index": 5.0}, {**row, "index": 1000005.0})
    assert [question.id for question in found] == ["5/0", "5/1"]


def test_a_line_that_states_no_answer_is_none(tmp_path):
    """Two lines are no two answers, of which the better one would count."""
    row = {**next(row for form, _, row, _ in ROWS if form == "docvqa"), "answers": ["left"]}
    [question] = load(tmp_path, "docvqa", row)
    assert min(score_of(said, question, False) for said in ("left\nright", "right\nleft")) == 0.0


def test_a_benchmark_of_the_hub(tmp_path, monkeypatch):
    """Under its name there, which a folder here has: with the pixels of a column of images."""
    monkeypatch.chdir(tmp_path)
    row = next(row for form, _, row, _ in ROWS if form == "mathvista")
    image = Image.new("RGB", (4, 3), "red")
    data = Dataset.from_list([{**row, "decoded_image": image}] * 2)
    (tmp_path / "AI4Math/MathVista/data").mkdir(parents=True)
    data.to_parquet("AI4Math/MathVista/data/testmini-00000-of-00001.parquet")
    known, *_ = load(tmp_path, "mathvista", row)
    found = list(load_benchmark("mathvista"))
    assert len(found) == 2 and found[0].ground_truths == known.ground_truths
    assert Image.open(io.BytesIO(found[1].images[0])).size == (4, 3)


def test_a_benchmark_that_the_hub_does_not_give(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"pope could not be loaded from the Hub .*pope=PATH"):
        list(load_benchmark("pope"))


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("pope", {"answer": "maybe"}, "neither yes nor no"),
        ("refcoco", {"bbox": [1, 2, 3]}, "no box"),
        ("refcoco", {"bbox": [9, 9, 0, 5]}, "no box"),
        ("refcoco", {"sent": "a dog", "bbox": [9, 9, 5, 20], "width": 100, "height": 50}, "no box"),
        ("refcoco", {"sent": "a dog", "bbox": [1, 2, 3, 4], "width": 0, "height": 0}, "0 x 0 pixels"),
        ("mmmu", {"question": "Is it <image 3>?"}, "image_3 is empty"),
        ("mmbench", {"answer": "C"}, "none of the choices A, B"),
        ("mmbench", {"image": "241"}, "that of row 241"),
        ("mvbench", {"answer": "B"}, "none of the choices"),
        ("m3cot", {"choices": "['attract' 'repel']"}, "several choices"),  # an array as text
        ("m3cot", {"choices": []}, "several choices"),
    ],
)
def test_what_a_form_does_not_promise_is_refused(tmp_path, name, change, named):
    row = {**next(row for form, _, row, _ in ROWS if form == name), **change}
    with pytest.raises(BadRecord, match=rf"rows.jsonl:1.*{named}"):
        load(tmp_path, name, row)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("mathvisa", "mathvista"),
        *((name, "judging model") for name in ("mmvet", "MM-Vet_v2", "MMHal", "llava_bench_in_the_wild", "MIA-Bench")),
    ],
)
def test_other_benchmarks_are_refused(tmp_path, name, named):
    with pytest.raises(ValueError, match=named):
        load_benchmark(name, tmp_path)


def test_an_answer_that_is_no_choice_is_refused(tmp_path):
    row = next(row for form, _, row, _ in ROWS if form == "m3cot")
    with pytest.raises(BadRecord, match="none of the choices"):
        load(tmp_path, "m3cot", {**row, "answer": "F"})


def test_the_rules_of_a_benchmark_reach_its_figures(tmp_path, capsys):
    """POPE: yes to 2 of 3 with "yes" and to 1 of 2 with "no": F1 is 2 * 2 / (3 + 3). MMBench: a model that always says A is right
    in one of the two rotations of a question, which counts as wrong. What can be shown is said before anything is asked."""
    pope = next(row for form, _, row, _ in ROWS if form == "pope")
    for place, (label, image) in enumerate(zip(("yes", "yes", "yes", "no", "no"), "abcde", strict=True)):
        pope = {**pope, "question_id": place, "question": f"Is there a dog ({place})?", "answer": label, "image": f"{image}.png"}
        Image.new("RGB", (100, 50), (place, 0, 0)).save(tmp_path / f"{image}.png")
        with open(tmp_path / "pope.jsonl", "a") as file:
            file.write(json.dumps(pope) + "\n")
    row = next(row for form, _, row, _ in ROWS if form == "mmbench")
    (tmp_path / "mmbench.jsonl").write_text(json.dumps({**row, "image": str(tmp_path / "a.png")}) + "\n")
    before = []

    def says(choose):
        def text(body, number):
            before.append(capsys.readouterr().err)
            asked = json.dumps(body["messages"])
            if "dog" in asked:
                return "yes" if any(f"({place})" in asked for place in (0, 1, 3)) else "no"
            return choose(asked)

        return text

    letter = re.compile(r"([A-Z])\. blue")
    with StubServer(text=says(lambda asked: "A")) as one, StubServer(text=says(lambda asked: letter.search(asked)[1])) as two:
        words = [f"first={one.url}", f"knows={two.url}", *(f"{name}={tmp_path / name}.jsonl" for name in ("pope", "mmbench"))]
        assert main(["evaluate", *words, "--output", str(tmp_path / "out"), "--json"]) == 0
    rows = {(row["model"], row["benchmark"]): row for row in json.loads(capsys.readouterr().out)["results"]}
    assert [rows[model, "mmbench"]["correct"] for model in ("first", "knows")] == [0, 1]
    assert {rows[model, "mmbench"]["total"] for model in ("first", "knows")} == {1}
    assert (rows["first", "pope"]["score"], rows["first", "pope"]["yes"]) == (0.6, 0.6)
    assert rows["first", "pope"]["f1"] == pytest.approx(2 / 3)
    least = f"differ by {100 * smallest_difference(5):.1f} points"
    assert f"pope: 5 questions, 5 of them independent: two models must {least}" in before[0]
