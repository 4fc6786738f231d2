"""`mpo mmpr` against the stub server: all of it from a configuration, and step by step."""

import json
import re

import pytest
from small_runs import write_job
from stub_server import StubServer
from support import make_image

from mpo.commands import main
from mpo.data import load_preferences, load_questions
from mpo.io import read_json_lines
from mpo.pipelines.mmpr import output, verify
from mpo.pipelines.mmpr.make import Route
from mpo.pipelines.mmpr.verify import judge

CONFIG = """
sources: [{{path: q.jsonl}}]
models: [{{model: "{url}", prices: [1, 2]}}]
sample: {{prompt: plain, n: 8, until: {{limit: 16}}}}
formats: [trl, swift]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Ten questions with a ground truth, of two sources; two without; images in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    lines = []
    for number in range(12):
        make_image(number).save(tmp_path / "images" / f"{number}.png")
        line = {"id": f"q{number}", "image": f"images/{number}.png", "question": f"How many in {number}?"}
        lines.append({**line, "answer": number, "source": f"s {number % 2}"} if number < 10 else line)
    write(tmp_path, lines)
    return tmp_path


def write(folder, lines):
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make(folder, capsys):
    def make(url, text=CONFIG, *words):
        (folder / "c.yaml").write_text(text.format(url=url))
        status = main(["mmpr", "make", "c.yaml", "--output", "out", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return make


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "jobs" not in path.parts
    }


def test_all_of_it_and_again(make, folder):
    with StubServer() as stub:
        status, out, _ = make(stub.url)
        assert status == 0 and "out/meta.json" in out
        asked, before = stub.asked, contents(folder / "out")
        assert make(stub.url)[0] == 0 and stub.asked == asked and contents(folder / "out") == before
        report = json.loads((folder / "out" / "report.json").read_text())
        assert list((folder / "out" / "swift").iterdir())
        changed = CONFIG.replace(", swift", "") + "pair: {{max_pairs: 1}}\nverify: {{format: any, tolerance: 0.1}}\n"
        assert make(stub.url, changed)[0] == 0 and stub.asked == asked  # other rules: nothing is asked again
        assert not list((folder / "out" / "swift").iterdir()) and list((folder / "out" / "trl").iterdir())
        assert "sampling.n is 8 there and 4 now" in make(stub.url, CONFIG.replace("n: 8", "n: 4"))[2]
    all_, *sources = report["sources"]
    assert [one["source"] for one in report["sources"]] == ["all", "q", "s_0", "s_1"]
    for name in output.COUNTED:  # also where it is 0
        assert all_[name] == sum(one[name] for one in sources)
    assert all_["questions"] == 12 == all_["with pairs"] + all_["without pairs"]
    assert sum(all_["pairs by kind"].values()) == all_["pairs"] == all_["pairs made"]
    assert 0 < report["spent"]["requests"] <= asked and report["spent"]["cost"] > 0
    assert len(read_json_lines(folder / "out" / "dropped.jsonl")) == all_["without pairs"]
    page = (folder / "out" / "report.html").read_text()
    assert page.count("<img") == min(output.SHOWN, all_["with pairs"]) and "characters" in page and "cost" in page


def test_columns(make, folder):
    """Those of the official code, of TRL and of ms-swift; and what `mpo train data=mmpr` reads."""
    with StubServer() as stub:
        assert make(stub.url)[0] == 0
    out = folder / "out"
    meta = json.loads((out / "meta.json").read_text())
    assert all({"root", "annotation", "data_augment", "repeat_time", "length"} == set(entry) for entry in meta.values())
    assert {"s_0_pairs_vqa_correctness_rules", "q_prefix_pair_sr0.5_wo_image"} <= set(meta)
    loaded = load_preferences(out / "meta.json")
    assert len(loaded) == sum(entry["length"] for entry in meta.values()) and loaded[0]["images"][0].size == (64, 32)
    for name, entry in meta.items():
        lines = [read_json_lines(out / place) for place in (entry["annotation"], f"trl/{name}.jsonl", f"swift/{name}.jsonl")]
        for mmpr, trl, swift in zip(*lines, strict=True):
            known = {"answer_gt", "accuracy"} if "pairs_vqa" in name else set()
            assert set(mmpr) == {"id", "image", "question", "chosen", "rejected", "chosen_meta", "rejected_meta"} | known
            assert mmpr["question"].startswith("How many in")  # the official code puts the image in front
            assert (folder / "images" / mmpr["image"]).is_file() and entry["root"] == str(folder / "images")
            assert set(trl) == {"id", "images", "prompt", "chosen", "rejected"}
            assert [part["type"] for part in trl["prompt"][0]["content"]] == ["image", "text"]
            assert trl["rejected"][0]["content"][0]["text"] == mmpr["rejected"] == swift["rejected_response"]
            assert (
                set(swift) == {"messages", "rejected_response", "images"} and swift["messages"][0]["content"].count("<image>") == 1
            )
            assert swift["messages"][1] == {"role": "assistant", "content": mmpr["chosen"]}
    assert len(load_preferences(out / "trl" / "q_prefix_pair_sr0.5_wo_image.jsonl", image_root=folder)) == 2


def test_large_files_have_fewer_pairs_and_are_split(make, folder, monkeypatch):
    with StubServer() as stub:
        monkeypatch.setattr(output, "LONGEST", 4)
        monkeypatch.setattr(output, "LARGE", 10)
        assert make(stub.url, CONFIG.replace("prompt: plain", "prompt: plain, temperature: 0.7"))[0] == 0
    meta = json.loads((folder / "out" / "meta.json").read_text())
    report = json.loads((folder / "out" / "report.json").read_text())["sources"][0]
    of_question = [
        line["id"].rpartition("/")[0] for entry in meta.values() for line in read_json_lines(folder / "out" / entry["annotation"])
    ]
    assert max(map(of_question.count, of_question)) == 3 and len(of_question) == report["pairs"]
    assert report["pairs made"] == report["pairs"] + report["pairs left out by kind"]["large file"]
    assert all(1 <= entry["length"] <= 4 for entry in meta.values()) and any(name.endswith("_001") for name in meta)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CONFIG + "verfy: {{}}\n", "'verify'"),
        (CONFIG + "pair: {{max_pair: 3}}\n", "'max_pairs'"),
        (CONFIG + "images: [x]\n", "Keys: continue, formats, models"),  # a key of another file
        (CONFIG.replace("prices: [1, 2]", "path: x"), "Keys: base, "),  # and of another group
        (CONFIG + "pair: {{max_pairs: 0}}\n", "pair.max_pairs"),
        (CONFIG + "pair: {{accuracy: [0.2, 8]}}\n", "accuracy"),
        (CONFIG + "continue: {{ratio: 1}}\n", "ratio"),
        (CONFIG + "rounds: 2\n", "rounds=2"),
        (CONFIG + "train: [a=1]\n", "train=['a=1']"),
        (CONFIG.replace("limit: 16", "limit: 4"), "until.limit=4"),
        (CONFIG.replace("models: [", "models: [{{model: a/m}}, {{model: b/m}}, "), "'m'"),
        (CONFIG.replace("prompt: plain", "prompt: plian"), "'plain'"),
        (CONFIG.replace("q.jsonl", "none.jsonl"), "none.jsonl"),
        (CONFIG.replace("prices: [1, 2]", "device: cpu"), "device"),
        (CONFIG.replace("path: q.jsonl", "path: q.jsonl, route: correctness"), "'q10': it has no ground truth"),
        ("sources: []\nmodels: []\n", "sources"),
        ("models: [", "YAML"),
        ("- a\n", "c.yaml"),
    ],
)
def test_refusals(make, config, name):
    with StubServer() as stub:
        status, out, err = make(stub.url, config)
        assert status == 2 and name in err and out == "" and stub.asked == 0


def test_an_image_that_is_gone(make, folder):
    (folder / "images" / "3.png").unlink()
    with StubServer() as stub:
        status, _, err = make(stub.url)
        assert status == 2 and "'q3'" in err and "3.png" in err and stub.asked == 0
        assert make(stub.url, CONFIG, "--drop-bad")[0] == 0
    assert "3.png" in next(one["reason"] for one in read_json_lines(folder / "out" / "dropped.jsonl") if one["id"] == "q3")


def test_new_questions_go_on_after_the_old_ones(make, folder, monkeypatch):
    """What is there is neither asked nor judged again; the result is that of all questions at once."""
    lines = (folder / "q.jsonl").read_text().splitlines(keepends=True)
    judged = []
    monkeypatch.setattr(verify, "judge", lambda text, *rest: (judged.append(text), judge(text, *rest))[1])
    with StubServer() as stub:
        (folder / "q.jsonl").write_text("".join(lines[:5]))
        assert make(stub.url)[0] == 0
        report, asked = json.loads((folder / "out" / "report.json").read_text()), stub.asked
        assert len(judged) >= report["sources"][0]["responses"]
        (folder / "q.jsonl").write_text("".join(lines))
        judged.clear()
        assert make(stub.url)[0] == 0
        grown, more = contents(folder / "out"), stub.asked - asked
        new = (
            json.loads((folder / "out" / "report.json").read_text())["sources"][0]["responses"] - report["sources"][0]["responses"]
        )
        (folder / "out").rename(folder / "old")
        assert make(stub.url)[0] == 0
        whole = contents(folder / "out")
        assert whole.keys() == grown.keys() and all(whole[name] == grown[name] for name in whole if not name.startswith("report"))
        assert 0 < more < stub.asked - asked - more and 0 < new
        judged.clear()
        assert make(stub.url)[0] == 0 and not judged


def test_questions_that_are_gone_or_changed(make, folder):
    """They are in none of the files; the changed one is asked anew, no other one is, and the counts say what is not used."""
    lines = read_json_lines(folder / "q.jsonl")
    with StubServer() as stub:
        assert make(stub.url)[0] == 0
        first = json.loads((folder / "out" / "report.json").read_text())
        asked = stub.asked
        write(folder, lines[1:11])  # of both routes
        assert make(stub.url)[0] == 0 and stub.asked == asked
        report = json.loads((folder / "out" / "report.json").read_text())
        assert (
            report["questions"] == 10
            and report["unused"] == first["sources"][0]["responses"] - report["sources"][0]["responses"] + 1
        )
        assert '"unused"' not in json.dumps(first) and report["spent"] == first["spent"]
        fewer = contents(folder / "out")
        write(folder, [{**one, "question": "How many now?"} if one["id"] == "q5" else one for one in lines[1:11]])
        assert make(stub.url)[0] == 0 and 0 < stub.asked - asked <= 16
        assert {body["messages"][-1]["content"][-1]["text"] for body in stub.bodies[asked:]} == {"How many now?"}
        write(folder, lines[1:11])
        asked = stub.asked
        assert make(stub.url)[0] == 0 and stub.asked == asked
        back = contents(folder / "out")
        assert {name for name in back if back[name] != fewer[name]} == {"report.json", "report.html"}  # which count q5's others


def test_a_corrected_answer_is_judged_again_and_nothing_is_asked(make, folder, monkeypatch):
    """Only the question whose answer was corrected; the result is that of the corrected file in a new folder."""
    lines = [json.loads(line) for line in (folder / "q.jsonl").read_text().splitlines()]
    text, judged = CONFIG.replace(", until: {{limit: 16}}", ""), []
    monkeypatch.setattr(verify, "judge", lambda text, question, *rest: (judged.append(question), judge(text, question, *rest))[1])
    with StubServer() as stub:
        assert make(stub.url, text)[0] == 0
        asked = stub.asked
        corrections = {"answer": "17", "kind": "number", "tolerance": 0.5}
        write(folder, [line | corrections if line["id"] == "q3" else line for line in lines])
        judged.clear()
        assert make(stub.url, text)[0] == 0
        assert stub.asked == asked and [one.ground_truths for one in judged] == [["17"]] * 8
        corrected = contents(folder / "out")
        judged.clear()
        assert make(stub.url, text)[0] == 0 and not judged and contents(folder / "out") == corrected
        (folder / "out").rename(folder / "old")
        assert make(stub.url, text)[0] == 0
        anew = contents(folder / "out")
    assert anew.keys() == corrected.keys() and all(anew[name] == corrected[name] for name in anew if not name.startswith("report"))


def test_a_server_that_closes_prefixes(make, folder):
    with StubServer(prefix="closed") as stub:
        status, _, err = make(stub.url)
    assert status == 2 and "closes a prefix" in err and not [body for body in stub.bodies if body["max_tokens"] > 1]


def test_no_pairs_at_all(make, folder):
    """All wrong, or unparsable: why is said, the responses are there, and other rules find pairs without asking again."""
    write(folder, read_json_lines(folder / "q.jsonl")[:10])
    with StubServer() as stub:
        status, _, err = make(stub.url, CONFIG + "verify: {{format: boxed}}\n".replace("until: {{limit: 16}}", ""))
        assert status == 2 and "10: no response has an answer in the format" in err
        assert (folder / "out" / "report.html").exists() and not (folder / "out" / "meta.json").exists()


def test_both_routes_and_several_models(make, folder):
    text = CONFIG.replace("path: q.jsonl", "path: q.jsonl, route: both, limit: 10")
    text = text.replace("models: [", 'models: [{{model: "{url}", name: other}}, ').replace("limit: 16", "limit: 8")
    with StubServer() as stub:
        assert make(stub.url, text)[0] == 0
    out = folder / "out"
    lines = [line for path in (out / "annotations").iterdir() for line in read_json_lines(path)]
    assert len({line["id"] for line in lines}) == len(lines)
    opened = [line for line in lines if line["rejected_meta"]["negative"] == "sr0.5_wo_image"]
    assert len(opened) == 20 and all("answer_gt" in one for one in opened)
    report = json.loads((out / "report.json").read_text())["sources"][0]
    assert "pairs left out by kind" not in report  # the same model says other things under its second name


def test_a_file_has_one_limit_of_tiles_and_a_name_that_fits(tmp_path):
    out = output.Output(tmp_path)
    for number, tiles in enumerate((6, 12, 12, None)):
        pair = {"id": f"p{number}", "question": f"{number}?", "chosen": "a", "rejected": "b"}
        pair["rejected_meta"] = {"negative": "wrong_answer"}
        out.paired({"id": "r"}, [pair], "長" * 300, tiles)
    out.close({}, [])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert sorted((one.get("max_dynamic_patch", 0), one["length"]) for one in meta.values()) == [(0, 1), (6, 1), (12, 2)]


def test_step_by_step(folder, capsys):
    def run(*words):
        assert main(["mmpr", *words]) == 0, capsys.readouterr().err

    with StubServer() as stub:
        run("sample", stub.url, "q.jsonl", "--output", "sampled", "--limit", "10")
        run("verify", "sampled", "--output", "verified", "--answer-format", "any")
        asked = stub.asked
        run("verify", "sampled", "--output", "strict")
        run("pair", "verified", "--output", "pairs", "--accuracy", "0.1", "0.9", "--max-pairs", "2")
        first, *rest = [json.loads(line) for line in (folder / "q.jsonl").read_text().splitlines()]
        before, said = (folder / "pairs" / "output.jsonl").read_text(), read_json_lines("verified/output.jsonl")[0]["responses"][0]
        write(folder, [{**first, "answer": said["answer"]}, *rest])  # a corrected answer goes through all steps
        run("sample", stub.url, "q.jsonl", "--output", "sampled", "--limit", "10")
        run("verify", "sampled", "--output", "verified", "--answer-format", "any")
        for name in ("pairs", "anew"):
            run("pair", "verified", "--output", name, "--accuracy", "0.1", "0.9", "--max-pairs", "2")
        corrected, anew = ((folder / name / "output.jsonl").read_text() for name in ("pairs", "anew"))
        assert before != corrected == anew and stub.asked == asked
        run("sample", stub.url, "q.jsonl", "--output", "told", "--n", "1", "--prompt", "plain")
        run("continue", stub.url, "told", "--output", "gone_on", "--ratio", "0.25")
        assert main(["mmpr", "pair", "strict", "--output", "none"]) == 2 and "in the format" in capsys.readouterr().err
        assert main(["mmpr", "pair", "pairs", "--output", "twice"]) == 2 and "no verdicts" in capsys.readouterr().err
        assert main(["mmpr", "pair", "nowhere", "--output", "none"]) == 2 and "nowhere" in capsys.readouterr().err
    assert read_json_lines("strict/output.jsonl")[0]["accuracy"] == 0
    pairs, gone_on = (load_preferences(f"{name}/mmpr/meta.json") for name in ("pairs", "gone_on"))
    assert 1 <= len(pairs) <= 20 and len(gone_on) == 12


@pytest.mark.slow
def test_rounds_train_and_go_on_with_the_trained_model(folder, interpreter, monkeypatch, caplog):
    """Two rounds of the open route, on the model's own responses; the same command again does nothing more."""
    monkeypatch.setattr("sys.executable", interpreter)
    arguments = [one for one in write_job(folder, pairs=2) if not one.startswith("data.")]
    train = [one for one in arguments if not one.startswith("model.name_or_path=")] + ["trainer.max_steps=1"]
    config = {
        "sources": [{"path": "q.jsonl", "route": "open"}],
        "models": [
            {"model": next(one.partition("=")[2] for one in arguments if one.startswith("model.name_or_path=")), "device": "cpu"}
        ],
        "sample": {"max_new_tokens": 400},
        "rounds": 2,
        "train": train,
    }
    (folder / "c.yaml").write_text(json.dumps(config))
    assert main(["mmpr", "make", "c.yaml", "--output", "out"]) == 0
    before = contents(folder / "out")
    weights = [before[f"round_{number}/run/model.safetensors"] for number in (1, 2)]
    assert weights[0] != weights[1] and {"round_1/meta.json", "round_2/meta.json"} <= set(before)
    assert main(["mmpr", "make", "c.yaml", "--output", "out"]) == 0 and contents(folder / "out") == before
    name = read_json_lines(next((folder / "out" / "round_2" / "annotations").iterdir()))[0]["chosen_meta"]["model"]
    assert name == "round_1"
    assert "stays as it is: its" not in caplog.text
    write(folder, read_json_lines(folder / "q.jsonl")[1:])
    (folder / "c.yaml").write_text(json.dumps({**config, "continue": {"ratio": 0.25}}))
    assert main(["mmpr", "make", "c.yaml", "--output", "out"]) == 0 and contents(folder / "out") == before
    for number in (1, 2):  # what is not followed is said, with what to do
        assert re.search(rf"round_{number} has trained its model.*questions, continue have changed.*another folder", caplog.text)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ('{"id": ', "bad.jsonl:1"),
        ("[1]", "bad.jsonl:1"),
        ('{"question": "How many?", "answer": "3"}', "no id"),
        ('{"id": "x", "ground_truths": ["3"], "responses": [{"t": 1}]}', "bad.jsonl:1"),
        ('{"id": "x", "ground_truths": ["3"]}', "mpo mmpr sample"),
        ('{"id": "x", "responses": [{"text": "3"}]}', "ground truth"),
    ],
)
def test_files_of_others(folder, capsys, line, name):
    (folder / "bad.jsonl").write_text(f"{line}\n")
    assert main(["mmpr", "verify", "bad.jsonl", "--output", "verified"]) == 2 and name in capsys.readouterr().err
    assert main(["mmpr", "pair", "bad.jsonl", "--output", "pairs"]) == 2


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ({"kind": "nmber"}, "'nmber'"),
        ({"answer": 1, "choices": ["red", "blue"]}, "'1' is none of its 2 choices"),
        ({"answer": "AC", "choices": ["red", "blue"]}, "'AC' is none"),
        ({"answer": "green", "A": "red", "B": "blue", "kind": "choice"}, "'green' is none"),
    ],
)
def test_what_no_response_can_answer_is_named_before_anything_is_asked(make, folder, capsys, line, name):
    write(folder, [{**read_json_lines(folder / "q.jsonl")[0], **line}])
    with StubServer() as stub:
        status, _, err = make(stub.url)
        assert status == 2 and name in err and stub.asked == 0
        assert main(["mmpr", "sample", stub.url, "q.jsonl", "--output", "s"]) == 2 and name in capsys.readouterr().err
        assert stub.asked == 0


SWIFT = ("messages", "images", "videos", "audios", "tools", "objects", "rejected_response", "label", "channel", "margin")
"""Columns that ms-swift reads: `RowPreprocessor.standard_keys` of ``swift/dataset/preprocessor/core.py`` (modelscope/ms-swift,
3602360a), without those with prefixes; the rest of the test is what its ``_check_messages`` and ``_check_rejected_response``
refuse."""


def test_ms_swift_reads_every_column(make, folder):
    with StubServer() as stub:
        assert make(stub.url)[0] == 0
    rows = [row for path in (folder / "out" / "swift").glob("*.jsonl") for row in read_json_lines(path)]
    assert rows
    for row in rows:
        assert {*row} <= {*SWIFT}
        assert all({*one} == {"role", "content"} and isinstance(one["content"], str) for one in row["messages"])
        assert {one["role"] for one in row["messages"]} <= {"system", "user", "assistant"}
        assert row["messages"][-1]["role"] == "assistant" and row["rejected_response"] != row["messages"][-1]["content"]
        said = "".join(one["content"] for one in row["messages"])
        assert said.count("<image>") == len(row.get("images", ())) and all(isinstance(one, str) for one in row.get("images", ()))


@pytest.mark.parametrize("answer", ["B", "(b)", "Blue", "B. blue", ["green", "blue"]])
def test_a_ground_truth_is_a_choice_by_letter_or_text(folder, answer):
    write(folder, [{"question": "Which?", "choices": ["red", "blue"], "answer": answer}])
    (question,) = Route(load_questions("q.jsonl"), is_open=False)
    assert question.messages


@pytest.mark.parametrize("answer", [["A", "C"], ["green", "red"], "A, C", "AC", "A and C"])
def test_all_of_several_right_choices_are_to_be_named(folder, answer):
    write(folder, [{"question": "Which?", "choices": ["red", "blue", "green"], "answer": answer}])
    [question] = load_questions(folder / "q.jsonl")
    assert (question.kind, question.ground_truths) == ("choices", ["A, C"])
    right = ("A, C", "C and A", "AC", "red, green", "(A), (C)", "A. red, C. green", "green and red.")
    for said in (*right, "A", "AB", "A, B, C", "A or C", "blue"):
        verdict = judge(f"I look.\nI think.\nFinal answer: {said}", question).verdict
        assert (verdict == "correct") == (said in right), said


def test_several_wordings_of_one_choice_are_no_several_choices(folder):
    for answer in (["B", "blue"], "1, 2", ["A", "D"]):
        write(folder, [{"question": "Which?", "choices": ["1, 2", "blue", "green"], "answer": answer}])
        assert [question.kind for question in load_questions(folder / "q.jsonl")] == [None]


@pytest.mark.parametrize("stray", ["I see <image>.", "<video> so 4", "a <IMG_CONTEXT> b"])
def test_a_response_that_stands_for_an_image_is_in_no_pair(make, folder, stray):
    def said(body, number):
        return f"{stray} It is 77." if number % 3 == 2 else f"So {number}.\nIt is {number % 3 and 78 or asked(body)}."

    def asked(body):
        return re.search(r"many in (\d+)", json.dumps(body))[1]

    with StubServer(text=said) as stub:
        assert make(stub.url, CONFIG.replace("q.jsonl", "q.jsonl, limit: 10"))[0] == 0
    loaded = load_preferences(folder / "out" / "meta.json")
    assert len(loaded) >= 10 and all(stray not in str(loaded[place]["rejected"]) for place in range(len(loaded)))
    report = json.loads((folder / "out" / "report.json").read_text())["sources"][0]
    assert report["pairs left out by kind"]["placeholder"] + report["pairs"] == report["pairs made"]


@pytest.mark.parametrize("name", ["meta.json", "annotations/a.jsonl", "trl/x", "run/model.safetensors"])
def test_a_folder_of_something_else_is_left_alone(make, folder, name):
    (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "out" / name).write_text("mine")
    with StubServer() as stub:
        status, _, err = make(stub.url)
    assert status == 2 and name.partition("/")[0] in err and stub.asked == 0
    assert [path.name for path in (folder / "out").rglob("*") if path.is_file()] == [name.rpartition("/")[2]]


def test_a_source_without_questions(make, folder):
    (folder / "empty.jsonl").write_text("")
    with StubServer() as stub:
        assert "empty.jsonl has no questions" in make(stub.url, CONFIG.replace("q.jsonl", "empty.jsonl"))[2]


def test_short_responses_are_dropped_by_name(folder, capsys):
    """Also by a job whose first step drops them."""
    with StubServer(text=lambda body, number: "word" if "in 3" in json.dumps(body) else "A red car stands here.") as stub:
        assert main(["mmpr", "sample", stub.url, "q.jsonl", "--output", "told", "--n", "1", "--prompt", "plain"]) == 0
        assert main(["mmpr", "continue", stub.url, "told", "--output", "on"]) == 0, capsys.readouterr().err
        assert main(["mmpr", "continue", stub.url, "q.jsonl", "--output", "no"]) == 2
    assert [(one["record"]["id"], one["step"]) for one in read_json_lines("on/dropped.jsonl")] == [("q3", "continue")]


def review(folder, lines, decisions):
    """A log of decisions by id, as `mpo review` writes it."""
    from mpo.review.documents import read_line
    from mpo.review.log import Log

    (folder / "log").unlink(missing_ok=True)
    log = Log(folder / "log", owner=True)
    log.open_file("", "f", dict)
    for place, line in enumerate(lines):
        if line["id"] in decisions:
            action, edits = decisions[line["id"]]
            log.append(action=action, by="anna", place=place, id=line["id"], key=read_line(line).key(), edits=edits)
    log.close()
    return str(folder / "log")


def test_verdicts_of_a_person_make_the_pairs(folder, capsys):
    """One question is rejected; of another, the first response is the only right one, whatever its verdict was."""
    with StubServer() as stub:
        assert main(["mmpr", "sample", stub.url, "q.jsonl", "--output", "sampled", "--n", "4", "--limit", "4"]) == 0
    assert main(["mmpr", "verify", "sampled", "--output", "verified", "--answer-format", "any"]) == 0
    records = read_json_lines(folder / "verified/output.jsonl")
    verdicts = [("responses", place, "verdict") for place in range(4)]
    old = [one["verdict"] for one in records[1]["responses"]]
    edits = [{"paths": [list(path)], "old": old[path[1]], "value": "wrong_answer" if path[1] else "correct"} for path in verdicts]
    log = review(folder, records, {"q0": ("reject", []), "q1": ("accept", edits)})
    capsys.readouterr()
    assert main(["mmpr", "pair", "verified", "--output", "pairs", "--review", log]) == 0
    assert "1 reject, 1 edit" in capsys.readouterr().out
    made = read_json_lines(folder / "pairs/output.jsonl")
    assert {pair["chosen"] for pair in made if pair["input_id"] == "q1"} <= {records[1]["responses"][0]["text"]}
    assert made and not [pair for pair in made if pair["input_id"] == "q0"]


def test_pairs_of_make_that_were_reviewed(make, folder):
    """Of a file of MMPR, one pair is swapped, one edited and one rejected; what was asked is not asked again."""
    with StubServer() as stub:
        assert make(stub.url)[0] == 0
        asked = stub.asked
        name = "annotations/s_0_pairs_vqa_correctness_rules.jsonl"
        before = {line["id"]: line for line in read_json_lines(folder / "out" / name)}
        swapped, edited, rejected = [*before][:3]
        edit = {"paths": [["question"]], "old": before[edited]["question"], "value": "How many, really?"}
        decisions = {swapped: ("swap", []), edited: ("accept", [edit]), rejected: ("reject", [])}
        status, out, _ = make(stub.url, CONFIG, "--review", review(folder, before.values(), decisions))
        assert status == 0 and stub.asked == asked and "1 swap" in out and "unmatched" not in out
    after = {line["id"]: line for line in read_json_lines(folder / "out" / name)}
    assert rejected not in after and after[edited]["question"] == "How many, really?"
    assert (after[swapped]["chosen"], after[swapped]["rejected"]) == (before[swapped]["rejected"], before[swapped]["chosen"])
    assert after[swapped]["metadata"]["review"]["by"] == "anna"
    assert {key: line for key, line in after.items() if key not in decisions} == {
        key: line for key, line in before.items() if key not in decisions
    }
    load_preferences(folder / "out" / "meta.json")
