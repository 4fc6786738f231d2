"""Public sets in their published layouts. Each fixture is ours, in the layout that its comment cites (repository, path, commit)."""

import json
import pickle

import numpy as np
import pytest
from support import make_image

from mpo.io import BadRecord, read_json_lines
from mpo.pipelines.mminstruct.expand import READERS, Expansion


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False))


@pytest.fixture
def sets(tmp_path):
    """All sets, each in a folder."""
    # FigureQA: Maluuba/FigureQA, docs/json_png_format.md, dc0a65fe2e3e2e06d58edfbebe816d4c1c79ce86
    pairs = [
        {"question_string": "Is Teal the minimum?", "question_id": 0, "answer": answer, "image_index": 0}
        | {"color1_name": "Teal", "color1_id": 4, "color1_rgb": [0, 128, 128]}
        | {"color2_name": "--None--", "color2_id": -1, "color2_rgb": [-1, -1, -1]}
        for answer in (1, 0)
    ]
    write(tmp_path / "figureqa" / "qa_pairs.json", {"qa_pairs": pairs, "total_distinct_questions": 1, "total_distinct_colors": 1})
    # DVQA: kushalkafle/DVQA_dataset, README.md, 53cff67cabd7d30e955045ff7b8ba4b977f73162
    name = "bar_train_00000001.png"
    lines = [
        {"image": name, "question": "How many bars are there?", "answer": "two", "question_type": "structure", "question_id": 1}
        | {"bbox_answer": []},
        {"image": name, "question": "Is each bar solid?", "answer": "yes", "question_type": "structure", "question_id": 2}
        | {"bbox_answer": []},
    ]
    write(tmp_path / "dvqa" / "qa" / "train_qa.json", lines)
    # TabMWP: lupantech/PromptPG, README.md and data/tabmwp/tables, 869bae8ffb8288ccc3102293b3090ec2aa17f618
    table = {"table_title": None, "table": "a | $2\nb | $3", "row_num": 2, "column_num": 2, "solution": "2 + 3 = 5", "grade": 3}
    problems = {
        "7": {"question": "How much do both cost?", "choices": None, "answer": "5", "unit": "$", **table, "split": "train"},
        "8": {"question": "Which is dearer?", "choices": ["a", "b"], "answer": "b", "unit": None, **table, "split": "train"},
    }
    write(tmp_path / "tabmwp" / "problems_train.json", problems)
    # GeoQA+: SCNU203/GeoQA-Plus, GeoQA+/utils.py, 931f9d2949585744fe865531a1b93fe90bcca963
    problem = {
        "id": 9,
        "image": np.full((40, 50), 255, np.uint8),
        "token_list": ["角", "A", "=", "N_0", "度", "，", "求", "角", "B"],
    }
    problem |= {"numbers": [30.0], "choice_nums": [30.0, 60.0, 90.0, 150.0], "label": 1, "formal_point": [], "manual_program": []}
    for protocol in (2, 4):
        path = tmp_path / f"geoqa_plus{protocol}" / "train.pk"
        path.parent.mkdir()
        path.write_bytes(pickle.dumps([problem, {**problem, "id": 10, "subject": "求角C的度数。"}], protocol))
    # MMInstruct: yuecao0119/MMInstruct, README.md, 113775da607c367a7ab360f1fb97efa89d001e7a, and train_dataset_for_llava.py
    rounds = [
        ("<image>\nWhat do the two people do?", "They play chess in a park, and a third person watches them closely."),
        ("Is it day?", "Yes"),
    ]
    asked = "Which game is it?\nA. chess\nB. go\nC. cards\nD. dice"
    turns = [
        {"from": who, "value": text} for pair in (*rounds, (asked, "A")) for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    write(tmp_path / "mminstruct" / "qa_en.jsonl", {"id": "q", "image": "0.png", "conversations": turns})
    said = ("A long English caption of a park with two people.", "这是一段很长的中文描述，图中有一个公园，里面有两个人正在下棋。")
    for name_, (asked, text) in (("caption_cn", ("Describe it.", said[0])), ("caption_en", ("请描述这张图。", said[1]))):
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": text}]
        write(tmp_path / "mminstruct" / f"{name_}.jsonl", {"id": name_, "image": "0.png", "conversations": turns})
    lines = [
        {"q": "What is it?", "a": "a cup", "f": "0.png", "l": "en"},
        {"q": "Which?", "a": "B", "f": "0.png", "o": ["A. one", "B. two"]},
    ]
    (tmp_path / "fields").mkdir()
    (tmp_path / "fields" / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for place in ("figureqa/png/0.png", f"dvqa/images/{name}", "tabmwp/tables/7.png", "tabmwp/tables/8.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        make_image(0, 80, 70).save(tmp_path / place)
    for place in ("mminstruct", "fields"):
        make_image(0, 80, 70).save(tmp_path / place / "0.png")
    return tmp_path


FIELDS = {"question": "q", "answer": "a", "image": "f", "choices": "o", "language": "l"}


@pytest.mark.parametrize(
    ("set", "path", "found"),
    [
        ("figureqa", "figureqa", [("judgement", "Is Teal the minimum?", "Yes"), ("judgement", "Is Teal the minimum?", "No")]),
        ("dvqa", "dvqa", [("short", "How many bars are there?", "two"), ("judgement", "Is each bar solid?", "Yes")]),
        ("tabmwp", "tabmwp", [("short", "How much do both cost? (unit: $)", "5"), ("choice", "Which is dearer?", "b")]),
        ("geoqa_plus", "geoqa_plus2", [("choice", "角A=30度，求角B", "60"), ("choice", "求角C的度数。", "60")]),
        ("geoqa_plus", "geoqa_plus4", [("choice", "角A=30度，求角B", "60"), ("choice", "求角C的度数。", "60")]),
        ("fields", "fields/own.jsonl", [("short", "What is it?", "a cup"), ("choice", "Which?", "two")]),
        (
            "mminstruct",
            "mminstruct/caption_cn.jsonl",
            [("short", "Describe it.", "A long English caption of a park with two people.")],
        ),
    ],
)
def test_layouts(sets, set, path, found):
    expansion = Expansion(set, sets / path, fields=FIELDS if set == "fields" else {}, domain="numerical_calculation")
    records = [*expansion]
    assert [(one["type"], one["question"], one["answer"]) for one in records] == found
    assert records == [*expansion] or set == "geoqa_plus"  # whose images are pixels
    assert len({one["id"] for one in records}) == len(records) and {one["domain"] for one in records} == {"numerical_calculation"}
    assert all(one["answer"] in one["choices"] for one in records if one["type"] == "choice")
    assert len([*Expansion(set, sets / path, fields=expansion.fields, limit=1)]) == 1


def test_the_files_of_mminstruct(sets):
    found = [*Expansion("mminstruct", sets / "mminstruct" / "qa_en.jsonl")]
    assert [one["type"] for one in found] == ["short", "judgement", "choice"]
    assert found[2]["question"] == "Which game is it?" and found[2]["choices"] == ["chess", "go", "cards", "dice"]
    assert found[2]["answer"] == "chess" and {one["language"] for one in found} == {"en"}
    for name, language in (("caption_cn", "en"), ("caption_en", "zh")):  # each is in the other language than its name says
        expansion = Expansion("mminstruct", sets / "mminstruct" / f"{name}.jsonl")
        assert [one["language"] for one in expansion] == [language] and name.rpartition("_")[2] in expansion.notices[0]


def test_a_dialogue_stays_one(sets):
    """Its rounds are one conversation, whatever `turns` is; a later one may speak of an earlier one, and is no question alone."""
    from mpo.commands import main
    from mpo.data import load_conversations, load_questions

    path = sets / "mminstruct" / "qa_en.jsonl"
    first = [("What lies on the table?", "a cup"), ("What colour is it?", "blue"), ("And the thing beside it?", "green")]
    lost = [("What lies on the chair?", "unknown"), ("What colour is it?", "red")]  # the first is dropped, so are those after it
    for id, rounds in (("d", first), ("e", [("What stands outside?", "a tree")]), ("f", lost), ("g", [first[0], *lost])):
        turns = [{"from": who, "value": text} for pair in rounds for who, text in zip(("human", "gpt"), pair, strict=True)]
        write(path.with_name(f"{id}.jsonl"), {"id": id, "image": "0.png", "conversations": turns})
    path.write_text("\n".join(path.with_name(f"{id}.jsonl").read_text().strip() for id in "defg"))
    assert main(["mminstruct", "expand", "mminstruct", str(path), "--output", str(sets / "out")]) == 0
    out = sets / "out" / "mminstruct"
    loaded = [len(one["messages"]) for one in load_conversations(out / "meta.json")]
    assert sorted(loaded) == [2, 2, 6]
    asked = load_questions(out / "questions.jsonl", image_root=sets / "mminstruct")
    assert [one.id for one in asked] == ["mminstruct/d/0", "mminstruct/e/0", "mminstruct/g/0"]


@pytest.mark.parametrize(
    ("choices", "answer", "found"),
    [
        (["C. one", "A. two", "B. three"], "A", (["one", "two", "three"], "two")),
        (["E. coli", "B. subtilis"], "E. coli", (["E. coli", "B. subtilis"], "E. coli")),
        (["A. one", "B. two"], "B. two", (["one", "two"], "two")),
        (["one", "two"], "(B)", (["one", "two"], "two")),
        (["one", "two"], "B. one", (["one", "two"], "B. one")),
        (["B", "A"], "B", (["B", "A"], "B")),
        (["A. 1", "B. 2"], 2, (["1", "2"], "2")),
    ],
)
def test_letters_of_options(sets, choices, answer, found):
    line = {"q": "<image>\nWhich?", "a": answer, "o": choices, "f": "0.png"}
    (sets / "fields" / "own.jsonl").write_text(json.dumps(line))
    (one,) = Expansion("fields", sets / "fields" / "own.jsonl", fields={**FIELDS})
    assert (one["choices"], one["answer"]) == found and one["question"] == "Which?"


def test_lines_that_cannot_be_used(sets, capsys):
    """Each is named; with --drop-bad, the others become training data."""
    from mpo.commands import main

    good = {"q": "What is it?", "a": "a cup", "f": "0.png"}
    bad = {"'a'": {"a": None}, "gone.png": {"f": "gone.png"}, "answer is": {"a": ["x", "y"]}, "choices are": {"o": "x;y"}}
    path = sets / "fields" / "own.jsonl"
    path.write_text("".join(json.dumps(good | one) + "\n" for one in ({}, *bad.values(), {"q": "What is near it?"})))
    for number, name in enumerate(bad, 2):
        lines = path.read_text().splitlines()
        (sets / "fields" / "one.jsonl").write_text(lines[number - 1])
        with pytest.raises(BadRecord, match=name):
            [*Expansion("fields", sets / "fields" / "one.jsonl", fields=FIELDS)]
    words = [word for ours, theirs in FIELDS.items() for word in ("--field", f"{ours}={theirs}")]
    words = ["mminstruct", "expand", "fields", str(path), "--output", str(sets / "out"), *words]
    assert main(words) == 2 and "own.jsonl:2: it has no 'a'" in capsys.readouterr().err
    assert main([*words, "--drop-bad"]) == 0
    assert [one["id"] for one in read_json_lines(sets / "out" / "mminstruct" / "instructions.jsonl")] == ["fields/0", "fields/5"]
    lost = read_json_lines(sets / "out" / "dropped.jsonl")
    assert [any(name in one["reason"] for one in lost) for name in bad] == [True] * 4 and {one["kind"] for one in lost} == {"bad"}


def test_a_label_that_no_option_has(sets):
    path = sets / "geoqa_plus4" / "train.pk"
    (problem, _) = pickle.loads(path.read_bytes())
    for label in (-1, 4, "B"):
        path.write_bytes(pickle.dumps([{**problem, "label": label}]))
        with pytest.raises(BadRecord, match="its label is"):
            [*Expansion("geoqa_plus", path)]


def test_a_set_becomes_training_data(sets, capsys):
    from mpo.commands import main
    from mpo.data import load_conversations

    out = sets / "out"
    assert main(["mminstruct", "expand", "tabmwp", str(sets / "tabmwp"), "--output", str(out), "--licence", "CC-BY-NC-SA-4.0"]) == 0
    loaded = load_conversations(out / "mminstruct" / "meta.json")
    assert len(loaded) == 2 and "CC-BY-NC-SA-4.0" in str(loaded[0]["metadata"])
    assert main(["mminstruct", "expand", "geoqa_plus", str(sets / "geoqa_plus4"), "--output", str(sets / "geo")]) == 0
    assert load_conversations(sets / "geo" / "mminstruct" / "meta.json")[0]["images"][0].size == (50, 40)
    capsys.readouterr()
    assert main(["mminstruct", "expand", "dvqua", str(sets / "dvqa"), "--output", str(sets / "no")]) == 2
    assert "'dvqa'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"set": "figureqa", "path": "nowhere"}, "nowhere"),
        ({"set": "fields", "path": "fields/own.jsonl"}, "question"),
        ({"set": "fields", "path": "fields/own.jsonl", "fields": {"querstion": "q"}}, "'querstion'"),
        ({"set": "dvqa", "path": "dvqa", "fields": {"question": "q"}}, "layout is known"),
        ({"set": "dvqa", "path": "dvqa", "domain": "chart"}, "'chart'"),
    ],
)
def test_refusals(sets, given, name):
    with pytest.raises(ValueError, match=name):
        Expansion(**{**given, "path": sets / given["path"]})


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("set", sorted({*READERS} - {"fields"}))
def test_broken_files_are_named(sets, set):
    """Another layout, and a missing image, are errors that name the file; nothing of a pickle is run."""
    path = sets / ("geoqa_plus4" if set == "geoqa_plus" else set)
    for image in [*path.rglob("*.png")]:
        image.unlink()
    if set != "geoqa_plus":
        with pytest.raises(BadRecord, match="png"):
            [*Expansion(set, path / "qa_en.jsonl" if set == "mminstruct" else path)]
    for file in [*path.rglob("*.json*"), *path.rglob("*.pk")]:
        file.write_bytes(pickle.dumps([Evil()]) if file.suffix == ".pk" else b'{"qa_pairs": [{}], "x": {}}')
    with pytest.raises(ValueError, match=str(path)):
        [*Expansion(set, path / "qa_en.jsonl" if set == "mminstruct" else path)]


@pytest.mark.parametrize("data", [b"", b'{"question": "?"}', pickle.dumps(["?"] * 9)[:-4]])
def test_what_is_no_pickle_is_named(tmp_path, data):
    (tmp_path / "train.json").write_bytes(data)
    with pytest.raises(BadRecord, match="not a whole pickle"):
        [*Expansion("geoqa_plus", tmp_path / "train.json")]
    with pytest.raises(ValueError, match="no file \\*.pk"):
        [*Expansion("geoqa_plus", tmp_path)]


def test_a_review_of_the_instructions_comes_back(sets, monkeypatch, capsys):
    """One judgement is rejected in the output of its job; the question of another instruction is edited in instructions.jsonl."""
    from mpo.commands import main
    from mpo.review.documents import read_line
    from mpo.review.log import Log

    monkeypatch.chdir(sets)
    write(sets / "c.json", {"expand": [{"set": "figureqa", "path": "figureqa"}, {"set": "tabmwp", "path": "tabmwp"}]})
    assert main(["mminstruct", "make", "c.json", "--output", "plain"]) == 0
    before = read_json_lines(sets / "plain" / "instructions.jsonl")
    one = next(line for line in before if line["type"] == "choice" or line["type"] == "short")
    made = read_json_lines(sets / "plain" / "jobs" / "expand-figureqa" / "output.jsonl")
    log = Log(sets / "log", owner=True)
    log.open_file("x", "f", dict)
    edit = {"paths": [["question"]], "old": one["question"], "value": f"Say it: {one['question']}"}
    for place, (action, record, edits) in enumerate((("accept", one, [edit]), ("reject", made[0], []))):
        log.append(action=action, by="anna", place=place, id=record["id"], key=read_line(record).key(), edits=edits)
    log.close()
    capsys.readouterr()
    assert main(["mminstruct", "make", "c.json", "--output", "plain", "--review", "log"]) == 0
    assert "1 reject, 1 edit" in capsys.readouterr().out
    after = {line["id"]: line for line in read_json_lines(sets / "plain" / "instructions.jsonl")}
    assert made[0]["id"] not in after and f"Say it: {one['question']}" in after[one["id"]]["prompt"]
    (dropped,) = [line for line in read_json_lines(sets / "plain" / "dropped.jsonl") if line["step"] == "review"]
    assert dropped["id"] == made[0]["id"]


def test_a_pickle_runs_nothing(sets, capsys):
    (sets / "geoqa_plus4" / "train.pk").write_bytes(pickle.dumps([Evil()]))
    with pytest.raises(BadRecord, match="print"):
        [*Expansion("geoqa_plus", sets / "geoqa_plus4")]
    assert capsys.readouterr().out == ""
