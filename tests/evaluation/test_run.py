"""An evaluation from the command, against a server without a model and with a tiny model in this process."""

import copy
import gc
import json
import re
import weakref
from dataclasses import replace

import pytest
import torch
from stub_server import StubServer
from support import make_image, perturbed

from mpo.commands import main
from mpo.curation.dedupe import training_records
from mpo.evaluation.page import curves_plot, still
from mpo.evaluation.results import clustered_interval, summarize
from mpo.evaluation.run import Respond
from mpo.evaluation.run import evaluate as evaluate_call
from mpo.evaluation.scorers import ImplicitReward, MeanLogProb, ProcessReward, load_scorer, logprobs
from mpo.generation.generator import Response
from mpo.generation.local import LocalGenerator
from mpo.models import add_fuser
from mpo.schema import Question


@pytest.fixture
def questions(tmp_path):
    """12 questions about 6 images."""
    lines = []
    for place in range(12):
        make_image(place // 2).save(tmp_path / f"{place // 2}.png")
        lines.append(
            {"id": f"q{place}", "question": f"How many? ({place})", "image": f"{place // 2}.png", "answer": str(place % 5)}
        )
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "digits.jsonl"


def evaluate(capsys, *words):
    status = main(["evaluate", *map(str, words), "--json"])
    said = capsys.readouterr()
    return status, json.loads(said.out) if status == 0 else said.err


def test_every_figure_is_from_the_same_responses(questions, tmp_path, capsys):
    with StubServer() as one, StubServer(model="other") as two:
        words = (f"start={one.url}", f"tuned={two.url}", questions, "--output", tmp_path / "out", "--n", 4, "--mode", "both")
        status, results = evaluate(capsys, *words)
        asked = len(one.bodies)
        assert status == 0 and evaluate(capsys, *words) == (0, results)
        assert len(one.bodies) == asked  # nothing is asked again
        answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        first, *rest = questions.read_text().splitlines()
        said = answers[0]["greedy"][0]["text"].rpartition(" ")[2]
        assert not answers[0]["greedy"][0]["score"]
        questions.write_text("\n".join([json.dumps({**json.loads(first), "answer": said}), *rest]) + "\n")
        _, corrected = evaluate(capsys, *words)  # a corrected answer is no other question
        assert len(one.bodies) == asked and corrected["results"][0]["correct"] == results["results"][0]["correct"] + 1
        questions.write_text("\n".join([json.dumps({**json.loads(first), "kind": "list"}), *rest]) + "\n")
        assert evaluate(capsys, *words)[0] == 0 and len(one.bodies) == asked  # nor one of another kind, if it is asked alike
        questions.write_text("\n".join([first, *rest]) + "\n")
        assert evaluate(capsys, *words) == (0, results)
        questions.write_text("\n".join(rest) + "\n")  # one question fewer
        _, fewer = evaluate(capsys, *words)
        assert len(one.bodies) == asked and fewer["results"][0]["total"] == results["results"][0]["total"] - 1
        questions.write_text("\n".join([json.dumps({**json.loads(first), "question": "How many more?"}), *rest]) + "\n")
        _, changed = evaluate(capsys, *words)
        assert changed["results"][0]["total"] == results["results"][0]["total"]
        assert {"How many more?" in str(body["messages"]) for body in one.bodies[asked:]} == {True}
        questions.write_text("\n".join([first, *rest]) + "\n")
        asked = len(one.bodies)
        assert evaluate(capsys, *words) == (0, results) and len(one.bodies) == asked
        _, refused = evaluate(capsys, *words[:-4], "--mode", "both")
        assert "order is ['greedy', 'sampled'] there and ['greedy'] now" in refused and "steps." not in refused
        _, refused = evaluate(capsys, *words[:-3], 8, "--mode", "both")
        assert "steps.sampled.sampling.n is 4 there and 8 now" in refused
    rows = {(row["model"], row["mode"], row["figure"], row["k"]): row for row in results["results"]}
    assert len(rows) == 2 * 2 * (1 + 2 * 3)
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 * 2 * 12
    for model in ("start", "tuned"):
        own = [answer for answer in answers if (answer["model"], answer["mode"]) == (model, "direct")]
        right = [answer["greedy"][0]["text"].endswith(f"answer: {answer['ground_truths'][0]}") for answer in own]
        row = rows[model, "direct", "greedy", 1]
        assert (row["correct"], row["total"], row["unparsable"], row["dropped"]) == (sum(right), 12, 0, 0)
        assert row["interval"] == list(clustered_interval(right, [place // 2 for place in range(12)]))
        samples = [one["score"] for answer in own for one in answer["sampled"]]
        assert rows[model, "direct", "pass", 1]["score"] == pytest.approx(sum(samples) / 48)
        assert rows[model, "direct", "majority", 1]["score"] == pytest.approx(sum(samples) / 48)
        any_right = [max(one["score"] for one in answer["sampled"]) for answer in own]
        assert rows[model, "direct", "pass", 4]["correct"] == sum(any_right)
    assert {row["verdict"] for row in results["comparisons"]} == {"no difference shown"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 3 and "http" not in page.replace("http-equiv", "")


def test_limits_of_tiles_are_measured_one_by_one(questions, tmp_path, capsys, internvl, processor):
    """With their responses each, under a name each; a local model gets as many tokens of an image as its limit allows."""
    for part in (perturbed(internvl), processor):
        part.save_pretrained(tmp_path / "model")
    make_image(0).resize((300, 150)).save(tmp_path / "0.png")
    words = (f"tiny={tmp_path / 'model'}", questions, "--limit", 1, "--output", tmp_path / "out", "--dtype", "float32")
    status, results = evaluate(capsys, *words, "--tile-limit", 1, "--tile-limit", 4)
    assert status == 0 and {row["model"] for row in results["results"]} == {"tiny@1", "tiny@4"}
    ledgers = [path.read_text() for path in (tmp_path / "out" / "jobs").rglob("ledger.jsonl")]
    assert len({re.search(r'"prompt_tokens": ?(\d+)', ledger)[1] for ledger in ledgers}) == len(ledgers) == 2


def test_modes_end_as_the_kind_of_answer_needs(questions, tmp_path, capsys):
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    lines = [{**lines[0], "choices": ["red", "blue"], "answer": "A"}, {**lines[1], "kind": "box", "answer": "[1, 1, 2, 2]"}]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with StubServer() as stub:
        assert evaluate(capsys, stub.url, questions, "--output", tmp_path / "out", "--mode", "cot")[0] == 0
        said = sorted(json.dumps(body["messages"]) for body in stub.bodies)
    assert "A. red\\nB. blue" in said[0] and "LETTER" in said[0] and "step by step" in said[0]
    assert "[x1, y1, x2, y2]" in said[1] and "LETTER" not in said[1]


def test_models_that_differ_are_told_apart(questions, tmp_path, capsys):
    """A model that knows the answers against one that guesses, on 60 questions about 60 images."""
    lines = [{"id": f"q{place}", "question": f"{place}?", "answer": str(place % 7)} for place in range(60)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = [
        {
            "model": model,
            "id": line["id"],
            "group": line["id"],
            "subject": "",
            "cluster": line["id"],
            "ground_truths": [line["answer"]],
        }
        | {
            "dropped": False,
            "sampled": [],
            "ranks": {},
            "greedy": [{"score": float(right(place)), "text": "", "reason": "", "none": False}],
        }
        for model, right in (("start", lambda place: place % 3 == 0), ("tuned", lambda place: place % 3 < 2))
        for place, line in enumerate(lines)
    ]
    found = {(model, "b", "direct"): [part for part in parts if part["model"] == model] for model in ("start", "tuned")}
    [row] = summarize(found, 1)["comparisons"]
    assert (row["gained"], row["lost"], row["verdict"]) == (20, 0, "better")
    assert row["difference"] == pytest.approx(1 / 3) and 0.2 < row["interval"][0] < 1 / 3 < row["interval"][1] < 0.47
    assert summarize(dict(reversed(found.items())), 1)["comparisons"][0]["verdict"] == "worse"
    for part in parts:  # of the last third of the questions, which are those that are gained, a subject
        part["subject"] = "gained" if int(part["id"][1:]) % 3 == 1 else "same"
    of_parts = summarize(found, 1)["comparisons"][0]["subjects"]
    gained, same = of_parts["gained"], of_parts["same"]
    assert (gained["total"], gained["difference"], gained["interval"]) == (20, 1.0, [1.0, 1.0])
    assert (same["total"], same["difference"], same["interval"]) == (40, 0.0, [0.0, 0.0])


@pytest.mark.parametrize(
    ("change", "words", "named"),
    [
        ({"answer": None}, (), "q0"),
        ({}, ("--scorer", "logprob"), "Give k"),
        ({}, ("--n", 2, "--scorer", "logprob"), "not of a server"),
        ({}, ("--n", 2, "--scorer", "reward"), "Give both models"),
        ({}, ("--n", 2, "--scorer", "mine"), "MODULE:FUNCTION"),
        ({"id": "q1"}, (), "q1"),
        ({"kind": "banana"}, (), "'q0': kind='banana'"),
        ({"answer": "3", "choices": ["red", "blue"]}, (), "'3' is none of its 2 choices"),
        ({}, ("--temperature", 0.3), "--temperature=0.3"),
        ({}, ("--reference", "a/b"), "--reference=a/b"),
        ({}, ("--device", "cpu"), "--device=cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(questions, tmp_path, capsys, change, words, named):
    first, *rest = questions.read_text().splitlines()
    questions.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]) + "\n")
    with StubServer() as stub:
        status, error = evaluate(capsys, stub.url, questions, "--output", tmp_path / "out", *words)
        assert status == 2 and named in error and not stub.bodies


def test_plain_adds_nothing_to_the_question(questions, tmp_path, capsys):
    with StubServer() as stub:
        assert evaluate(capsys, stub.url, questions, "--output", tmp_path / "out", "--mode", "plain")[0] == 0
        asked = {body["messages"][-1]["content"][-1]["text"] for body in stub.bodies}
    assert asked == {f"How many? ({place})" for place in range(12)}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["model"], "benchmark"),
        (["q.jsonl"], "model"),
        (["mmvet", "m"], "judging"),
        (["m", "Chart_QA=q.jsonl"], "Did you mean chartqa=q.jsonl"),
        (["m", "folder/Chart-QA.jsonl"], "Did you mean chartqa=folder/Chart-QA.jsonl"),
        (["m", "folder/mm_vet.jsonl"], "judging"),
        (["mmhal-tuned=./gone", "q.jsonl"], "./gone is not a folder"),  # a model of one's own
        (["http://127.0.0.1:1/v1", "other=./gone", "q.jsonl"], "./gone is not a folder"),  # before the first one is asked
        (["mathvistaa", "q.jsonl"], "'mathvista'"),
        (["http://127.0.0.1:1/v1", "chart-qa"], "'chartqa'"),
    ],
)
def test_models_and_benchmarks_are_told_apart(tmp_path, capsys, words, named):
    (tmp_path / "q.jsonl").write_text('{"question": "?", "answer": "1"}\n')
    words = [tmp_path / word if word == "q.jsonl" else word for word in words]
    status, error = evaluate(capsys, *words, "--output", tmp_path / "out")
    assert status == 2 and named in error


QUESTION = Question([{"role": "user", "content": "What is in the image?"}], [make_image(0)], ["a cat"])


def test_the_implicit_reward_is_the_difference_of_log_probs(internvl, processor):
    trained = LocalGenerator(perturbed(copy.deepcopy(internvl)), processor)
    start, responses = LocalGenerator(internvl, processor), ["one", "one two", "one", ""]
    rewards = ImplicitReward(trained, start, beta=0.5)(QUESTION, responses)
    means = [MeanLogProb(model)(QUESTION, responses) for model in (trained, start)]
    assert rewards[0] == rewards[2] != 0 and rewards[3] < min(rewards[:3]) and means[0][3] < means[0][0] < 0
    tokens = [len(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in ("one", "one two")]
    for place, number in enumerate(tokens):
        assert rewards[place] == pytest.approx(0.5 * number * (means[0][place] - means[1][place]), rel=1e-4)
    assert ImplicitReward(start, start)(QUESTION, responses)[:3] == [0.0] * 3


class Judge:
    """A process reward model that doubts every step with a question mark."""

    def identity(self):
        return "judge"

    def generate(self, requests, **settings):
        self.requests = requests
        self.settings = settings
        doubts = ["?" in request.messages[-1]["content"][-1]["text"] for request in requests]
        return [[Response("-" if doubt else "+", "length", 1, 1, (-0.2231435,))] for doubt in doubts]


@pytest.mark.parametrize(("mode", "says"), [("direct", "Answer with the letter"), ("cot", "step by step")])
def test_responses_are_scored_with_the_prompt_that_they_answer(tmp_path, capsys, internvl, processor, mode, says):
    """The log-probs of the samples are those after the question with its choices and the words of the mode."""
    for part in (internvl, processor):
        part.save_pretrained(tmp_path / "model")
    make_image(0).save(tmp_path / "0.png")
    line = {"id": "q0", "question": "What colour?", "image": "0.png", "choices": ["red", "blue"], "answer": "A"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    words = (f"m={tmp_path / 'model'}", tmp_path / "q.jsonl", "--output", tmp_path / "out", "--mode", mode, "--n", 2)
    status, _ = evaluate(capsys, *words, "--scorer", "logprob", "--max-new-tokens", 4, "--dtype", "float32")
    [ranked] = (tmp_path / "out" / "jobs").rglob("rank-logprob-*/output.jsonl")
    [answer] = (json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines())
    model = LocalGenerator(internvl.eval(), processor)
    [asked] = Respond(model, mode=mode, field="greedy").requests({**line, "messages": QUESTION.messages, "images": [make_image(0)]})
    assert status == 0 and says in asked.messages[-1]["content"][-1]["text"]
    texts = [one["text"] for one in answer["sampled"]]
    question = Question([{"role": "user", "content": f"What colour?{asked.messages[-1]['content'][-1]['text'].partition('?')[2]}"}])
    expected = MeanLogProb(model)(replace(question, images=[make_image(0)]), texts)
    assert json.loads(ranked.read_text())["ranks"] == pytest.approx(expected, rel=1e-4) == answer["ranks"]["logprob"]


def test_a_process_reward_is_the_mean_over_steps():
    """Steps with probability 0.8 of + and 0.8 of -: (0.8 + 0.2) / 2; earlier steps stand in the conversation."""
    judge = Judge()
    scores = ProcessReward(judge, max_steps=2)(QUESTION, ["First.\n\nThen?", "All in one.", "", "a\n\nb\n\nc\n\nd"])
    assert scores == pytest.approx([0.5, 0.8, 0.0, 0.8])
    assert [len(request.messages) for request in judge.requests] == [1, 3, 1, 1, 3]
    assert judge.settings == {"temperature": 0.0, "max_new_tokens": 1, "logprobs": True}


def test_a_process_reward_of_a_model_in_this_process(internvl, processor):
    """Its head says "+" or "-" by the sign of one direction; the score is the probability of "+", by the log-probs of both."""
    model, (good,), (bad,) = (
        copy.deepcopy(internvl),
        *(processor.tokenizer(sign, add_special_tokens=False)["input_ids"] for sign in "+-"),
    )
    scorer, responses, seen = ProcessReward(LocalGenerator(model, processor)), ["one\n\ntwo 2\n\nthree", "two", "a cat\n\n7"], []
    hook = model.lm_head.register_forward_pre_hook(lambda head, args: seen.extend(args[0][:, -1]))
    scorer(QUESTION, responses)
    hook.remove()
    states, weight = torch.stack(seen), torch.zeros_like(model.lm_head.weight)
    weight[good] = 20 * (states[0] - states.mean(0))  # so that some are above the mean, and some below
    weight[bad] = -weight[good]
    model.lm_head.weight.data = weight
    centre = float(states.mean(0) @ weight[good])
    model.lm_head.bias = torch.nn.Parameter(torch.full((len(weight),), -50.0))
    model.lm_head.bias.data[good], model.lm_head.bias.data[bad] = -centre, centre
    judge = LocalGenerator(model, processor)
    scorer = ProcessReward(judge)
    expected = []
    for response in responses:
        steps = scorer.steps(response)
        turns = [Question(scorer._request(QUESTION, steps, end).messages, QUESTION.images) for end in range(len(steps))]
        said = [[float(values[0].exp()) for values in logprobs(judge, turn, ["+", "-"])] for turn in turns]
        expected.append(sum(plus if plus > minus else 1 - minus for plus, minus in said) / len(said))
    assert scorer(QUESTION, responses) == pytest.approx(expected, rel=1e-4)
    assert len({round(score, 3) for score in expected}) == 3 and 0 < min(expected) < max(expected) < 1


def test_scorers_of_ones_own():
    assert load_scorer(f"{__name__}:scores_of_ones_own").function is scores_of_ones_own
    for name in ("nowhere:at_all", "json:no", "json", "json:dumps", "json:__name__", "gone.py:score"):
        with pytest.raises(ValueError, match=name):
            load_scorer(name)


def test_a_scorer_in_a_file_scores_anew_when_it_is_edited(questions, tmp_path, capsys):
    own, asked = tmp_path / "own.py", []
    for sign, expected in (("", 3), ("-", 0)):
        own.write_text(f"def late(question, responses):\n    return [{sign}place for place in range(len(responses))]\n")
        with StubServer() as stub:
            words = (f"m={stub.url}", questions, "--output", tmp_path / "out", "--n", 4, "--scorer", f"{own}:late")
            status, results = evaluate(capsys, *words)
            asked.append(len(stub.bodies))
        answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
        [row] = [row for row in results["results"] if row["figure"] == f"best by {own}:late" and row["k"] == 4]
        assert row["correct"] == sum(answer["sampled"][expected]["score"] for answer in answers)
    assert asked[0] and not asked[1]


def test_a_finished_evaluation_needs_no_server(questions, tmp_path, capsys):
    """Neither for the same page, nor for another one from the same responses; but for responses that are missing."""
    FAULTS.update({f"q{place}": lambda responses: range(4) for place in range(12)})
    with StubServer() as stub:
        words = (f"m={stub.url}", questions, "--output", tmp_path / "out", "--n", 4, "--scorer", f"prm={stub.url}")
        status, results = evaluate(capsys, *words)
        assert status == 0
    (tmp_path / "out" / "report.html").unlink()
    assert evaluate(capsys, *words) == (0, results) and (tmp_path / "out" / "report.html").is_file()
    (tmp_path / "out" / "jobs" / "m" / "digits" / "direct" / "progress.json").unlink()
    assert evaluate(capsys, *words) == (0, results)
    other = evaluate(capsys, *words, "--scorer", f"{__name__}:scores_of_ones_own")
    assert other[0] == 0 and len(other[1]["results"]) == len(results["results"]) + 3
    assert evaluate(capsys, *words, "--mode", "both")[0] == 1


def test_only_what_is_new_is_scored(questions, tmp_path, capsys):
    """Also where all responses to a question with another image are the same, and of lines without ids, whose places shift."""
    lines = [{**json.loads(line), "id": None} for line in questions.read_text().splitlines()]
    with StubServer(text=lambda body, number: "2") as stub, StubServer() as scorer:
        words = (f"m={stub.url}", questions, "--output", tmp_path / "out", "--n", 2, "--scorer", f"prm={scorer.url}")

        def scored(lines):
            questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
            before = scorer.asked
            assert evaluate(capsys, *words)[0] == 0
            return scorer.asked - before

        assert scored(lines) and [scored(lines), scored(lines[1:]), scored(lines[::-1])] == [0, 0, 0]
        make_image(9).save(tmp_path / "0.png")
        assert scored(lines) == 2 * 2
        make_image(0).save(tmp_path / "0.png")
        assert scored(lines) == 0


def scores_of_ones_own(question, responses):
    """What the tests' own scorer gives: by the question's number."""
    return FAULTS[question.id](responses)


def fails(responses):
    raise RuntimeError("boom")


def not_scored(responses):
    raise ValueError("too long")


FAULTS = {}


@pytest.mark.parametrize(
    ("gives", "named"),
    [
        (fails, "boom"),
        (lambda responses: None, "None"),
        (lambda responses: [1.0], "4 finite numbers"),
        (lambda responses: [float("nan")] * 4, "nan"),
        (lambda responses: [10**400] * 4, "too large"),
        (lambda responses: dict.fromkeys(range(4), 1.0), "in order"),
        (lambda responses: {1.0, 2.0, 3.0, 4.0}, "in order"),
    ],
)
def test_a_scorer_that_gives_anything_else_is_named(questions, tmp_path, capsys, gives, named):
    FAULTS.update({f"q{place}": gives for place in range(12)})
    own = f"{__name__}:scores_of_ones_own"
    with StubServer() as stub:
        words = (stub.url, questions, "--output", tmp_path / "out", "--n", 4, "--limit", 1, "--scorer", own)
        status, error = evaluate(capsys, *words)
        assert status == 2 and own in error and "'q0'" in error and named in error
        FAULTS["q0"], asked = (lambda responses: range(4)), len(stub.bodies)
        assert evaluate(capsys, *words)[0] == 0 and len(stub.bodies) == asked


@pytest.mark.parametrize("first", [True, False])
def test_questions_without_ranks_count_and_are_counted(questions, tmp_path, capsys, first):
    """Whether the first or the last is not answered, or not scored, the figure has all questions."""
    refused, unscored = ("q0", "q1") if first else ("q11", "q10")
    FAULTS.update({f"q{place}": lambda responses: range(4) for place in range(12)} | {unscored: not_scored})
    with StubServer(poison=lambda body: 400 if f"({refused[1:]})" in json.dumps(body) else None) as stub:
        words = (stub.url, questions, "--output", tmp_path / "out", "--n", 4, "--scorer", f"{__name__}:scores_of_ones_own")
        rows = {(row["figure"], row["k"]): row for row in evaluate(capsys, *words)[1]["results"]}
    row = rows[f"best by {__name__}:scores_of_ones_own", 4]
    assert (row["total"], row["dropped"], rows["majority", 4]["dropped"]) == (12, 2, 1)


@pytest.mark.parametrize(
    ("asked", "choices", "listed"),
    [
        ("What is 12 + 3?", ["1", "2", "3"], True),
        ("In triangle ABC, which is right?", ["A", "B", "C"], True),
        ("Which?", ["y", "x"], True),
        ("Which?\nA. red\nB. blue", ["red", "blue"], False),
        ("Which? (A) red (B) blue", ["red", "blue"], False),
    ],
)
def test_choices_are_shown_with_their_letters(questions, tmp_path, capsys, asked, choices, listed):
    questions.write_text(json.dumps({"id": "1", "question": asked, "choices": choices, "answer": "A"}))
    with StubServer() as stub:
        assert evaluate(capsys, stub.url, questions, "--output", tmp_path / "out")[0] == 0
    assert (f"{asked}\nA. {choices[0]}\nB. {choices[1]}" in stub.bodies[0]["messages"][-1]["content"]) == listed


def test_unparsable_is_of_the_responses_of_the_figure(questions):
    """Of two questions the greedy responses have no answer; the samples of one have none either."""
    about = {"subject": "", "ground_truths": ["1"], "dropped": False, "ranks": {}, "classes": [None, 1]}
    one = {"text": "", "reason": "", "score": 0.0, "none": True}
    rows = [
        {**about, "id": name, "group": name, "cluster": name, "greedy": [one], "sampled": [one, {**one, "none": none}]}
        for name, none in (("a", True), ("b", False))
    ]
    found = {row["figure"]: row["unparsable"] for row in summarize({("m", "b", "cot"): rows}, 2)["results"]}
    assert found == {"greedy": 2, "majority": 1, "pass": 1}


@pytest.mark.parametrize("score", [1.0, 0.8])
def test_questions_of_one_image_are_no_evidence(questions, score):
    """A model that is right, or nearly so, about all 40 questions: of 40 images better, of one image not shown."""

    def judged(value, images):
        kept = {"text": "", "reason": "", "none": False}
        about = {"subject": "", "ground_truths": ["1"], "dropped": False, "sampled": [], "ranks": {}}
        return [
            {**about, "id": str(n), "group": str(n), "cluster": str(n % images), "greedy": [{**kept, "score": value}]}
            for n in range(40)
        ]

    for images, verdict in ((40, "better"), (5, "no difference shown"), (1, "no difference shown")):
        found = {("start", "b", "direct"): judged(0.0, images), ("tuned", "b", "direct"): judged(score, images)}
        [row] = summarize(found, 1)["comparisons"]
        assert (row["gained"], row["verdict"]) == (40, verdict)


def test_what_training_has_seen_is_kept(questions, tmp_path, capsys):
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    asked = {place: {name: lines[place][name] for name in ("question", "image")} for place in (0, 2, 4)}
    turns = [("human", "What is this?"), ("gpt", "An image."), ("human", asked[2].pop("question")), ("gpt", "2")]
    seen = {
        "pairs": {**asked[0], "chosen": "a", "rejected": "b"},
        "talks": {**asked[2], "conversations": [{"from": role, "value": text} for role, text in turns]},
        "questions": {**asked[4], "answer": "1"},
    }
    for name, line in seen.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n")
    with StubServer() as stub:
        words = (stub.url, questions, "--output", tmp_path / "out")
        status, results = evaluate(capsys, *words, *(word for name in seen for word in ("--train", tmp_path / f"{name}.jsonl")))
    assert status == 0 and results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["contamination"]["digits"]["both"] == 3 and "3 with an image" in (tmp_path / "out" / "report.html").read_text()
    (tmp_path / "away").mkdir()
    away = (tmp_path / "pairs.jsonl").rename(tmp_path / "away" / "pairs.jsonl")
    with pytest.raises(ValueError, match=r"Set image_root .*--train.*mixture"):
        list(training_records(away))
    asked = tmp_path / "away" / "questions.jsonl"  # questions, not pairs without a completion
    asked.write_text(json.dumps({"question": "?", "answer": "1", "image": str(tmp_path / "a.png")}) + "\n")
    with pytest.raises(ValueError, match=r"a.png.*--train.*mixture"):
        list(training_records(asked))
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(json.dumps({"sources": [{"path": str(away), "image_root": str(tmp_path)}]}))
    assert len(list(training_records(mixture))) == 1


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": True}, {"modes": ()}, {"models": {}}, {"benchmarks": {}}])
def test_nothing_to_measure_is_refused(tmp_path, wrong):
    given = {"models": {"a": None}, "benchmarks": {"b": [QUESTION]}, "folder": tmp_path, **wrong}
    with pytest.raises(ValueError, match="a benchmark and a mode"):
        evaluate_call(**given)


def test_ids_that_are_there_twice_are_named_with_their_benchmark(tmp_path):
    """Before any model is opened, which would raise here."""
    twice = [replace(QUESTION, id=name, ground_truths=["7"]) for name in ("x", "y", "x")]
    with pytest.raises(ValueError, match="1 ids of b are .* 'x'"):
        evaluate_call({"a": None}, {"b": twice}, tmp_path)


def test_a_model_is_let_go_before_the_next_is_opened(tmp_path, internvl, processor):
    opened = []

    def model():
        gc.collect()
        assert [one() for one in opened] == [None] * len(opened)
        opened.append(weakref.ref(found := LocalGenerator(copy.deepcopy(internvl), processor)))
        return found

    asked = {"b": [replace(QUESTION, id="q")]}
    scorers = {"logprob": MeanLogProb}
    evaluate_call({"a": model, "b": model}, asked, tmp_path, k=2, scorers=scorers, max_new_tokens=2, progress=False)
    assert len(opened) == 2


def test_an_adapter_against_its_base(questions, tmp_path, capsys, internvl, processor):
    """--base is for the adapter alone, and the reward is only of what was trained from the reference."""
    from peft import LoraConfig, get_peft_model

    for part in (internvl, processor):
        part.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(internvl), adapter).save_pretrained(tmp_path / "tuned")
    words = (questions, "--output", tmp_path / "out", "--n", 2, "--limit", 2, "--max-new-tokens", 2, "--scorer", "reward")
    models = (tmp_path / "base", f"tuned={tmp_path / 'tuned'}")
    status, results = evaluate(capsys, *models, *words, "--base", tmp_path / "base")
    assert status == 0
    assert {row["model"] for row in results["results"] if row["figure"] == "best by reward"} == {"tuned"}
    status, error = evaluate(capsys, models[0], *words, "--base", tmp_path / "base")
    assert status == 2 and "--base" in error and str(models[0]) in error
    config = tmp_path / "tuned" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    fused = tmp_path / "fused"
    for part in (add_fuser(copy.deepcopy(internvl), layers=1), processor):
        part.save_pretrained(fused)
    status, error = evaluate(capsys, *models, *words, "--base", fused)  # whose shapes fit
    assert status == 2 and all(name in error for name in (str(fused), "internvl_mmfuser", str(tmp_path / "base")))


def test_a_run_that_cannot_be_opened_is_named_before_anything_is_asked(questions, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-3" / "config.json").write_text("{}")
    with StubServer() as stub:
        status, said = evaluate(capsys, f"start={stub.url}", f"mpo={tmp_path / 'run'}", questions, "--output", tmp_path / "out")
        assert status == 2 and "Give one of its folders: checkpoint-3" in said and not stub.bodies


def test_videos(tmp_path, capsys, internvl, processor):
    """A video is shown, scored by its log-probs, and a frame of it is on the page."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 64, 32
        for seed in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(make_image(seed))))
        container.mux(stream.encode())
    for name, model in (("start", internvl), ("tuned", perturbed(copy.deepcopy(internvl), scale=1.0))):
        for part in (model, processor):
            part.save_pretrained(tmp_path / name)
    row = {"video": "a.mp4", "candidates": ["one", "two"], "answer": "one", "task_type": "Count"}
    lines = [{**row, "question": f"Which ({place})?"} for place in range(3)]
    (tmp_path / "mv.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = (f"mvbench={tmp_path / 'mv.jsonl'}", "--output", tmp_path / "out", "--n", 2, "--max-new-tokens", 2)
    status, results = evaluate(capsys, tmp_path / "start", f"tuned={tmp_path / 'tuned'}", *words, "--scorer", "reward")
    rows = {(row["model"], row["figure"], row["k"]): row for row in results["results"]}
    assert status == 0 and rows["tuned", "best by reward", 2]["dropped"] == 0
    assert still(tmp_path / "a.mp4").startswith("data:image/jpeg")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert still(tmp_path / "a.mp4") is None


def test_a_label_or_a_file_of_any_name_is_drawn_as_it_is(questions, tmp_path, capsys, monkeypatch):
    """No formula of matplotlib's, and no line that its legend leaves out; a label that is none is named."""
    odd = questions.rename(tmp_path / r"q$\frac$.jsonl")
    with StubServer() as stub:
        status, results = evaluate(capsys, f"_base={stub.url}", f"tuned={stub.url}", odd, "--n", 2, "--output", tmp_path / "out")
        assert status == 0 and "start model" in evaluate(capsys, f"start model={stub.url}", odd, "--output", tmp_path / "other")[1]
    (tmp_path / "lr=1e-4").mkdir()
    monkeypatch.chdir(tmp_path)
    assert "json in lr=1e-4," in evaluate(capsys, "lr=1e-4", odd, "--output", "other")[1]
    assert [text.get_text() for text in curves_plot(results).axes[0].get_legend().get_texts()][0].strip().startswith("_base")
