"""`mpo generate --questions`: a job of the command line against the stub server."""

import json

import pytest
from stub_server import StubServer
from support import make_image

from mpo.commands import main
from mpo.io import read_json_lines


@pytest.fixture
def ask(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_image(0).save("a.png")
    lines = [{"id": f"q{number}", "image": "a.png", "question": f"Count {number}.", "answer": number} for number in range(6)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def ask(url, *words):
        status = main(["generate", url, "--questions", "questions.jsonl", "--output", "job", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return ask


def test_a_job(ask):
    with StubServer() as stub:
        status, out, err = ask(stub.url, "--n", "2", "--temperature", "1", "--prompt", "{question} Think.")
        assert status == 0 and "6 in the output" in out and "6 requests" in out and "6 of 6 records" in err
        shown = stub.bodies[0]["messages"][0]["content"]
        assert shown[-1]["text"].endswith(". Think.") and shown[0]["type"] == "image_url"
        assert [len(one["responses"]) for one in read_json_lines("job/output.jsonl")] == [2] * 6
        status, out, _ = ask(stub.url, "--n", "2", "--temperature", "1", "--prompt", "{question} Think.", "--json")
        assert json.loads(out)["spent"]["requests"] == 6 == stub.asked
        status, _, err = ask(stub.url, "--n", "3", "--temperature", "1", "--prompt", "{question} Think.")
        assert status == 2 and "n is 2 there and 3 now" in err


def test_an_image_that_is_gone(ask, tmp_path):
    path = tmp_path / "questions.jsonl"
    gone, no_json = json.dumps({"id": "gone", "image": "b.png", "question": "Count."}), '{"id": '
    path.write_text(f"{path.read_text()}{gone}\n{no_json}\n")
    with StubServer() as stub:
        status, _, err = ask(stub.url)
        assert status == 2 and stub.asked == 0 and "2 of 8 records" in err and "'gone'" in err and "b.png" in err
        assert "data.image_root" not in err and "--drop-bad" in err
        status, out, _ = ask(stub.url, "--drop-bad")
        assert status == 0 and "2 dropped" in out and stub.asked == 6
        reasons = {one["id"]: one["reason"] for one in read_json_lines("job/dropped.jsonl")}
        assert "b.png" in reasons["gone"] and "not JSON" in reasons["questions.jsonl:8"]
        make_image(1).save("b.png")
        assert ask(stub.url, "--drop-bad", "--retry-dropped")[0] == 0 and stub.asked == 7
    assert [one["id"] for one in read_json_lines("job/output.jsonl")] == [*(f"q{number}" for number in range(6)), "gone"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--n", "2"], "n=2"),
        (["--image", "a.png"], "--image"),
        (["--workers", "2", "--device", "cpu"], "--device"),
        (["--prompt", "Think."], "{question}"),
        (["--image-root", "none"], "a.png"),
    ],
)
def test_refusals(ask, words, name):
    with StubServer() as stub:
        status, out, err = ask(stub.url, *words)
        assert status == 2 and out == "" and name in err and stub.asked == 0


def test_flags_of_a_job_beside_a_question(capsys):
    for words in (["What?", "--n", "2"], ["What?", "--output", "job"], []):
        assert main(["generate", "model", *words]) == 2 and "--questions" in capsys.readouterr().err
    assert main(["generate", "model", "What? " * 1000, "--questions", "a.jsonl", "--output", "job"]) == 2
    assert len(capsys.readouterr().err) < 300  # the question is not repeated as a whole
    assert main(["generate", "model", "--questions", "a.jsonl", "--output", "job", "--workers", "2"]) == 2
    assert "--workers=2" in capsys.readouterr().err
