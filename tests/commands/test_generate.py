"""`mpo generate`: a model in this process, an adapter, an official checkpoint, a server; its stream, JSON and refusals."""

import io
import json
import socket
import sys

import pytest
import torch
from official_checkpoints import write_official
from peft import LoraConfig, get_peft_model
from real_server import transformers_serve
from stub_server import StubServer
from support import TEXTS, make_image
from transformers import Qwen2ForCausalLM

from mpo.commands import main
from mpo.generation.generator import Request
from mpo.generation.open import open_local
from mpo.generation.server import ServerGenerator
from mpo.models.loading import load_internvl
from mpo.models.small import small_internvl, small_processor
from mpo.visible import visible

ASKED = "What is it?"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """model/, adapter/ on it, official/, text/ (a Qwen2) and two images."""
    home = tmp_path_factory.mktemp("home")
    processor = small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.save_pretrained(home / "model")
    processor.save_pretrained(home / "model")
    Qwen2ForCausalLM(model.config.text_config).save_pretrained(home / "text")
    processor.tokenizer.save_pretrained(home / "text")
    settings = json.loads((home / "text" / "tokenizer_config.json").read_text())
    (home / "text" / "tokenizer_config.json").write_text(json.dumps({**settings, "processor_class": None}))
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(load_internvl(str(home / "model")), config)
    adapted.save_pretrained(home / "adapter")
    (home / "adapter" / "resolved.yaml").write_text("peft: {kind: qlora}\n")
    write_official(home / "official", "qwen2")
    for name in "ab":
        make_image(ord(name)).save(home / f"{name}.png")
    return home


@pytest.fixture
def ask(home, capsys, monkeypatch):
    monkeypatch.chdir(home)

    def ask(model, *words, question=ASKED):
        status = main(["generate", model, question, "--max-new-tokens", "6", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return ask


@pytest.mark.parametrize("model", ["model", "adapter", "official"])
def test_the_stream_is_the_greedy_response(home, ask, model):
    status, out, err = ask(model, "--image", "a.png", "--image", "b.png", "--system", "Be brief.")
    generator = open_local(str(home / model))
    question = Request.ask(ASKED, images=[home / "a.png", home / "b.png"], system="Be brief.")
    ((expected,),) = generator.generate([question], temperature=0, max_new_tokens=6)
    assert status == 0 and out == visible(expected.text) + "\n" and expected.text
    assert ("4-bit" in err) == (model == "adapter")


def test_an_adapter_is_on_its_base(home, ask):
    assert ask("adapter", "--image", "a.png")[1] != ask("model", "--image", "a.png")[1]


def test_json(home, ask):
    status, out, _ = ask("model", "--image", "a.png", "--json")
    found, text = json.loads(out), ask("model", "--image", "a.png")[1]
    assert status == 0 and visible(found["text"]) + "\n" == text
    assert (found["finish_reason"], found["completion_tokens"], found["prompt_tokens"] > 20) == ("length", 6, True)


def test_the_question_from_stdin_sampling_and_tiles(home, ask, monkeypatch):
    """One tile has four image tokens, three tiles (with the thumbnail) twelve."""
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{ASKED}\n"))
    assert ask("model", question="-")[1] == ask("model")[1]
    sampled = [ask("model", "--temperature", "1", "--top-p", "0.9", "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]
    tokens = [
        json.loads(ask("model", "--image", "a.png", "--json", *more)[1])["prompt_tokens"] for more in ([], ["--max-tiles", "1"])
    ]
    assert tokens[0] - tokens[1] == 2 * 4


def test_a_text_model(ask):
    assert ask("text")[0] == 0
    status, out, err = ask("text", "--image", "a.png")
    assert status == 2 and out == "" and "text is a text model" in err


@pytest.mark.parametrize(
    ("model", "question", "words", "name"),
    [
        ("model", " ", [], "empty"),
        ("model", "<image>\nWhy?", [], "<image>"),
        ("model", "<IMG_CONTEXT> Why?", [], "<IMG_CONTEXT>"),
        ("model", ASKED, ["--image", "none.png"], "none.png"),
        ("model", ASKED, ["--image", "model/config.json"], "model/config.json"),
        ("model", ASKED, ["--device", "cuda:99"], "'cuda:99'"),
        ("model", ASKED, ["--top-p", "0.5"], "top_p=0.5"),
        ("model", ASKED, ["--base", "model"], "base=model"),
        ("model", ASKED, ["--model-name", "x"], "--model-name=x"),
        ("text", ASKED, ["--max-tiles", "2"], "max_tiles"),
        ("http://localhost:1/v1", ASKED, ["--device", "cpu"], "--device"),
        ("http://localhost:99999/v1", ASKED, [], "'http://localhost:99999/v1'"),
    ],
)
def test_refusals(ask, model, question, words, name):
    status, out, err = ask(model, *words, question=question)
    assert status == 2 and out == "" and err.splitlines()[-1].startswith("mpo: error: ") and name in err


def test_a_server_without_its_package(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    status, _, err = ask("http://localhost:1/v1")
    assert status == 2 and "pip install 'mpo-trainer[server]'" in err


def test_a_server_that_is_not_there(ask):
    pytest.importorskip("openai")
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("localhost", 0))
        url = f"http://localhost:{taken.getsockname()[1]}/v1"
        status, out, err = ask(url)
    assert status == 1 and out == "" and f"mpo: error: {url} cannot be reached" in err


@pytest.fixture(scope="module")
def server(home, interpreter):
    """The address of `transformers serve` with the tiny model."""
    with transformers_serve(home / "model", interpreter) as address:
        yield address


@pytest.mark.slow
def test_a_real_server(home, ask, server):
    """It streams what the model writes here. (`transformers serve` leaves out an incomplete last character.)"""
    expected = json.loads(ask("model", "--image", "a.png", "--json")[1])
    status, out, _ = ask(server, "--image", "a.png", "--json")
    found = json.loads(out)
    assert status == 0 and expected["text"].rstrip("\ufffd") == found["text"].rstrip("\ufffd") and found["text"]
    for name in ("finish_reason", "prompt_tokens", "completion_tokens"):
        assert found[name] == expected[name]
    assert ask(server, "--image", "a.png")[1] == visible(found["text"]) + "\n"
    status, _, err = ask(server, "--model-name", "other")
    assert status == 1 and "'other'" in err
    status, _, err = ask(server.removesuffix("/v1"))
    assert status == 1 and "/v1" in err


def test_a_server_is_asked(capsys):
    """Its response as it comes, as JSON, with a prefix; and when it is gone."""
    with StubServer() as stub:
        expected = ServerGenerator(stub.url).ask(Request.ask("2 + 3?"), temperature=0)
        assert main(["generate", stub.url, "2 + 3?"]) == 0
        assert capsys.readouterr().out == f"{expected.text}\n"
        assert main(["generate", stub.url, "2 + 3?", "--json", "--prefix", "It is"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert stub.bodies[-1]["stream"] and stub.bodies[-1]["messages"][-1]["content"] == "It is"
        assert main(["generate", stub.url, "2 + 3?", "--max-tiles", "2"]) == 0
    assert (found["finish_reason"], found["prompt_tokens"], found["completion_tokens"]) == ("stop", 13, 16)
    assert set(found) == {"model", "text", "finish_reason", "prompt_tokens", "completion_tokens"}
    assert main(["generate", stub.url, "2 + 3?"]) == 1
    assert f"{stub.url} cannot be reached" in capsys.readouterr().err


def test_a_prefix_and_a_video(home, ask, tmp_path):
    """The response goes on from the prefix; a video of eight frames has four image tokens for each."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 64, 32
        for seed in range(8):
            container.mux(stream.encode(av.VideoFrame.from_image(make_image(seed))))
        container.mux(stream.encode())
    words = ([], ["--prefix", "5 plus"], ["--video", str(tmp_path / "a.mp4")])
    plain, begun, shown = (json.loads(ask("model", "--json", *more)[1]) for more in words)
    assert begun["prompt_tokens"] > plain["prompt_tokens"] and not begun["text"].startswith("5 plus")
    assert shown["prompt_tokens"] >= plain["prompt_tokens"] + 8 * 4
    assert ask("text", "--video", str(tmp_path / "a.mp4"))[0] == 2
