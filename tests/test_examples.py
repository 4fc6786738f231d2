"""Scripts of examples/ run, on a small model and, where they ask a server, a stub; and are short."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import programs
from stub_server import StubServer
from support import make_image
from told import tell
from torch.distributed.elastic.utils.distributed import get_free_port

from mpo.data import load_questions
from mpo.demo.stages import train_on_examples
from mpo.io import read_json_lines
from mpo.losses import PairLogps
from mpo.losses.pairs import LOSSES
from mpo.models.small import small_internvl, small_processor
from mpo.pipelines.mmpr.sample import Sample, asked_of
from mpo.pipelines.step import to_record
from mpo.verification import MATCHERS, match

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.*")) if EXAMPLES.exists() else []
ON_CPU = ["trainer.use_cpu=true", "trainer.bf16=false", "trainer.max_steps=1", "trainer.global_batch_size=2"]
pytestmark = pytest.mark.skipif(not SCRIPTS, reason="the examples are not here")


@pytest.fixture
def here(files, monkeypatch, interpreter):
    """The folder of a small model, `pairs.jsonl` and commands that run in this environment's Python; also the current one."""
    for name, value in programs(files / "bin", interpreter).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(files)
    return files


@pytest.fixture
def python(monkeypatch, files):
    """Run a script in this process, with words; its names are returned."""

    def run(name, *words):
        monkeypatch.chdir(files)
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *map(str, words)])
        return runpy.run_path(sys.argv[0], run_name="__main__")

    return run


def shell(name, *words, **environment):
    done = subprocess.run(["sh", EXAMPLES / name, *words], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_short_and_is_run_here(script):
    assert len(script.read_text().splitlines()) < 40
    assert f'"{script.name}"' in Path(__file__).read_text()


@pytest.mark.parametrize("name", [script.name for script in SCRIPTS if script.name != "custom_matcher.py"])
def test_a_script_without_words_says_how_it_is_called(name, python):
    """The one that is left out hands its words to mpo mmpr."""
    if name.endswith(".sh"):
        done = subprocess.run(["sh", EXAMPLES / name], capture_output=True, text=True)
        said, status = done.stderr, done.returncode
    else:
        with pytest.raises(SystemExit) as stop:
            python(name)
        said, status = stop.value.code, 1
    assert f"examples/{name} " in said and status and "set -eu" not in said


@pytest.mark.slow
def test_mpo(python, files):
    python("train_mpo.py", "model", "pairs.jsonl", "run")
    assert (files / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_loss_of_ones_own(python, files, monkeypatch):
    """By hand: beta 2, means -1 and -2, gamma 1: -log sigmoid(2 * 1 - 1) = log(1 + 1 / e)."""
    monkeypatch.setitem(LOSSES, "simpo", None)  # it is no loss after the test either
    del LOSSES["simpo"]
    trainer = python("custom_loss.py", "model", "pairs.jsonl", "run")["trainer"]
    assert trainer.ref_model is None and "loss/simpo" in str(trainer.state.log_history) or trainer.mixture.names == ["simpo", "sft"]
    loss = LOSSES["simpo"](beta=2.0)
    sums = [torch.tensor([value]) for value in (-4.0, -6.0)]
    pairs = PairLogps(*sums, None, None, torch.tensor([4.0]), torch.tensor([3.0]))
    assert loss(pairs).item() == pytest.approx(0.3133, abs=1e-4)


def test_a_kind_of_question_of_ones_own(files, monkeypatch):
    """`mpo mmpr make` with one more kind: of a model's points, those within 8 pixels are right, and make pairs with the others."""
    monkeypatch.setattr("mpo.verification.matching.MATCHERS", MATCHERS)
    monkeypatch.chdir(files)
    asked = {"image": "a.png", "question": "Where is the eye?", "answer": "(40, 25)", "kind": "point", "tolerance": 8}
    write_lines(files / "q.jsonl", [asked])
    points = ["(41, 27)", "(9, 25)", "I do not know.", "(40, 25)"]
    with StubServer(text=lambda body, number: f"Final answer: {points[number % 4]}") as stub:
        (files / "mmpr.yaml").write_text(
            f'sources: [{{path: q.jsonl}}]\nmodels: [{{model: "{stub.url}"}}]\nsample: {{prompt: plain, n: 4}}\n'
        )
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "custom_matcher.py"), "make", "mmpr.yaml", "--output", "out"])
        try:
            with pytest.raises(SystemExit) as stop:
                runpy.run_path(sys.argv[0], run_name="__main__")
            near, far = (match(point, "(40, 25)", "point", tolerance=8) for point in points[:2])
        finally:
            MATCHERS.pop("point", None)
    assert stop.value.code == 0
    assert near.correct and near.reason == "2.2 pixels away" and not far.correct
    pairs = [pair for path in (files / "out" / "annotations").glob("*.jsonl") for pair in read_json_lines(path)]
    right = {f"Final answer: {point}" for point in (points[0], points[3])}
    assert pairs and {pair["chosen"] for pair in pairs} <= right and not {pair["rejected"] for pair in pairs} & right


@pytest.mark.slow
def test_the_cascade(python, files):
    """GRPO that optimizes whole sequences, a step; a reward of 1 for the right answer in its format alone."""
    line = {"image": "a.png", "question": "What is the sum?", "answer": 5}
    write_lines(files / "questions.jsonl", [line] * 4)
    words = ["max_steps=1", "per_device_train_batch_size=8", "use_cpu=true", "bf16=false"]
    scope = python("cascade.py", "model", "questions.jsonl", "gspo", *words)
    assert scope["trainer"].args.importance_sampling_level == "sequence" and (files / "gspo/model.safetensors").is_file()
    said = [[{"role": "assistant", "content": text}] for text in ("2\n3\nFinal answer: 5", "2\n3\nFinal answer: 6", "5")]
    assert scope["reward"](said, [row["known"] for row in scope["data"]][:3]) == [1.0, 0.0, 0.0]


def test_a_job(python, tmp_path, capsys):
    questions = write_lines(tmp_path / "questions.jsonl", [{"question": f"What is {number}?"} for number in range(3)])
    with StubServer() as stub:
        python("sample_questions.py", stub.url, questions, tmp_path / "job")
    assert "3 in the output" in capsys.readouterr().out


@pytest.fixture
def undecided(here):
    """Questions about an image, and a model that answers each with 5 or 9, as likely, in the form of MMPR's prompt."""
    lines = [{"image": "a.png", "question": f"What is the sum? ({one})", "answer": 5} for one in range(4)]
    questions = load_questions(write_lines(here / "questions.jsonl", lines))
    asked = [asked_of(Sample(None).requests(to_record(question))[0])["question"] for question in questions]
    texts = [f"2 plus 3.\nI add.\nFinal answer: {answer}" for answer in (5, 9)]
    processor = small_processor([*asked, *texts], image_size=32, patch_size=16, max_patches=1)
    model = small_internvl(processor, hidden_size=32, layers=1, vision_hidden_size=32, vision_layers=1)
    examples = [{"image": "a.png", "question": one.replace("<image>\n", ""), "text": text} for one in asked for text in texts]
    settings = {"max_steps": 80, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "disable_tqdm": True}
    train_on_examples(model, processor, examples, here / "undecided", **settings)
    return here


@pytest.mark.slow
def test_from_questions_to_mpo_with_a_server(undecided):
    """`transformers serve` answers; the pairs are of its right and wrong answers; it has ended before the model is trained."""
    pytest.importorskip("fastapi")
    words = ["mmpr_chain.sh", "undecided", "questions.jsonl", "chain", *ON_CPU]
    own = {"PORT": str(get_free_port()), "N": "8", "TOKENS": "24", "LIMIT": "8"}
    shell(*words, **own)
    (path,) = (undecided / "chain/mmpr/annotations").glob("*correctness_rules.jsonl")  # others are about the format
    assert {(pair["chosen"][-1], pair["rejected"][-1]) for pair in read_json_lines(path)} == {("5", "9")}
    assert (undecided / "chain/run/model.safetensors").is_file()
    assert "Application shutdown complete" in (undecided / "chain/server.log").read_text()


def test_no_other_server_is_asked(here):
    with StubServer() as stub:
        words = ["sh", EXAMPLES / "mmpr_chain.sh", "model", "pairs.jsonl", "chain"]
        port = stub.url.rpartition(":")[2].partition("/")[0]
        done = subprocess.run(words, env=os.environ | {"PORT": port}, capture_output=True, text=True)
        assert done.returncode == 1 and f"Port {port} has a server already" in done.stderr


@pytest.mark.slow
def test_from_images_through_instructions_to_mpo(here):
    """A random model's long answers give pairs of Dropout-NTP; a step of MPO on them."""
    for number in range(4):
        path = here / "photos" / ("landmark", "artwork")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_image(number, 6, 5).resize((96, 80)).save(path)
    with StubServer(text=tell) as stub:
        shell("mminstruct_chain.sh", "photos", stub.url, "model", "chain", *ON_CPU, N="1", TOKENS="100")
    assert (here / "chain" / "pairs" / "meta.json").is_file() and (here / "chain" / "run" / "model.safetensors").is_file()


@pytest.mark.slow
def test_sft_then_mpo_then_an_evaluation(here):
    """The report compares the start with both, and finds no question in the training data."""
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}]
    write_lines(here / "chats.jsonl", [{"images": ["a.png"], "messages": turns}] * 4)
    make_image(7).save(here / "b.png")
    write_lines(here / "questions.jsonl", [{"image": "b.png", "question": f"How many? ({one})", "answer": one} for one in range(4)])
    words = ["model", "chats.jsonl", "pairs.jsonl", "questions.jsonl", "chain", *ON_CPU]
    shell("sft_mpo_evaluate.sh", *words, TOKENS="4")
    results = json.loads((here / "chain" / "results" / "results.json").read_text())
    assert {row["model"] for row in results["results"]} == {"start", "sft", "mpo"}
    assert (here / "chain" / "results" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpo", "torchrun", "accelerate", "slurm"])
def test_many_nodes(here, launcher):
    """Two nodes, processes of this machine that find each other as nodes do, train one model: one pair of a step each."""
    words = ["sh", EXAMPLES / "many_nodes.sh", "model.name_or_path=model", "data.path=pairs.jsonl", "run_dir=run", *ON_CPU]
    words += ["trainer.warmup_steps=0"]  # its only step learns
    own = {"NNODES": "2", "GPUS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(get_free_port()), "LAUNCHER": launcher}
    if launcher == "slurm":
        nodes = [{"SLURM_JOB_ID": str(get_free_port())}]
    else:
        nodes = [{**own, "NODE_RANK": str(rank)} for rank in range(2)]
    started = [
        subprocess.Popen(words, env=os.environ | node, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for node in nodes
    ]
    said = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(nodes), "\n".join(said)[-3000:]
    assert (here / "run" / "model.safetensors").is_file() and "\n".join(said).count("mpo train: done") == 1
