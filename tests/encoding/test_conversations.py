"""Conversations as tokens: one text, every turn of the assistant labelled from its first token through its end of turn."""

import json

import pytest
from conversations import KINDS, conversation, conversations, turn, write_video
from datasets import Dataset
from support import TEXTS, make_image

from mpo.batching.collator import ConversationCollator
from mpo.encoding.costs import measure
from mpo.encoding.encoder import placeholder_widths
from mpo.encoding.turns import CONVERSATION, as_completion
from mpo.models.small import small_processor

END = "<|im_end|>"


@pytest.fixture(scope="module")
def processor():
    return small_processor(TEXTS, image_size=32, patch_size=8, max_patches=4)


def text_of(processor, batch) -> str:
    return processor.tokenizer.decode(batch["input_ids"][0])


def labelled(processor, batch) -> str:
    return processor.tokenizer.decode(batch.shift_labels[0])


@pytest.mark.parametrize("kind", KINDS)
def test_one_text_and_the_assistants_turns(processor, kind):
    """The ids are those of the processor for the whole text, but for what follows the last label; each turn's text is labelled."""
    record = conversation(3, **KINDS[kind])
    encoded = ConversationCollator(processor, layout="padded", tile_budget="image")([record])
    whole = processor(text=processor.apply_chat_template(record["messages"], tokenize=False), images=record["images"] or None)
    ids = whole["input_ids"][0]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    own = encoded["input_ids"][0].tolist()
    assert own == ids[: len(own)] and processor.tokenizer.decode(ids[len(own) :]).strip() == ""
    turns = [message["content"][0]["text"] for message in record["messages"] if message["role"] == "assistant"]
    assert labelled(processor, encoded) == "".join(f"{text}{END}" for text in turns)
    if record["images"]:
        assert len(encoded["pixel_values"]) == len(whole["pixel_values"])


@pytest.mark.parametrize(
    ("train_on", "flags", "expected"),
    [
        ("all", {}, "aA"),
        ("all", {0: False}, "A"),
        ("all", {1: False}, "a"),
        ("last", {}, "A"),
        ("last", {0: True}, "aA"),
        ("flagged", {0: True}, "a"),
    ],
)
def test_which_turns_are_labelled(processor, train_on, flags, expected):
    texts = ["cat", "dog"]
    messages = []
    for index, text in enumerate(texts):
        messages += [
            turn("user", f"What is {index}?"),
            turn("assistant", text, **({"train": flags[index]} if index in flags else {})),
        ]
    batch = ConversationCollator(processor, layout="packed", train_on=train_on)([{"messages": messages}])
    assert labelled(processor, batch) == "".join(f"{texts['aA'.index(which)]}{END}" for which in expected)


def test_as_arrow_gives_them(processor):
    """All messages of a column have the same keys: None is no flag, and no tool call."""
    record = conversation(1, turns=2)
    record["messages"][1] |= {"train": False, "tool_calls": None}
    records = Dataset.from_list([record, conversation(2, images=1)]).to_list()
    batch = ConversationCollator(processor, layout="packed")(records)
    assert labelled(processor, batch) == f"It is very 1, I think.{END}It is very very 2.{END}"


def test_contents_as_text(processor):
    """Without image parts, images precede the first text, as in TRL; the same tokens as with parts."""
    record = conversation(1, images=2, turns=2)
    plain = {
        **record,
        "messages": [{**m, "content": "".join(part.get("text", "") for part in m["content"])} for m in record["messages"]],
    }
    mixed = {**record, "messages": [*record["messages"][:1], *plain["messages"][1:]]}
    collator = ConversationCollator(processor, layout="packed")
    first, second, third = (text_of(processor, collator([one])) for one in (record, plain, mixed))
    assert first == second == third


def test_prompt_and_completion(processor):
    """TRL's other format: turns of the prompt are not labelled. Plain text ends with eos."""
    messages = conversation(1, turns=2)["messages"]
    collator = ConversationCollator(processor.tokenizer, layout="packed")
    processor.tokenizer.chat_template = processor.chat_template
    batch = collator([{"prompt": messages[:3], "completion": messages[3:]}, {"prompt": "2 plus 3 is", "completion": " 5"}])
    assert labelled(processor, batch) == f"It is very 1, I think.{END} 5{processor.tokenizer.eos_token}"


def test_tools(processor):
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    messages = [turn("user", "2 plus 3?"), {"role": "assistant", "content": "", "tool_calls": calls}]
    messages += [{"role": "tool", "content": "5"}, turn("assistant", "It is 5.")]
    tokenizer = processor.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}"
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    batch = ConversationCollator(tokenizer, layout="packed")([{"messages": messages, "tools": "[]"}])
    assert labelled(processor, batch) == f"add{END}It is 5.{END}"
    messages[1]["tool_calls"] = json.dumps(calls)  # as load_conversations has them
    assert ConversationCollator(tokenizer, layout="packed")([{"messages": messages}])["input_ids"].equal(batch["input_ids"])


def test_a_video_in_a_later_turn(processor, tmp_path):
    path = write_video(tmp_path / "video.mp4", frames=6)
    messages = [turn("user", "Hi"), turn("assistant", "Yes."), turn("user", "What is it?"), turn("assistant", "A cat.")]
    messages[2]["content"].insert(0, {"type": "video"})
    batch = ConversationCollator(processor, layout="packed")(
        [{"messages": messages, "videos": [path], "frames": {"min": 2, "max": 2}}]
    )
    assert "Frame1: <img>" in text_of(processor, batch) and "Frame2: <img>" in text_of(processor, batch)
    assert len(batch["pixel_values"]) == 2 and labelled(processor, batch) == f"Yes.{END}A cat.{END}"


def test_measured_without_opening_images(processor):
    """Tokens and tiles are those of the rows; a row leaves out each conversation's last token."""
    records = conversations(12)
    costs = measure(Dataset.from_list(records), processor, sides=CONVERSATION)
    collator = ConversationCollator(processor, layout="packed")
    for place, record in enumerate(records):
        batch = collator([record])
        assert costs.tokens()[place] == batch.tokens + 1
        assert costs.tiles[place] == (len(batch["pixel_values"]) if "pixel_values" in batch else 0)


U, A = turn("user", "Hi"), turn("assistant", "Yes.")
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"messages": []}, "no message of the assistant"),
        ({"messages": [U]}, "no message of the assistant"),
        ({"messages": "Hi"}, "str"),
        ({"messages": [U, "Yes."]}, "message 2.*None"),
        ({"messages": [U, {"role": "gpt", "content": "Yes."}]}, "message 2.*'gpt'.*assistant"),
        ({"messages": [A, U, A]}, "message 1.*beginning"),
        ({"messages": [U, U, A]}, "message 2.*'user'.*user"),
        ({"messages": [U, A, A]}, "message 3.*'assistant'.*assistant"),
        ({"messages": [U, A, turn("system", "x"), U, A]}, "message 3.*'system'"),
        ({"messages": [U, A, {"role": "tool", "content": "5"}, A]}, "message 3.*'tool'.*assistant"),
        ({"messages": [U, A, U]}, "'user' instead"),
        ({"messages": [U, turn("assistant", " ")]}, "message 2.*'assistant'.*empty"),
        ({"messages": [turn("user", ""), A]}, "message 1.*'user'.*empty"),
        ({"messages": [U, turn("assistant", None, "Yes.")], "images": [make_image(0)]}, "message 2.*'assistant'.*image"),
        ({"messages": [turn("user", None, "Hi"), A]}, "images provided .0.*placeholders .1"),
        ({"messages": [U, A, turn("user", None, "Hi"), A]}, "images provided .0.*placeholders .1"),
        ({"messages": [U, A, turn("user", None, "Hi"), A], "images": [make_image(0)] * 2}, "images provided"),
        ({"messages": [turn("user", "Hi <IMG_CONTEXT>"), A]}, "<IMG_CONTEXT>"),
        ({"messages": [U, turn("assistant", "Yes.", train=False)]}, "train_on='all'"),
        ({"messages": [U, turn("assistant", "Yes.", train="no")]}, "train.*'no'"),
        ({"messages": [U, A, turn("user", "Hi", train=True), A]}, "train.*'user'"),
        ({"messages": [U, A], "prompt": [U]}, "has .'messages', 'prompt'"),
        ({"prompt": [U]}, "'completion'.*'prompt'"),
        ({"prompt": "Hi", "completion": [A]}, "'prompt' is of type str"),
        ({"messages": [{"role": "user", "content": 5}, A]}, "message 1.*int"),
        ({"messages": [turn("user"), A]}, "message 1.*empty"),
        ({"messages": [{"role": "user", "content": [{"text": "Hi"}]}, A]}, "message 1.*None.*text, image, video"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, A]}, "message 1.*'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "url": "http://a/b"}]}, A]}, "message 1.*'url'.*'images'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}, A]}, "message 1.*int"),
        ({"messages": [{"role": "user", "content": "<image> Hi"}, A], "images": [make_image(0)]}, "message 1.*'<image>'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, A]}, "0 videos"),
        ({"messages": [U, turn("assistant", "Yes.", weight=0), U, A]}, "message 2.*'weight'.*train"),
        ({"messages": [U, {"role": "assistant", "content": "", "tool_calls": CALLS}]}, "tool call of 'add'"),
        ({"messages": [U, A], "tools": "[{"}, "not JSON.*'tools'"),
        ({"text": "Hi"}, "needs 'messages'"),
        ({"messages": [turn("user", "<image> Hi"), A]}, "message 1.*'<image>'"),
        ({"messages": [turn("user", "<video> Hi"), A]}, "message 1.*'<video>'"),
        ({"prompt": "<image> Hi", "completion": "Yes."}, "'prompt' has '<image>'"),
        ({"messages": [U, turn("assistant", " \u200b")]}, "message 2.*'assistant'.*empty"),
        ({"prompt": [U, U], "completion": [A]}, "message 2.*'user'.*user"),
        ({"prompt": [U, A], "completion": [A]}, "message 3.*'assistant'.*assistant"),
        ({"prompt": [turn("system", "Hi")], "completion": [A]}, "message 2.*'assistant'.*system"),
        ({"prompt": [U], "completion": [A, turn("user", ""), A]}, "message 3.*'user'.*empty"),
        ({"prompt": [U, turn("assistant", ""), U], "completion": [A]}, "message 2.*'assistant'.*empty"),
        ({"prompt": [U], "completion": [A, {"role": "tool", "content": "5"}, A]}, "message 3.*'tool'.*assistant"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_right_is_named(processor, record, named):
    with pytest.raises(ValueError, match=f"(?s)record 'x'.*{named}"):
        ConversationCollator(processor, layout="packed")([{"id": "x", **record}])


def test_an_answer_may_have_placeholders(processor):
    """HTML, for example, of a conversation without images."""
    batch = ConversationCollator(processor, layout="packed")([{"messages": [U, turn("assistant", "<video> and <image>")]}])
    assert labelled(processor, batch) == f"<video> and <image>{END}"


def test_flags_without_a_labelled_turn():
    with pytest.raises(ValueError, match="train_on='flagged'"):
        as_completion({"messages": [U, A]}, "flagged")


@pytest.mark.parametrize(
    ("processed", "widths"),
    [
        ([5, 8, 0, 0, 9, 8, 0, 9, 6], [1, 4, 3, 1]),  # 8 and 9 stand around each image
        ([5, 0, 0, 0, 6], None),  # two images in one run of image tokens
        ([5, 8, 0, 9, 7, 0, 9, 6], None),  # other tokens around the second
        ([5, 8, 0, 9, 6], None),
        ([5, 0, 7, 0, 7, 6], [1, 2, 2, 1]),
    ],
)
def test_placeholder_widths(processed, widths):
    assert placeholder_widths([5, 0, 0, 6], processed, image_token=0) == widths
