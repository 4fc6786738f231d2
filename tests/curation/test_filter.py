"""`mpo data filter`: conversations and pairs in their files, scores of a stub server, kills, counts."""

import gzip
import json
import os
import re
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stub_jobs import PROCESSES
from stub_server import StubServer

from mpo.commands import main
from mpo.curation.judge import Form, Quality, Repetition, Source, read_score
from mpo.generation.server import ServerGenerator
from mpo.io import read_json_lines

LOOP = "It is a cat. " * 30
COUNT = 24


def chat(number, said="It is a cat.", **fields):
    asked = {"role": "user", "content": f"What is number {number}?"}
    return {"id": f"c{number}", "messages": [asked, {"role": "assistant", "content": said}], **fields}


def pair(number, chosen="A cat.", rejected="A dog.", **fields):
    return {"image": "not-there.png", "question": f"What is number {number}?", "chosen": chosen, "rejected": rejected, **fields}


def scored(body, number):
    """The response to a question about record n: n modulo 12, which for 10 and 11 is no score; asked again, 9."""
    asked = "".join(part if isinstance(part, str) else part[0]["text"] for part in (one["content"] for one in body["messages"]))
    found = int(re.search(r"What is number (\d+)", asked)[1]) % 12
    again = len(body["messages"]) > 1
    return "Fine.\nScore: 9" if again and found == 10 else "Good." if found > 9 else f"Well.\nScore: {found}"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        status = main(["data", "filter", *words])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def write(name, lines, end="\n"):
    with open(name, "w", newline="") as file:
        file.write("".join(json.dumps(line) + end for line in lines))


def report(folder="out"):
    found = json.load(open(f"{folder}/report.json"))
    for row in (found, *found["by_source"].values()):
        assert row["records"] == row["kept"] + row["dropped"]
        assert row["dropped"] == sum(count for name, count in row.items() if name.startswith("dropped: "))
    for name in ("records", "kept", "dropped", "unscored"):
        assert found[name] == sum(row[name] for row in found["by_source"].values())
    assert found["dropped"] == len(read_json_lines(f"{folder}/dropped.jsonl"))
    return found


def test_lines_are_kept_byte_by_byte(run, tmp_path):
    """Of conversations of three formats and pairs, in one file, with blank lines, CRLF and a byte order mark."""
    lines = [chat(0), {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": LOOP}]}, pair(1), pair(2, LOOP)]
    lines += [pair(3, rejected=LOOP), {"query": "Hi", "response": "你好"}, chat(4, LOOP, source="web"), chat(5, source="web")]
    data = [json.dumps(line, ensure_ascii=number % 2 == 0).encode() + b"  \r\n" for number, line in enumerate(lines)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\n".join(data).rstrip())
    assert run("a.jsonl", "--output", "out")[0] == 0
    raw = (tmp_path / "a.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "out/kept/a.jsonl").read_bytes() == b"".join(raw[2 * number] for number in (0, 2, 5, 7))
    dropped = read_json_lines("out/dropped.jsonl")
    assert [one["where"] for one in dropped] == ["a.jsonl:3", "a.jsonl:7", "a.jsonl:9", "a.jsonl:13"]
    assert [one["record"] for one in dropped] == [lines[number] for number in (1, 3, 4, 6)]
    assert [one["reasons"][0]["text"] for one in dropped] == ["messages[1]", "chosen", "rejected", "messages[1]"]
    reason = dropped[2]["reasons"][0]
    assert (reason["rule"], reason["threshold"]) == ("loop", 35) and reason["value"] > 35
    assert LOOP[reason["start"] : reason["end"]].startswith(reason["excerpt"])
    found = report()
    assert found["by_source"]["web"] == {"records": 2, "kept": 1, "dropped": 1, "unscored": 0, "dropped: loop": 1}
    assert found["by_source"]["a"]["kept"] == 3


@pytest.mark.parametrize("kind", ["gz", "json", "parquet", "folder"])
def test_other_files_keep_their_format(run, tmp_path, kind):
    lines = [pair(0), pair(1, LOOP), {**pair(2), "image": "b.png"}]
    if kind == "gz":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))
        assert run("a.jsonl.gz", "--output", "out")[0] == 0
        kept = [json.loads(line) for line in gzip.open("out/kept/a.jsonl.gz")]
    elif kind == "json":
        (tmp_path / "a.json").write_text(json.dumps(lines))
        assert run("a.json", "--output", "out")[0] == 0
        kept = json.load(open("out/kept/a.json"))
        assert read_json_lines("out/dropped.jsonl")[0]["where"] == "a.json#2"
    elif kind == "parquet":
        lines = [{**line, "image": {"bytes": b"\x89PNG" + bytes(90), "path": "a.png"}} for line in lines]
        pq.write_table(pa.Table.from_pylist(lines), "a.parquet", row_group_size=2)
        assert run("a.parquet", "--output", "out")[0] == 0
        kept = pq.read_table("out/kept/a.parquet").to_pylist()
        assert pq.read_schema("out/kept/a.parquet") == pq.read_schema("a.parquet")
    else:
        (tmp_path / "data").mkdir()
        for name in "ab":
            write(f"data/{name}.jsonl", lines)
        assert run("data", "--output", "out")[0] == 0
        assert report()["by_source"].keys() == {"a", "b"}
        kept = read_json_lines("out/kept/b.jsonl")
        assert kept == read_json_lines("out/kept/a.jsonl")
    assert kept == [lines[0], lines[2]]
    report()


# Scores


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 8", 8),
        ("**Score**: 7.5 / 10", 7.5),
        ('{"score": 6}', 6),
        ("Score: 2. No: it is better.\nScore: 9", 9),
        ("The score is 0.", 0),
        ("评分：8分", 8),
        ("Score (0-10): 4", 4),
        (" 10 ", 10),
        ("7/10.", 7),
        *(
            (text, None)
            for text in (
                "Score: 11",
                "Score: -1",
                "Score: 7-8",
                "Score: 80/100",
                "8 of the 9 steps",
                "Score: N",
                "",
                "Score: 7 to 8",
            )
        ),
    ],
)
def test_scores(text, score):
    assert read_score(text) == score


def test_scores_and_what_has_none(run):
    """Numbers modulo 12: repetition drops 0 to 2, quality 3 to 6; 10 is scored when asked again, 11 never is."""
    write("a.jsonl", [chat(number, source="even" if number % 2 == 0 else "odd") for number in range(COUNT)])
    with StubServer(text=scored) as stub:
        words = ["a.jsonl", "--output", "out", "--model", stub.url, "--prices", "1", "2"]
        status, out = run(*words)
        assert status == 0 and "cost" in out
        # repetition: 24, and 4 again; quality: the 18 that are left, and 4 again
        assert stub.asked == 24 + 4 + 18 + 4
        found = report()
        assert (found["dropped: repetition"], found["dropped: quality"], found["unscored"], found["kept"]) == (6, 8, 2, 10)
        assert found["by_source"]["odd"]["unscored"] == 2
        dropped = read_json_lines("out/dropped.jsonl")
        one = dropped[0]["reasons"][0]
        assert (one["rule"], one["value"], one["threshold"], one["text"]) == ("repetition", 0, 3, "messages")
        assert run(*words)[0] == 0 and stub.asked == 50
        for other, name in (
            (["--min-quality", "5"], "steps.quality.threshold is 7 there and 5.0 now"),
            (["--max-loop", "off"], "steps.form.limits.loop is 35 there and None now"),
            (["--unscored", "drop"], "on_unscored"),
            (["--no-repetition"], "order"),
            (["--domain", "odd=math"], "domains.odd"),
        ):
            status, out = run(*words, *other)
            assert status == 2 and name in out
        words[2] = "strict"
        assert run(*words, "--unscored", "drop", "--domain", "odd=math")[0] == 0
        found = report("strict")
        assert (found["unscored"], found["kept"], found["dropped: repetition"]) == (0, 8, 8)
        asked = [body["messages"][0]["content"] for body in stub.bodies[-10:]]
        assert any("calculations" in str(one) for one in asked)
        assert [one["reasons"][0]["value"] for one in read_json_lines("strict/dropped.jsonl")].count(None) == 2


def test_pairs_are_judged_on_both_sides(run):
    """Repetition asks about both completions; quality about the chosen one, and not about a record with an image."""
    without = {name: value for name, value in pair(9).items() if name != "image"}
    write("a.jsonl", [pair(8), without])
    with StubServer(text=scored) as stub:
        assert run("a.jsonl", "--output", "out", "--model", stub.url)[0] == 0
        assert stub.asked == 4 + 1
        asked = [json.dumps(body["messages"]) for body in stub.bodies]
        assert sum("A dog." in one for one in asked) == 2 and "not-there" not in str(asked) and report()["kept"] == 2
        stub.text = lambda body, number: "Score: 1" if "A dog." in str(body) else "Score: 8"
        assert run("a.jsonl", "--output", "two", "--model", stub.url)[0] == 0
        assert {one["text"] for line in read_json_lines("two/dropped.jsonl") for one in line["reasons"]} == {"rejected"}


def test_a_request_that_fails_for_good(run):
    write("a.jsonl", [chat(8), chat(9, " ".join(f"w{number}" for number in range(300)))])
    with StubServer(text=scored, context=280) as stub:
        assert run("a.jsonl", "--output", "out", "--model", stub.url)[0] == 0
        assert (report()["kept"], report()["unscored"]) == (2, 1)
        assert run("a.jsonl", "--output", "two", "--model", stub.url, "--unscored", "drop")[0] == 0
        (reason,) = read_json_lines("two/dropped.jsonl")[0]["reasons"]
        assert "280" in reason["failed"] and report("two")["dropped: repetition"] == 1
        stub.context = None
        assert run("a.jsonl", "--output", "two", "--model", stub.url, "--unscored", "drop", "--retry-dropped")[0] == 0
        assert report("two")["kept"] == 2


def test_killed_and_gone_on_with(run, tmp_path):
    write("a.jsonl", [chat(number) for number in range(COUNT)])
    with StubServer(text=scored) as stub:
        words = ["a.jsonl", "--model", stub.url, "--output"]
        assert run(*words, "whole")[0] == 0
        whole, stub.asked = stub.asked, 0
        process = PROCESSES.Process(target=main, args=(["data", "filter", *words, "out"],))

        def kill(body):
            if stub.asked == whole // 2:
                os.kill(process.pid, signal.SIGKILL)

        stub.poison, stub.delay = kill, 0.01
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not (tmp_path / "out/report.json").exists()
        stub.poison, stub.delay = None, 0
        assert run(*words, "out")[0] == 0 and stub.asked <= whole + 32  # those on their way at the kill are asked twice
    for name in ("kept/a.jsonl", "dropped.jsonl", "report.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# Steps, and what is refused


def test_files_that_are_gone_are_not_kept_any_longer(run):
    """The folder then has what the report counts, and files of the user's."""
    os.makedirs("in")
    for name in "ab":
        write(f"in/{name}.jsonl", [chat(1), chat(2, LOOP)])
    assert run("in", "--output", "out")[0] == 0 and sorted(os.listdir("out/kept")) == ["a.jsonl", "b.jsonl"]
    write("out/kept/notes.jsonl", [])
    os.remove("in/b.jsonl")
    assert run("in", "--output", "out")[0] == 0 and report()["kept"] == 1
    assert sorted(os.listdir("out/kept")) == ["a.jsonl", "notes.jsonl"]


def test_steps_in_a_notebook(caplog):
    records = [chat(8), chat(1), chat(10), chat(11), chat(9, LOOP), chat(8, "See <image>.", id="i")]
    with StubServer(text=scored) as stub:
        generator = ServerGenerator(stub.url, "tiny")
        for step in (Form(), Repetition(generator), Quality(generator, threshold=5), Quality(generator, threshold=5, again=True)):
            records = step(records)
    assert [one["id"] for one in records] == ["c8", "c10", "c11", "i"] and "'c9'" in caplog.text
    assert [one["scores"]["quality"]["messages"] for one in records] == [8, 9, None, 8]


def test_bad_lines(run):
    with open("a.jsonl", "w") as file:
        file.write(f'{json.dumps(chat(0))}\n{{"messages": []}}\nno JSON\n{{"a": 1}}\n')
    status, out = run("a.jsonl", "--output", "out")
    assert status == 2 and "a.jsonl:2" in out
    assert run("a.jsonl", "--output", "out", "--drop-bad")[0] == 0
    found = report()
    assert (found["kept"], found["dropped: bad record"]) == (1, 3)
    assert [one["where"] for one in read_json_lines("out/dropped.jsonl")] == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--quality"], "--model"),
        (["--prices", "1", "2"], "--model"),
        (["--no-heuristics", "--max-run", "3"], "--max-run"),
        (["--model", "URL", "--no-quality", "--no-repetition"], "--model"),
        (["--model", "URL", "--no-quality", "--domain", "math"], "--domain"),
        (["--model", "URL", "--domain", "cooking"], "cooking"),
        (["--model", "URL", "--domain", "A=math"], "'A'; a.jsonl has a"),
        (["--model", "URL", "--domain", "math", "--domain", "code"], "math, code"),
        (["--model", "URL", "--domain", "a=math", "--domain", "a=math"], "a=math, a=math"),
        (["--model", "URL", "--device", "cpu"], "--device"),
        (["--unscored", "drop"], "--unscored"),
    ],
)
def test_flags_without_effect(run, words, name):
    write("a.jsonl", [chat(0)])
    with StubServer() as stub:
        status, out = run("a.jsonl", "--output", "out", *(stub.url if word == "URL" else word for word in words))
        assert status == 2 and name in out and stub.asked == 0 and not os.path.exists("out")


@pytest.mark.parametrize(
    ("path", "output"),
    [("data", "data"), ("data/a.jsonl", "data"), ("out/kept", "out"), ("out/kept/a.jsonl", "out"), ("out/job/a.jsonl", "out")]
    + [("data/*.jsonl", "link"), ("data/**/*.jsonl", "data/new")],
)
def test_nothing_is_written_among_what_is_read(run, tmp_path, path, output):
    for folder in ("data", "out/kept", "out/job"):
        os.makedirs(folder)
        write(f"{folder}/a.jsonl", [chat(0)])
    os.symlink("data", "link")
    before = sorted(tmp_path.rglob("*"))
    status, out = run(path, "--output", output)
    assert status == 2 and "Give another folder" in out and sorted(tmp_path.rglob("*")) == before


def test_other_kinds_of_sources(tmp_path, monkeypatch):
    pq.write_table(pa.table({"a": [1]}), tmp_path / "a.tar")
    monkeypatch.chdir(tmp_path)
    write("a.jsonl", [chat(0)])
    source = Source("a.jsonl")
    monkeypatch.chdir("/")
    assert [one["id"] for one in source] == ["a.jsonl:1"]  # a worker may be elsewhere
    with pytest.raises(ValueError, match="mpo data convert"):
        Source(tmp_path / "a.tar")
