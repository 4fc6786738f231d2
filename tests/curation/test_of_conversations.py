"""`mpo data validate | stats | show | convert` on conversations, in every format that is loaded."""

import json

import pytest
from support import make_image

from mpo.commands import main
from mpo.curation.dedupe import find_duplicates
from mpo.data import load_conversations
from mpo.data.eval_part import split_eval


def of(role, text):
    return {"from": role, "value": text}


LINES = {
    "llava": {"image": "a.png", "conversations": [of("human", "<image>\nWhat is it?"), of("gpt", "It is a cat.")]},
    "trl": {"messages": [{"role": "user", "content": "Why so?"}, {"role": "assistant", "content": "It has to be."}]},
    "swift": {"query": "And then?", "response": "It goes on.", "history": [["One?", "One it is."]]},
}


@pytest.fixture
def chats(tmp_path):
    make_image(0).save(tmp_path / "a.png")
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"id": name, **line}) + "\n" for name, line in LINES.items()))
    return path


def shown(capsys, *arguments):
    code = main(["data", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_validated(chats, capsys):
    out = chats.parent / "found.jsonl"
    code, found = shown(capsys, "validate", chats, "--output", out, "--num-proc", 1)
    assert (code, found["pairs"], found["problems"]) == (0, 3, {})
    bad = [{"conversations": [of("human", "<image>"), of("gpt", "A.")]}, LINES["trl"], {"query": "Why?", "response": ""}]
    chats.write_text(chats.read_text() + "".join(json.dumps(line) + "\n" for line in bad))
    (chats.parent / "a.png").write_bytes(b"\xff\xd8\xff cut")
    code, found = shown(capsys, "validate", chats, "--output", out, "--num-proc", 1)
    wheres = [(json.loads(line)["where"].rsplit(":")[-1], json.loads(line)["finding"]) for line in out.read_text().splitlines()]
    assert code == 1 and found["notes"] == {"duplicate": 1}
    chats.write_text(json.dumps({"messages": LINES["trl"]["messages"][:1]}) + "\n")
    assert shown(capsys, "validate", chats, "--output", out, "--num-proc", 1)[1]["problems"] == {"no conversation": 1}
    assert {("1", "image not decoded"), ("5", "duplicate")} < set(wheres) and {"4", "6"} < {where for where, _ in wheres}


def test_counted(chats, capsys):
    """Words by hand: 4, 4 and 3 + 3 of the assistant."""
    _, found = shown(capsys, "stats", chats)
    assert (found["conversations"], found["images"], found["measures"]["turns"]["max"]) == (3, 1, 2)
    assert found["measures"]["assistant, words"]["mean"] == pytest.approx(14 / 3)
    chats.write_text(json.dumps(LINES["trl"]) + "\n")
    assert shown(capsys, "stats", chats, "--format", "trl")[1]["conversations"] == 1  # a format of pairs as well
    chats.write_text("".join(json.dumps(line) + "\n" for line in LINES.values()))
    assert main(["data", "stats", str(chats)]) == 0 and "3 conversations" in capsys.readouterr().out
    assert main(["data", "stats", str(chats), "--html", str(chats.parent / "a.html")]) == 2
    assert "--html" in capsys.readouterr().err


def test_shown(chats, capsys):
    _, found = shown(capsys, "show", chats)
    assert found["records"][1]["texts"] == {"user, turn 1": "Why so?", "assistant, turn 2": "It has to be."}
    assert main(["data", "show", str(chats)]) == 0 and "It is a cat." in capsys.readouterr().out


@pytest.mark.parametrize("target", ["new.jsonl", "new.parquet", "new"])
def test_converted(chats, capsys, target):
    code, found = shown(capsys, "convert", chats, chats.parent / "to" / target)
    assert code == 0 and found["checked"]
    root = {"image_root": found["image_root"]} if found["image_root"] else {}
    again = load_conversations(chats.parent / "to" / target, **root)
    assert [len(row["messages"]) for row in again] == [2, 2, 4]
    assert main(["data", "convert", str(chats), str(chats.parent / "m.jsonl"), "--output-format", "mmpr"]) == 2
    assert "conversations" in capsys.readouterr().err


def asked(*texts, **more):
    """A conversation of these texts, the user's first; `more` is of the assistant's first turn."""
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    return {"messages": [turns[0], {**turns[1], **more}, *turns[2:]]}


def loaded(folder, *lines):
    path = folder / "conversations.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load_conversations(path)


def test_what_is_not_text_makes_another_conversation(tmp_path):
    """Calls of tools, tools, where turns end, and which are labelled; also where 9 of 10 texts are equal."""
    calls = [
        {"tool_calls": [{"type": "function", "function": {"name": "get", "arguments": {"city": city}}}]} for city in ("A", "B")
    ]
    tool = {"type": "function", "function": {"name": "get", "parameters": {}}}
    lines = [
        *(asked("What is the weather there?", "", **call) for call in calls),
        {**asked("What is the weather there?", "", **calls[0]), "tools": [tool]},
        asked("Say it.", "One\nTwo\nThree"),
        asked("Say it.", "One", "Two", "Three"),
        asked("Say it.", "One", "Two", "Three", train=False),
    ]
    assert find_duplicates(loaded(tmp_path, *lines)) == []
    again = loaded(tmp_path, *lines, *lines)
    for near in (False, True):
        assert [(one.index, one.same_as) for one in find_duplicates(again, near=near)] == [(6 + n, n) for n in range(6)]


def test_conversations_that_begin_equally_stay_in_one_part(tmp_path):
    lines = [
        line for n in range(10) for line in (asked(f"What is {n}?", "It."), asked(f"What is  {n}?", "It.", "And then?", "That."))
    ]
    for part in split_eval(loaded(tmp_path, *lines), 10):
        questions = [" ".join(row["messages"][0]["content"][0]["text"].split()) for row in part]
        assert len(questions) == 10 and len(set(questions)) == 5
