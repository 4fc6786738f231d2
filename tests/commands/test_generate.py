"""`mpo generate`: a model in this process, an adapter, an official checkpoint, a server; its stream, JSON and refusals."""

import io
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from official_checkpoints import write_official
from peft import LoraConfig, get_peft_model
from support import TEXTS, make_image
from transformers import Qwen2ForCausalLM

from mpo.commands import main
from mpo.generation.generator import Request
from mpo.generation.open import open_local
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
def server(home):
    """The address of `transformers serve` with the tiny model."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = ["-m", "transformers.cli.transformers", "serve", str(home / "model"), "--device", "cpu", "--port", str(port)]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, process.stderr.read()
                    time.sleep(1)
            yield f"http://localhost:{port}/v1"
        finally:
            process.terminate()


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


class StreamingServer(BaseHTTPRequestHandler):
    """Answers as OpenAI-compatible servers do, in three chunks."""

    def log_message(self, *args):
        pass

    def _reply(self, kind, text):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):  # noqa: N802
        self._reply("application/json", json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}))

    def do_POST(self):  # noqa: N802
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == "tiny" and asked["stream"]
        common = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "tiny"}
        deltas = [({"content": text}, None) for text in ("It ", "is ", "5.")] + [({}, "stop")]
        chunks = [{**common, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in deltas]
        chunks.append({**common, "choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}})
        self._reply("text/event-stream", "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n")


def test_a_server_is_asked_whatever_http_library_its_client_uses(capsys):
    pytest.importorskip("openai")
    server = ThreadingHTTPServer(("127.0.0.1", 0), StreamingServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        assert main(["generate", address, "2 + 3?"]) == 0
        assert capsys.readouterr().out == "It is 5.\n"
        assert main(["generate", address, "2 + 3?", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
    finally:
        server.shutdown()
        server.server_close()
    assert (found["finish_reason"], found["prompt_tokens"], found["completion_tokens"]) == ("stop", 4, 3)
    assert main(["generate", address, "2 + 3?"]) == 1
    assert f"{address} cannot be reached" in capsys.readouterr().err
