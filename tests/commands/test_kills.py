"""Commands that write anew in a folder with an older result, and are killed (kill -9) at each file that they write or remove."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from stub_server import StubServer
from support import make_image
from told import tell

from mpo.commands import main

KILLED = """
import os, signal, sys
from mpo.commands import main
seen = []

def hook(event, args):
    path = str(args[0]) if args else ""
    changes = event in ("os.rename", "os.remove") or (event == "open" and args[1] is not None and "r" not in str(args[1]))
    if changes and "/out/" in path and not any(part in path for part in ("/jobs/", "/job/", "/look/", ".owner", ".lock")):
        seen.append(event)
        if len(seen) > int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
sys.exit(main([*sys.argv[2:], "--output", os.path.abspath("out")]))
"""
"""Is killed when it has opened, renamed or removed so many files of the output."""


def write(name, lines):
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("".join(json.dumps(one) + "\n" for one in lines))


def chat(number, said="It is a cat."):
    told = [("user", f"What is {number}?"), ("assistant", said)]
    return {"id": f"c{number}", "messages": [{"role": role, "content": text} for role, text in told]}


def filtered(second):
    """The second time a file is gone and a line of the other one is dropped."""
    shutil.rmtree("data", ignore_errors=True)
    write("data/a.jsonl", [chat(1), chat(2, "It is a cat. " * 60) if second else chat(2)])
    if not second:
        write("data/b.jsonl", [chat(3)])
    return ["data", "filter", "data"]


def evaluated(url):
    def prepare(second):
        write("q.jsonl", [{"id": f"q{at}", "question": f"What is {at}?", "answer": str(at)} for at in range(second, 6)])
        return ["evaluate", url, "q.jsonl"]

    return prepare


def instructed(url):
    def prepare(second):
        shutil.rmtree("photos", ignore_errors=True)
        for at in range(second, 3):
            path = Path("photos", ("landmark", "artwork")[at != 0], f"{at}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            make_image(at, 6, 5).resize((96, 80), Image.Resampling.BICUBIC).save(path)
        model = f'{{model: {{model: "{url}"}}}}'
        Path("c.yaml").write_text(
            f"images: [{{path: photos, domain: folder, licence: CC0, origin: here}}]\ncaption: {model}\ngenerate: {model}\n"
            f"judge: {model}\n"
        )
        return ["mminstruct", "make", "c.yaml"]

    return prepare


def contents(out):
    """The files that a user reads."""
    inner = {"jobs", "job", "images"}
    files = [
        path
        for path in out.rglob("*")
        if path.is_file() and path.suffix != ".tmp" and not any(part[0] == "." for part in path.relative_to(out).parts)
    ]
    return {str(one.relative_to(out)): one.read_bytes() for one in files if one.relative_to(out).parts[0] not in inner}


@pytest.mark.slow
@pytest.mark.parametrize("command", ["data filter", "evaluate", "mminstruct make"])
def test_after_a_kill_no_report_is_of_other_data(tmp_path, monkeypatch, interpreter, command):
    """A report or meta.json that is there is of all the data that is there; the same command ends as if it had not been killed."""
    monkeypatch.chdir(tmp_path)
    with StubServer(**({"text": tell} if command[0] == "m" else {})) as stub:
        prepare = {"data filter": filtered, "evaluate": evaluated(stub.url), "mminstruct make": instructed(stub.url)}[command]
        assert main([*prepare(0), "--output", "out"]) == 0
        shutil.copytree("out", "first")
        old, words = contents(tmp_path / "out"), prepare(1)
        assert main([*words, "--output", "out"]) == 0
        new, moments = contents(tmp_path / "out"), []
        assert "kept/b.jsonl" not in new
        reports = [name for name in new if Path(name).name in ("meta.json", "report.json", "report.html", "results.json")]
        assert reports and all(old[name] != new[name] for name in reports)
        for moment in range(100):
            shutil.rmtree("out")
            shutil.copytree("first", "out")
            status = subprocess.run([interpreter, "-c", KILLED, str(moment), *words], capture_output=True).returncode
            moments.append(contents(tmp_path / "out"))
            if status == 0:
                break
            assert status == -signal.SIGKILL
            if moment % 4 == 1:
                assert main([*words, "--output", "out"]) == 0 and contents(tmp_path / "out") == new
        assert len(moments) > 4 and moments[-1] == new
        for found in moments:
            for name in reports:
                if name in found:
                    whole = old if found[name] == old[name] else new
                    assert found[name] == whole[name]
                    assert all(found.get(other) == data for other, data in whole.items() if other not in reports), name
        assert not all(reports[0] in found for found in moments)
