"""Token counts by shapes and words against the encoding of every record."""

import copy

import pytest
from conversations import conversations, turn
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TEXTS, make_image
from tokenizers import normalizers

from mpo.encoding.costs import RecordMeasure, measure
from mpo.encoding.shapes import Shapes
from mpo.encoding.turns import CONVERSATION
from mpo.models.small import CHAT_TEMPLATE, small_processor

TEMPLATES = {
    "InternVL": CHAT_TEMPLATE,
    "system": "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}" + CHAT_TEMPLATE,
    "thinks": CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"),
    "goes on": CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "assistant\nIt' }}{% endif %}"),
    "trims": CHAT_TEMPLATE.replace("part['text']", "part['text'] | trim").replace(
        "message['content'] }}", "message['content'] | trim }}"
    ),
    "splits": CHAT_TEMPLATE.replace("part['text']", "part['text'].split('</think>')[-1]"),
    "escapes": CHAT_TEMPLATE.replace("part['text']", "part['text'] | replace('cat', 'dog')"),
    "counts": CHAT_TEMPLATE.replace("<IMG_CONTEXT>\n' }}", "Image' }}{{ loop.index }}{{ ': <IMG_CONTEXT>\n' }}"),
    "last turn": CHAT_TEMPLATE.replace("{{ '<|im_end|>\n' }}", "{{ '<|im_end|>\n' if not loop.last else '<|im_end|>' }}"),
    "not by words": CHAT_TEMPLATE,
    "no added tokens": CHAT_TEMPLATE.replace("<|im_start|>", "### "),
}
PIECES = [
    *"aZ 09\n\t.'<>{[&",
    "cat",
    " the",
    "It is",
    "\n\n",
    "  ",
    "'s",
    "'LL",
    "</think>",
    "<|im_end|>",
    "<think>",
    "\u00e9",
    "\u6570",
    "\u3000",
    "e\u0301",
    "user",
    "image",
    "12345",
]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(str.strip)


@pytest.fixture(scope="module")
def byte_level():
    return small_processor(
        [*TEXTS, "It is the cat's, isn't it? 12345\n\n"] * 3, image_size=32, patch_size=8, max_patches=4, vocab_size=400
    )


@pytest.fixture(scope="module")
def encoders(byte_level):
    """Two measures of a processor with each template; one with another normalizer than those under which words are known."""
    found = {name: copy.deepcopy(byte_level) for name in TEMPLATES}
    for name, processor in found.items():
        processor.chat_template = TEMPLATES[name]
    found["not by words"].tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "  ")
    arguments = "end_of_turn", "prompt", "raise", CONVERSATION
    return {name: [RecordMeasure(one, *arguments, sampled=sampled) for sampled in (1000, 0)] for name, one in found.items()}


def both(measures, records):
    """The costs by shapes, where there are some, and by encoding every record; and the first as columns."""
    fast, slow = measures
    columns = {name: [record.get(name) for record in records] for name in ("messages", "images")}
    for _ in range(2):  # a shape is rendered the second time
        fast._by_shape([dict(record) for record in records])
    return fast._by_shape([dict(record) for record in records]), [slow(dict(record)) for record in records], fast.batch(columns)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=6)
@given(data=st.data())
def test_counts_are_those_of_the_encoding(encoders, name, data):
    texts = data.draw(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
    images = data.draw(st.integers(0, 2))
    flags = [
        {"train": flag} if flag is not None else {}
        for flag in data.draw(st.lists(st.sampled_from([None, None, False]), min_size=3, max_size=3))
    ]
    messages = [turn("system", "Be nice.")] if data.draw(st.booleans()) else []
    for place, (asked, said) in enumerate(texts):
        messages += [turn("user", *[None] * (images if place != 1 else 1), asked), turn("assistant", said, **flags[place])]
    messages[-1].pop("train", None)
    shown = sum(part["type"] == "image" for message in messages for part in message["content"])
    record = {"messages": messages, "images": [make_image(0, 32, 32 + 32 * place) for place in range(shown)]}
    try:
        counted, encoded, _ = both(encoders[name], [record])
    except ValueError:  # the record is refused, also where it is counted
        return
    assert counted.get(0, encoded[0]) == encoded[0]


@pytest.mark.parametrize(
    ("name", "counted"),
    [(name, {"escapes": 0, "goes on": 0, "last turn": 0, "no added tokens": 0, "trims": 4}.get(name, 12)) for name in TEMPLATES],
)
def test_what_is_counted_by_shapes(encoders, name, counted):
    """Plain conversations are; not those of templates with rules for texts, and whose texts may merge with them or are trimmed."""
    records = conversations(12)
    by_shape, encoded, columns = both(encoders[name], records)
    assert len(by_shape) == counted and all(encoded[place] == costs for place, costs in by_shape.items())
    assert columns == {key: [one[key] for one in encoded] for key in encoded[0]}


def test_a_wrong_count_is_noticed(byte_level, caplog, monkeypatch):
    """A record of a sample that has another length than its shape says: all are encoded one by one."""
    dataset = Dataset.from_list([{"messages": one["messages"]} for one in conversations(12, ["text"])])
    expected = measure(dataset, byte_level, sides=CONVERSATION, tile_budget="image")
    monkeypatch.setattr(RecordMeasure.__init__, "__defaults__", (*RecordMeasure.__init__.__defaults__[:-1], 4))
    right = Shapes.lengths
    monkeypatch.setattr(Shapes, "lengths", lambda self, plain: right(self, plain) if len(plain) == 1 else [(1, 1)] * len(plain))
    found = measure(dataset, byte_level, sides=CONVERSATION)
    assert "one by one" in caplog.text
    assert found.tokens().tolist() == expected.tokens().tolist()
