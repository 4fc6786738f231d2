"""lmms-eval through `mpo evaluate`: its commands, its files, and, where its environment exists, the real run beside ours."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from support import make_image

from mpo.commands import main
from mpo.evaluation import harness
from mpo.evaluation.run import MODES

RECORDED = Path(__file__).parent / "lmms_eval"
"""Files that lmms-eval 0.7.3 wrote for the task of ``docs/evaluation.md``; paths of images are shortened."""


def evaluate(capsys, *words):
    status = main(["evaluate", *map(str, words)])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_dry_run_prints_the_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    words = ("a=some/model", "http://localhost:1/v1", "--harness", "lmms-eval", "--tasks", "pope, chartqa", "--limit", 5)
    words += ("--include-path", tmp_path / "tasks", "--output", tmp_path / "out", "--workers", 3, "--dry-run")
    status, out, _ = evaluate(capsys, *words)
    venv, link, install, serve, *runs = out.splitlines()
    python = str(harness.environment() / "bin" / "python")
    assert status == 0 and not list(tmp_path.glob("cache/*")) and not (tmp_path / "out").exists()
    assert venv == f"{sys.executable} -m venv {harness.environment()}" and harness.environment().is_relative_to(tmp_path)
    assert link.startswith(python) and "lmms-eval==0.7.3" in install and "serve some/model" in serve
    for run, model in zip(
        runs, ("model_version=some/model,base_url=http://localhost:8000/v1", "http://localhost:1/v1"), strict=True
    ):
        assert model in run and "num_concurrent=3" in run and "--tasks pope,chartqa" in run and "--limit 5" in run
        assert (
            f"--include_path {tmp_path / 'tasks'}" in run
            and f"mkdir -p {(work := tmp_path / 'out/harness/empty')} && cd {work} && " in run
        )
    # One model is served at a time, and asked once it answers.
    assert ["/health" in run for run in runs] == [run.endswith("; kill $!; wait $!") for run in runs] == [True, False]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("m", "--harness", "lmms-eval"), "--tasks"),
        (("m", "--harness", "lmms-eval", "--tasks", "pope", "--n", "8"), "--n"),
        (("m", "--harness", "lmms-eval", "--tasks", "pope", "--mode", "cot"), "--mode"),
        (("m", "q.jsonl", "--harness", "lmms-eval", "--tasks", "pope"), "q.jsonl"),
        (("a,b", "--harness", "lmms-eval", "--tasks", "pope", "--dry-run"), "a,b"),
        (("m", "--harness", "lmms-eval", "--tasks", "pope", "--include-path", "gone"), "gone"),
        (("m", "n", "n", "--harness", "lmms-eval", "--tasks", "pope"), "n"),
        (("m", "q.jsonl", "--tasks", "pope"), "--tasks"),
        (("m", "q.jsonl", "--dry-run"), "--dry-run"),
    ],
)
def test_what_makes_no_sense_with_it_is_refused(tmp_path, capsys, words, named):
    status, _, err = evaluate(capsys, *words, "--output", tmp_path / "out")
    assert status == 2 and named in err


def test_its_files_are_read(tmp_path):
    """Its number is the mean of its samples, which the recorded files hold; a metric that is no mean is kept as it is."""
    found = list(harness.read_results(RECORDED))
    [(task, metric, rows, row)] = found
    assert (task, metric, row["metric"], row["filter"]) == ("tiny_digits", "correct", "correct", "none")
    assert len(rows) == 40 and sum(one["greedy"][0]["score"] for one, _ in rows) / 40 == pytest.approx(row["value"])
    assert 0 < row["value"] < 1 and all(record["messages"] and record["images"] for _, record in rows)
    copy = shutil.copytree(RECORDED, tmp_path / "copy")
    [results] = copy.rglob("*_results.json")
    values = json.loads(results.read_text())
    values["results"]["tiny_digits"] |= {"f1,none": 0.3, "correct,strict": 0.0}
    results.write_text(json.dumps(values))
    [samples] = copy.rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    strict = [{**line, "correct": {"score": 0.0}} for line in lines]
    failed = {**lines[0], "doc_id": 99, "filtered_resps": "[LMMS_EVAL_REQUEST_FAILED after 5 retries] no", "correct": row["value"]}
    samples.write_text("".join(json.dumps(line) + "\n" for line in [*lines, failed, *strict, {**failed, "correct": 0.0}]))
    found = {name: (rows, row["value"]) for _, name, rows, row in harness.read_results(copy)}
    assert {name: len(rows) for name, (rows, _) in found.items()} == {"correct": 41, "f1": 0, "correct,strict": 41}
    assert [one["dropped"] for one, _ in found["correct"][0]] == [False] * 40 + [True] and found["f1"][1] == 0.3


TASK = """
task: tiny_digits
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 16, temperature: 0}}
process_results: !function utils.results
metric_list: [{{metric: correct, aggregation: mean, higher_is_better: true}}]
"""
UTILS = f"""
from PIL import Image

def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"] + {chr(10) + MODES["direct"][""]!r}

def results(doc, results):
    return {{"correct": float(results[0].strip() == doc["answer"])}}
"""


@pytest.mark.slow
@pytest.mark.skipif(not (harness.environment() / "complete").exists(), reason="lmms-eval's environment is not there")
def test_its_number_is_ours(tmp_path, capsys, internvl, processor):
    """A tiny model with random weights, whose own responses are the ground truth of every other question."""
    for part in (internvl, processor):
        part.save_pretrained(tmp_path / "model")
    lines = []
    for place in range(4):
        make_image(place).save(tmp_path / f"{place}.png")
        lines.append({"id": f"q{place}", "question": f"What is in image {place}?", "image": str(tmp_path / f"{place}.png")})

    def write(answers):
        given = [{**line, "answer": answer, "kind": "text"} for line, answer in zip(lines, answers, strict=True)]
        (tmp_path / "tiny_digits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in given))

    def ours(folder):
        words = (tmp_path / "tiny_digits.jsonl", "--device", "cpu", "--max-new-tokens", 16, "--output", tmp_path / folder)
        assert evaluate(capsys, f"m={tmp_path / 'model'}", *words)[0] == 0
        answers = [json.loads(line) for line in (tmp_path / folder / "answers.jsonl").read_text().splitlines()]
        return [answer["greedy"][0] for answer in answers]

    write(["nothing"] * 4)
    said = [one["text"].strip() for one in ours("first")]
    write([text if place % 2 else "nothing" for place, text in enumerate(said)])
    mine = ours("second")
    (tmp_path / "tasks" / "tiny_digits").mkdir(parents=True)
    (tmp_path / "tasks" / "tiny_digits" / "tiny_digits.yaml").write_text(TASK.format(questions=tmp_path / "tiny_digits.jsonl"))
    (tmp_path / "tasks" / "tiny_digits" / "utils.py").write_text(UTILS)
    words = ("--harness", "lmms-eval", "--tasks", "tiny_digits", "--include-path", tmp_path / "tasks", "--device", "cpu")
    assert evaluate(capsys, f"m={tmp_path / 'model'}", *words, "--output", tmp_path / "theirs")[0] == 0
    results = json.loads((tmp_path / "theirs" / "results.json").read_text())
    answers = [json.loads(line) for line in (tmp_path / "theirs" / "answers.jsonl").read_text().splitlines()]
    assert [answer["greedy"][0]["text"].strip() for answer in answers] == said
    assert results["harness"][0]["value"] == results["results"][0]["score"] == sum(one["score"] for one in mine) / 4 == 0.5
