"""Conversations of every published form become the right record; what cannot be right is named with its line."""

import json
import math

import pytest
from data.malformed import GOOD as PAIRS
from data.malformed import NOT_JSON
from datasets import Dataset
from small_sft import small_sft

from mpo.data import load_conversations, load_preferences
from mpo.data.conversations import CONVERSATIONS
from mpo.data.formats import detect
from mpo.data.load import mix
from mpo.data.paths import Folders
from mpo.data.records import KINDS, to_records
from mpo.encoding.turns import as_completion
from mpo.io import BadRecord

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}
CALL = {"name": "weather", "arguments": {"city": "Rome", "days": [None, 2]}}
RESULT = {"type": "function", "function": CALL}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


ASKED, REPLY = said("user", "What is it?"), said("assistant", "A cat.")


def read(line, folder, kind="conversation", **how):
    return to_records(line, where="f.jsonl:3", find=Folders(folder), kind=kind, **how)


def only(line, folder, **how):
    (row,) = read(line, folder, **how)
    assert set(row) == set(KINDS["conversation"].features)
    return row


def shown(row):
    """Role, text with placeholders, and what else a message has."""
    more = [
        {name: json.loads(m[name]) if name == "tool_calls" else m[name] for name in m if name not in ("role", "content")}
        for m in row["messages"]
    ]
    texts = [
        (m["role"], "".join(part["text"] or f"<{part['type']}>" * (part["type"] != "text") for part in m["content"]))
        for m in row["messages"]
    ]
    return [(role, text, own) if own else (role, text) for (role, text), own in zip(texts, more, strict=True)]


ONE = [("user", "<image>What is it?"), ("assistant", "A cat.")]
FORMS = {
    "TRL's messages": ({"messages": [said("user", "<image>\nWhat is it?"), REPLY], "images": ["a.png"]}, "trl", ONE),
    "TRL's parts": (
        {"messages": [said("user", [{"type": "image"}, {"type": "text", "text": "What is it?"}]), REPLY], "image": "a.png"},
        "trl",
        ONE,
    ),
    "TRL's prompt and completion": ({"prompt": "What is it?", "completion": "A cat.", "images": ["a.png"]}, "trl", ONE),
    "TRL's prompt in turns": (
        {"prompt": [said("user", "Hi."), said("assistant", "Hello."), ASKED], "completion": [REPLY], "images": []},
        "trl",
        [("user", "Hi."), ("assistant", "Hello.", {"train": False}), ("user", "What is it?"), ("assistant", "A cat.")],
    ),
    "a prompt that messages repeat": (
        {"prompt": "What is it?", "prompt_id": "7", "messages": [ASKED, REPLY]},
        "trl",
        [("user", "What is it?"), ("assistant", "A cat.")],
    ),
    "LLaVA's": (
        {
            "id": "000000033471",
            "image": "sub/c.png",
            "conversations": [human("What is it?\n<image>"), gpt("A cat."), human("Why?"), gpt("Fur.")],
        },
        "sharegpt",
        [("user", "What is it?\n<image>"), ("assistant", "A cat."), ("user", "Why?"), ("assistant", "Fur.")],
    ),
    "LLaVA's without an image": (
        {"id": "wgByO4Y_0", "model": "", "conversations": [human("2+2?"), gpt("4")]},
        "sharegpt",
        [("user", "2+2?"), ("assistant", "4")],
    ),
    "InternVL's with several images": (
        {
            "id": 0,
            "image": ["a.png", "b.png"],
            "width_list": [64, 64],
            "height_list": [32, 32],
            "conversations": [human("<image>\n<image>\nThe same?"), gpt("No."), {"from": "human", "value": "Sure?"}, gpt("Yes.")],
        },
        "sharegpt",
        [("user", "<image><image>The same?"), ("assistant", "No."), ("user", "Sure?"), ("assistant", "Yes.")],
    ),
    "InternVL's with a video": (
        {"id": 1, "video": "clip.mp4", "conversations": [human("<video>\nWhat?"), gpt("Rain.")]},
        "sharegpt",
        [("user", "<video>What?"), ("assistant", "Rain.")],
    ),
    "MMInstruct's in Chinese": (
        {"image": "a.png", "conversations": [human("<image>\n\u63cf\u8ff0\u56fe\u7247\u3002"), gpt("\u4e00\u53ea\u732b\u3002")]},
        "sharegpt",
        [("user", "<image>\u63cf\u8ff0\u56fe\u7247\u3002"), ("assistant", "\u4e00\u53ea\u732b\u3002")],
    ),
    "images in later turns": (
        {"image": ["a.png", "b.png"], "conversations": [human("<image>One?"), gpt("A cat."), human("And <image>?"), gpt("A dog.")]},
        "sharegpt",
        [("user", "<image>One?"), ("assistant", "A cat."), ("user", "And <image>?"), ("assistant", "A dog.")],
    ),
    "ShareGPT's with a tool": (
        {
            "system": "Be brief.",
            "tools": json.dumps([WEATHER]),
            "conversations": [
                human("Weather?"),
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "sun"},
                gpt("Sunny."),
            ],
        },
        "sharegpt",
        [
            ("system", "Be brief."),
            ("user", "Weather?"),
            ("assistant", "", {"tool_calls": [RESULT]}),
            ("tool", "sun"),
            ("assistant", "Sunny."),
        ],
    ),
    "OpenAI's calls": (
        {
            "messages": [said("user", "Weather?"), said("assistant", None, tool_calls=[RESULT]), said("tool", "sun"), REPLY],
            "tools": [WEATHER],
        },
        "trl",
        [("user", "Weather?"), ("assistant", "", {"tool_calls": [RESULT]}), ("tool", "sun"), ("assistant", "A cat.")],
    ),
    "ms-swift's calls and flags": (
        {
            "messages": [
                said("user", "Weather?"),
                said("tool_call", json.dumps(CALL), loss=False),
                said("tool_call", json.dumps(CALL)),
                said("tool_response", "sun"),
                said("tool_response", "sun"),
                said("assistant", "Sunny.", loss=True),
            ],
        },
        "trl",
        [
            ("user", "Weather?"),
            ("assistant", "", {"tool_calls": [RESULT, RESULT], "train": False}),
            ("tool", "sun"),
            ("tool", "sun"),
            ("assistant", "Sunny.", {"train": True}),
        ],
    ),
    "OpenAI's weights": (
        {"messages": [said("user", "Hi."), said("assistant", "Ho.", weight=0), ASKED, said("assistant", "A cat.", weight=1)]},
        "trl",
        [
            ("user", "Hi."),
            ("assistant", "Ho.", {"train": False}),
            ("user", "What is it?"),
            ("assistant", "A cat.", {"train": True}),
        ],
    ),
    "ms-swift's query and history": (
        {
            "system": "Be brief.",
            "history": [["Hi.", "Hello."]],
            "query": "<image>What is it?",
            "response": "A cat.",
            "images": ["a.png"],
        },
        "swift",
        [("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), *ONE],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_published_line(form, images):
    """It is detected, read, and taken by training as it is."""
    line, format, expected = FORMS[form]
    assert detect(line, CONVERSATIONS, "conversation").NAME == format
    row = only(line, images)
    assert shown(row) == expected
    assert [json.loads(row["tools"])] == [[WEATHER]] if "tools" in line else row["tools"] is None
    assert only(line, images, format=format) == row
    record = {name: value for name, value in row.items() if value is not None}
    if row["videos"] is None:
        taken = as_completion(record)
        assert len(taken["prompt"]) + len(taken["completion"]) == len(expected)
    again = {**row, "images": [one["path"] for one in row["images"]]}
    assert only(again, images) == {**row, "metadata": row["metadata"]}  # a saved row is read as the same


C = "conversations"
WRONG = {
    "no assistant": ({C: [human("a")]}, "no message of the assistant"),
    "assistant first": ({C: [gpt("a"), human("b"), gpt("c")]}, "message 1.*'assistant'"),
    "two users": ({C: [human("a"), human("b"), gpt("c")]}, "message 2.*'user', follows the user"),
    "two assistants": ({C: [human("a"), gpt("b"), gpt("c")]}, "message 3.*'assistant'"),
    "system in the middle": ({C: [human("a"), {"from": "system", "value": "s"}, gpt("c")]}, "message 2.*'system'"),
    "two systems": ({"system": "x", C: [{"from": "system", "value": "s"}, human("a"), gpt("c")]}, "system message"),
    "the user last": ({C: [human("a"), gpt("b"), human("c")]}, "ends with a message.*'user'"),
    "a tool without a call": ({C: [human("a"), {"from": "observation", "value": "s"}, gpt("c")]}, "message 2.*'tool'"),
    "an empty turn": ({C: [human("a"), gpt(" \n")]}, "message 2.*is empty"),
    "an empty question": ({C: [human(""), gpt("b")]}, "message 1.*is empty"),
    "null": ({C: [human("a"), gpt(None)]}, "content is null"),
    "a number": ({C: [human(5), gpt("a")]}, "content is a number"),
    "an unknown speaker": ({C: [human("a"), {"from": "bard", "value": "b"}]}, "from 'bard'"),
    "no speaker": ({C: [human("a"), {"value": "b"}]}, "from None"),
    "text for turns": ({C: "human: a"}, "list of turns; got text"),
    "turns as JSON": ({"messages": json.dumps([ASKED, REPLY])}, "list of turns; got text"),
    "no turns": ({C: []}, "an empty one"),
    "a placeholder without an image": ({C: [human("<image>a"), gpt("b")]}, "1 <image> placeholders for 0 images"),
    "an image too few": ({"image": "a.png", C: [human("<image><image>a"), gpt("b")]}, "2 <image> placeholders for 1"),
    "an image too many": ({"images": ["a.png", "b.png"], C: [human("<image>a"), gpt("b")]}, "1 <image> placeholders for 2"),
    "a video without a file": ({C: [human("<video>a"), gpt("b")]}, "1 <video> placeholders for 0"),
    "an image in a reply": ({"image": "a.png", C: [human("<image>a"), gpt("<image> b")]}, "message 2.*'<image>'"),
    "an image of the reply alone": ({"image": "a.png", C: [human("a"), gpt("<image> b")]}, "<image>"),
    "an image of a tool": (
        {
            "image": "a.png",
            C: [
                human("a"),
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "<image>"},
                gpt("b"),
            ],
        },
        "turn 3 .tool.* turns of the user, or none",
    ),
    "an image part of a tool": (
        {
            "images": ["a.png"],
            "messages": [
                ASKED,
                said("assistant", None, tool_calls=[RESULT]),
                said("tool", [{"type": "image"}, {"type": "text", "text": "sun"}]),
                REPLY,
            ],
        },
        "'tool', has an image. .*user",
    ),
    "no such image": ({"image": "gone.png", C: [human("a"), gpt("b")]}, "no image 'gone.png'"),
    "an image outside": ({"image": "../outside.png", C: [human("a"), gpt("b")]}, "lies outside"),
    "a link outside": ({"image": "link_out.png", C: [human("a"), gpt("b")]}, "lies outside"),
    "an address": ({"image": "https://a.org/b.png", C: [human("a"), gpt("b")]}, "is a URL"),
    "an image in a message": (
        {"messages": [said("user", [{"type": "image", "image": "a.png"}]), REPLY]},
        "'messages.image' is not used",
    ),
    "an unused image": ({"img": "a.png", C: [human("a"), gpt("b")]}, "'img' is not used"),
    "an unused hint": ({"hint": "look left", C: [human("a"), gpt("b")]}, "'hint' is not used"),
    "an unused field of a turn": ({C: [{**human("a"), "image": "b.png"}, gpt("b")]}, "'messages.image' is not used"),
    "short reasoning": ({"messages": [ASKED, {**REPLY, "reasoning_content": "Fur."}]}, "reasoning_content"),
    "a completion beside messages": ({"messages": [ASKED, REPLY], "completion": "A dog."}, "completion"),
    "an empty call": ({C: [human("a"), {"from": "function_call", "value": "[]"}, gpt("b")]}, "content is null"),
    "an address in a part": (
        {"messages": [said("user", [{"type": "image_url", "image_url": {"url": "a.png"}}]), REPLY]},
        "'messages.image_url.url' is not used",
    ),
    "reasoning": ({"messages": [ASKED, {**REPLY, "reasoning_content": "It has fur, and it looks at me."}]}, "reasoning_content"),
    "another conversation": ({"messages": [said("user", "Why?"), REPLY], C: [human("a"), gpt("b")]}, "'messages' is not used"),
    "another prompt": ({"prompt": "Why is that so?", "messages": [ASKED, REPLY]}, "'prompt' is not used"),
    "two texts": ({C: [{**human("a"), "content": "b"}, gpt("b")]}, "both 'value' and 'content'"),
    "half a completion": ({"prompt": "Why?", "completion": ""}, "message 2.*is empty"),
    "the user in a completion": ({"prompt": "Why?", "completion": [ASKED, REPLY]}, "message of role 'user'"),
    "no response": ({"query": "Why?"}, "content is null"),
    "a number in history": ({"query": "Why?", "response": "So.", "history": [["a", 5]]}, "a number"),
    "odd history": ({"query": "Why?", "response": "So.", "history": [["a"]]}, "'history'"),
    "a pair": ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, "from_preferences"),
    "ms-swift's pair": ({"messages": [ASKED, REPLY], "rejected_response": "A dog."}, "from_preferences"),
    "a question": ({"question": "Why?", "answer": "So."}, "no conversation in any known format"),
    "nothing": ({}, "no conversation in any known format"),
    "a flag of text": ({"messages": [ASKED, {**REPLY, "train": "yes"}]}, "'train' of turn 2 is 'yes'"),
    "half a weight": ({"messages": [ASKED, {**REPLY, "weight": 0.5}]}, "'weight' of turn 2 is 0.5"),
    "a flag of another case": ({"messages": [ASKED, {**REPLY, "Train": False}]}, "'Train'"),
    "Axolotl's flag": ({C: [human("a"), {**gpt("b"), "train_on_turn": False}]}, "'train_on_turn'"),
    "a mask": ({C: [human("a"), {**gpt("b"), "mask": True}]}, "'mask'"),
    "a mask of tokens": ({"messages": [ASKED, {**REPLY, "loss_mask": [0, 1]}]}, "'loss_mask'"),
    "a loss scale of the record": ({"loss_scale": "last_round", "messages": [ASKED, REPLY]}, "'loss_scale'"),
    "TRL's bad completion": ({"prompt": "Why?", "completion": "So.", "label": False}, "'label' is false"),
    "LLaMA-Factory's bad completion": ({C: [human("a"), gpt("b")], "kto_tag": False}, "'kto_tag' is false"),
    "a loss scale": ({"messages": [ASKED, {**REPLY, "loss_scale": 2.0}]}, "'loss_scale'"),
    "two flags": ({"messages": [ASKED, {**REPLY, "loss": True, "weight": 0}]}, "'loss' and 'weight'"),
    "the user labelled": ({"messages": [{**ASKED, "train": True}, REPLY]}, "only the assistant"),
    "nothing labelled": ({"messages": [ASKED, {**REPLY, "train": False}]}, "every turn of the assistant"),
    "a call that is text": ({C: [human("a"), {"from": "function_call", "value": "weather"}, gpt("b")]}, "not JSON"),
    "a call without a name": ({C: [human("a"), {"from": "function_call", "value": "{}"}, gpt("b")]}, "name of a function"),
    "a call with a key twice": (
        {C: [human("a"), {"from": "function_call", "value": '{"name": "a", "name": "b"}'}, gpt("b")]},
        "twice",
    ),
    "a call by the user": ({"messages": [{**ASKED, "tool_calls": [RESULT]}, REPLY]}, "'user'"),
    "tools that are text": ({"tools": "weather", C: [human("a"), gpt("b")]}, "not JSON"),
    "tools that are an object": ({"tools": WEATHER, C: [human("a"), gpt("b")]}, "list of objects"),
    "sounds": ({"audios": ["a.wav"], C: [human("a"), gpt("b")]}, "'audios'"),
    "boxes": ({"objects": {"bbox": [[1, 2, 3, 4]]}, "messages": [ASKED, REPLY]}, "'objects'"),
    "template settings": ({"chat_template_kwargs": {"enable_thinking": True}, "messages": [ASKED, REPLY]}, "chat_template_kwargs"),
    "tiles": ({"tiles": {"max": 0}, C: [human("a"), gpt("b")]}, "'tiles'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_right(name, images):
    line, reason = WRONG[name]
    with pytest.raises(BadRecord, match=f"(?s)^f.jsonl:3: .*{reason}"):
        read(line, images)


def write(path, *lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return path


LLAVA = {"image": "a.png", "conversations": [human("<image>\nWhat is it?"), gpt("A cat.")]}


def test_bad_lines_are_skipped_and_listed(images):
    lines = [LLAVA, *(line for line, _ in WRONG.values()), *(line for line, _ in NOT_JSON.values()), LLAVA]
    path, listed = write(images / "c.jsonl", *lines), images / "bad.jsonl"
    for streaming in (False, True):
        found = load_conversations(path, on_bad_record="skip", max_bad_fraction=1, bad_records=listed, streaming=streaming)
        assert [row["id"] for row in found] == [f"{path}:1", f"{path}:{len(lines)}"]
        assert [json.loads(line)["where"] for line in listed.read_text().splitlines()] == [
            f"{path}:{n}" for n in range(2, len(lines))
        ]
    with pytest.raises(BadRecord, match=f"^{path}:2: "):
        load_conversations(path)


@pytest.mark.parametrize("format", PAIRS)
def test_from_preferences(format, images):
    """Every reader of pairs gives the prompt with the chosen completion, which alone is labelled."""
    line = PAIRS[format]
    (pair,) = read(line, images, kind="pair")
    row = only(line, images, kind="chosen")
    assert [{**m, "train": None} for m in row["messages"]] == [{**m, "train": None} for m in (*pair["prompt"], *pair["chosen"])]
    assert [m.get("train") is not False for m in row["messages"] if m["role"] == "assistant"][-1]
    assert (row["id"], row["images"], row["prompt_id"]) == (pair["id"], pair["images"], pair["prompt_id"])
    (images / "p.jsonl").write_text(json.dumps(line) + "\n")
    assert load_conversations(images / "p.jsonl", from_preferences=True, format=format)["id"][:] == [
        pair["id"].replace("f.jsonl:3", f"{images}/p.jsonl:1")
    ]


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"weight": 0.5}, {"loss": False}, {"mask": True}])
def test_flags_of_chosen_turns(flag, images):
    """All turns of a chosen completion are labelled: a flag that says otherwise is refused, or called metadata."""
    (name, value) = next(iter(flag.items()))
    pair = {"prompt": [ASKED], "chosen": [{**REPLY, **flag}, said("user", "Sure?"), said("assistant", "Yes.")], "rejected": "No."}
    with pytest.raises(BadRecord, match=f"'{name}' .{value}"):
        read(pair, images, kind="chosen")
    (row,) = read(pair, images, kind="chosen", metadata=[f"chosen.{name}"])
    assert json.loads(row["metadata"]) == {f"chosen.{name}": [value]}
    assert only({**pair, "chosen": [{**REPLY, "weight": 1}]}, images, kind="chosen")["messages"][-1]["role"] == "assistant"
    assert read(pair, images, kind="pair")  # where it is metadata


def test_a_good_completion_is_read(images):
    row = only({"prompt": "Why?", "completion": "So.", "label": True}, images)
    assert json.loads(row["metadata"]) == {"label": True} and len(row["messages"]) == 2


def test_a_completion_that_is_chosen_twice(images):
    """Ratings 4, 3, 1: the first is chosen over both others, the second over the third."""
    line = json.loads(json.dumps(PAIRS["vlfeedback"]))
    third = json.loads(json.dumps(line["completions"][1]))
    third["response"], third["annotations"]["Helpfulness"]["Rating"] = "A cow.", "3"
    line["completions"].append(third)
    assert len(read(line, images, kind="pair")) == 3
    assert [row["messages"][-1]["content"][0]["text"] for row in read(line, images, kind="chosen")] == ["A cat.", "A cow."]


def test_internvls_meta(images):
    """Half of ten, one three times; tiles and augmentation by source; pairs beside them with from_preferences of their own."""
    (images / "ann").mkdir()
    write(images / "ann" / "many.jsonl", *[{**LLAVA, "id": number} for number in range(10)])
    write(images / "ann" / "text.jsonl", {"conversations": [human("2+2?"), gpt("4")]})
    write(images / "ann" / "pairs.jsonl", {"question": "Why?", "chosen": "So.", "rejected": "No."})
    meta = {
        "many": {
            "root": ".",
            "annotation": "ann/many.jsonl",
            "repeat_time": 0.5,
            "length": 10,
            "data_augment": True,
            "max_dynamic_patch": 6,
        },
        "text": {"root": ".", "annotation": "ann/text.jsonl", "repeat_time": 3, "data_augment": False, "length": 1},
    }
    path = images / "meta.json"
    path.write_text(json.dumps(meta))
    found = load_conversations(path, tiles={"max": 12})
    assert found["source"][:] == ["many"] * 5 + ["text"] * 3
    assert (found[0]["tiles"]["max"], found[0]["augment"], found[7]["tiles"]["max"], found[7]["augment"]) == (6, True, 12, None)
    assert found[7]["messages"][1]["content"] == [{"type": "text", "text": "4"}]
    own = {"path": str(images / "ann" / "pairs.jsonl"), "from_preferences": True}
    sources = [{"path": str(images / "ann" / "text.jsonl")}, {**own, "weight": None}]
    assert [m[-1]["content"][0]["text"] for m in mix(sources, kind="conversation").train["messages"]] == ["4", "So."]
    parts = mix(
        [{"path": str(images / "ann" / "many.jsonl"), "image_root": str(images), "name": "b"}, *sources],
        kind="conversation",
        eval_size=1,
        eval_by="question",
    )
    assert (len(parts.train), len(parts.eval)) == (11, 1)
    with pytest.raises(ValueError, match="'pairs' has from_preferences"):
        mix([own])
    write(images / "ann" / "pairs.jsonl", {"question": "Why?", "chosen": "So.", "rejected": "No."}, LLAVA)
    with pytest.raises(BadRecord, match="pairs.jsonl:2: this is a conversation: .*without data.from_preferences"):
        mix([own], kind="conversation")


def test_arguments(images):
    path = write(images / "c.jsonl", LLAVA, LLAVA, LLAVA)
    assert len(load_conversations(path, limit=2)) == 2
    assert load_conversations(path, source="mine", format="llava")["source"][:] == ["mine"] * 3
    hinted = write(images / "h.jsonl", {**LLAVA, "hint": "look left"})
    assert json.loads(load_conversations(hinted, metadata=["hint"])["metadata"][0]) == {"hint": "look left"}
    for several in ([path, path], {"train": path}, None):
        with pytest.raises(ValueError, match=f"{type(several).__name__} .*pattern"):
            load_conversations(several)
    with pytest.raises(ValueError, match="format .*'mmpr'"):
        load_conversations(path, format="mmpr")
    with pytest.raises(ValueError, match="format .*'llava'"):
        load_preferences(path, format="llava")
    with pytest.raises(ValueError, match="from_preferences .*'yes'"):
        load_conversations(path, from_preferences="yes")
    with pytest.raises(ValueError, match="no conversations"):
        load_conversations(write(images / "none.jsonl"))
    with pytest.raises(ValueError, match="c.jsonl:1: this is a conversation"):
        load_conversations(path, from_preferences=True)


def test_tables(images):
    """Parquet pads structs with null, and has what a saved data set of load_conversations has."""
    for number, name in enumerate(("LLaVA's", "OpenAI's calls", "ms-swift's calls and flags")):
        line = FORMS[name][0]
        expected = only(line, images)
        path = images / f"{number}.parquet"
        Dataset.from_list([line]).to_parquet(path)
        (found,) = load_conversations(path)
        assert [m["role"] for m in found["messages"]] == [m["role"] for m in expected["messages"]]
        assert [m["tool_calls"] for m in found["messages"]] == [m.get("tool_calls") for m in expected["messages"]]
    load_conversations(path).save_to_disk(images / "saved")
    (again,) = load_conversations(images / "saved")
    assert again == found


def test_null_in_calls(images):
    """What is JSON in the file stays as it is; a table's padding goes."""
    text = '{"name": "weather", "arguments": {"city": null}}'
    line = {
        "conversations": [
            human("Sun?"),
            {"from": "function_call", "value": text},
            {"from": "observation", "value": "yes"},
            gpt("Yes."),
        ]
    }
    assert json.loads(only(line, images)["messages"][1]["tool_calls"])[0]["function"] == json.loads(text)
    padded = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "day": None}}, "id": None}
    line = {"messages": [ASKED, said("assistant", "", tool_calls=[padded]), said("tool", "sun"), REPLY]}
    assert json.loads(only(line, images)["messages"][1]["tool_calls"]) == [
        {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_training_takes_them(images, stream, tmp_path):
    lines = [FORMS[name][0] for name in ("LLaVA's", "LLaVA's without an image", "images in later turns", "TRL's prompt in turns")]
    dataset = load_conversations(write(images / "c.jsonl", *lines), streaming=stream)
    trainer = small_sft(tmp_path / "run", dataset=dataset, max_steps=1, batching="conversations", per_device_train_batch_size=4)
    assert math.isfinite(trainer.train().training_loss)
