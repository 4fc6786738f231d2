"""`mpo mmpr` where the questions, their answers or their images are others than in the run before, or a process was killed."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from stub_server import StubServer
from support import make_image

from mpo.commands import main
from mpo.io import read_json_lines

REPORTS = ("meta.json", "report.json", "report.html")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six questions about images, with answers."""
    monkeypatch.chdir(tmp_path)
    for number in range(6):
        make_image(number).save(tmp_path / f"{number}.png")
    write([line(number) for number in range(6)])
    return tmp_path


def line(number, **fields):
    return {"id": f"q{number}", "image": f"{number}.png", "question": f"How many in {number}?", "answer": number, **fields}


def write(lines):
    Path("q.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))


def run(*words, status=0):
    assert main(["mmpr", *words]) == status


def chain(url, pairs="pairs"):
    """The steps, one command each, of both routes."""
    at = "" if pairs == "pairs" else pairs
    run("sample", url, "q.jsonl", "--output", f"{at}sampled", "--prompt", "plain")
    run("verify", f"{at}sampled", "--output", f"{at}verified", "--answer-format", "any")
    run("pair", f"{at}verified", "--output", pairs)
    run("sample", url, "q.jsonl", "--output", f"{at}told", "--prompt", "plain", "--n", "1")
    run("continue", url, f"{at}told", "--output", f"{at}gone_on")


def made(at=""):
    """The lines of pairs of both routes."""
    pairs = f"{at or 'pairs'}"
    return [
        read_json_lines(path) for name in (pairs, f"{at}gone_on") for path in sorted(Path(name, "mmpr/annotations").glob("*.jsonl"))
    ]


def said(body, number):
    """Every second sample is right, as far as the question says the answer."""
    found = re.search(r"many in (\d)", json.dumps(body))
    return f"I count {number} of them.\nIt is {int(found[1]) if found and number % 2 else 10 + number}."


CHANGES = {
    "lost": (lambda lines: lines[1:], 0),
    "new": (lambda lines: [line(7, image="0.png"), *lines], 1),
    "changed": (lambda lines: [line(0, question="How many now?"), *lines[1:]], 1),
    "reordered": (lambda lines: lines[::-1], 0),
    "answer": (lambda lines: [line(0, answer=3), *lines[1:]], 0),
    "image": (lambda lines: (make_image(9).save("0.png"), lines)[1], 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_step_follows_a_change(folder, change):
    """What is made is that of new folders, and only what is new is asked: 8 responses, 1 and its continuation (2 requests more)."""

    lines = [line(number) for number in range(6)]
    with StubServer(text=said) as stub:
        chain(stub.url)
        before, responses = stub.asked, 8 + 1 + 1
        edit, new = CHANGES[change]
        write(edit(lines))
        chain(stub.url)
        asked = stub.asked - before
        ledgers = [len(read_json_lines(f"{name}/ledger.jsonl")) for name in ("sampled", "told", "gone_on")]
        chain(stub.url)
        assert stub.asked == before + asked  # again: nothing
        assert sum(ledgers) <= 6 * responses + new * responses and (asked > 0) == bool(new)
        chain(stub.url, "new")
    assert made() == made("new")


def test_pairs_of_replaced_images_are_refused(folder, capsys):
    """By the steps that do not ask about the image again, until sample has."""
    with StubServer(text=said) as stub:
        chain(stub.url)
        before = made()
        assert all(before)
        make_image(9).save("0.png")
        for words in (
            ("verify", "sampled", "--output", "verified", "--answer-format", "any"),
            ("pair", "verified", "--output", "pairs"),
            ("continue", stub.url, "told", "--output", "gone_on"),
        ):
            capsys.readouterr()
            run(*words, status=2)
            err = capsys.readouterr().err
            assert "'q0'" in err and "0.png" in err and "mpo mmpr sample" in err
        assert made() == before
        Path("0.png").rename("away.png")  # of one that is not there nothing is known, and texts can be judged
        run("verify", "sampled", "--output", "verified", "--answer-format", "any")
        Path("away.png").rename("0.png")
        chain(stub.url)
        shutil.move("0.png", "moved.png")  # the same content elsewhere is the same image
        shutil.copy("moved.png", "0.png")
        asked = stub.asked
        chain(stub.url)
        assert stub.asked == asked


CONFIG = """
sources: [{{path: q.jsonl}}]
models: [{{model: "{url}"}}]
sample: {{prompt: plain, n: 8}}
"""


KILLED = """
import os, signal, sys
from mpo.commands import main
seen = []

def hook(event, args):
    path = str(args[0]) if args else ""
    changes = event in ("os.rename", "os.remove") or (event == "open" and args[1] is not None and "r" not in str(args[1]))
    if changes and "/out/" in path and "/jobs/" not in path and ".owner" not in path and ".lock" not in path:
        seen.append(event)
        if len(seen) > int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
sys.exit(main(["mmpr", "make", "c.yaml", "--output", os.path.abspath("out")]))
"""
"""Makes again, and is killed when it has opened, renamed or removed so many files of the output."""


def contents(out):
    names = [*REPORTS, "dropped.jsonl", *(str(path.relative_to(out)) for path in out.glob("annotations/*.jsonl"))]
    return {name: (out / name).read_bytes() for name in names if (out / name).exists()}


@pytest.mark.slow
def test_after_a_kill_no_report_is_of_other_data(folder, interpreter):
    """At each file that the second run writes or removes: a report or meta.json that is there is of all the data that is there."""
    with StubServer() as stub:
        Path("c.yaml").write_text(CONFIG.format(url=stub.url))
        write([line(0, source="a"), *[line(number, source="b") for number in range(1, 6)]])
        run("make", "c.yaml", "--output", "out")
        shutil.copytree("out", "first")
        old = contents(folder / "out")
        write([line(number, source="b") for number in range(2, 6)])  # source a is gone
        moments = []
        for moment in range(100):
            status = subprocess.run([interpreter, "-c", KILLED, str(moment)], capture_output=True).returncode
            moments.append(contents(folder / "out"))
            if status == 0:
                break
            assert status == -signal.SIGKILL
            shutil.rmtree("out")
            shutil.copytree("first", "out")
        new = moments[-1]
        assert all(old[name] != new[name] for name in REPORTS) and len(moments) > 8
        for found in moments:
            for name in REPORTS:
                if name in found:
                    whole = old if found[name] == old[name] else new
                    assert found[name] == whole[name]
                    assert all(found[other] == data for other, data in whole.items() if other not in REPORTS)
        assert not all("meta.json" in found for found in moments)
        shutil.rmtree("out")
        shutil.copytree("first", "out")
        for moment in range(len(moments) - 1, 0, -4):  # no file of a run that was killed stays
            subprocess.run([interpreter, "-c", KILLED, str(moment - 1)], capture_output=True)
        run("make", "c.yaml", "--output", "out")
        assert contents(folder / "out").keys() == new.keys()
        assert {name for name in new if contents(folder / "out")[name] != new[name]} <= {"report.json", "report.html"}
