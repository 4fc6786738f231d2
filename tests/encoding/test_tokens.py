"""The tokens of a conversation: prompts that end in the assistant's turn, tokenizers with a dummy prefix, templates, tools."""

import copy
import json

import pytest
import torch
from datasets import Dataset
from support import completion_mask, make_image
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from trl.data_utils import prepare_multimodal_messages

from mpo.batching.collator import PairCollator
from mpo.encoding.costs import RecordMeasure
from mpo.encoding.encoder import Encoder
from mpo.encoding.labels import end_of_turn_token
from mpo.models.control_tokens import added_start
from mpo.models.small import CHAT_TEMPLATE, processor_around

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyzHWYTN.,?:0123456789\n▁"))
WORDS = ["Y", "e", "s"]


@pytest.fixture(scope="module")
def prefixed():
    """A processor whose tokenizer adds a space before every text, as SentencePiece does by default, and BOS."""
    vocabulary = [*SPECIAL, *LETTERS, "▁Y", "▁a"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    model = Tokenizer(models.BPE(ids, [("▁", "Y"), ("▁", "a")], unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Replace("▁", " ")
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    processor = processor_around(tokenizer, image_size=32, patch_size=8, max_patches=4)
    processor.chat_template = tokenizer.chat_template = "{{ '<s>' }}" + CHAT_TEMPLATE
    return processor


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def pair(**columns):
    return {"id": "p1", "prompt": [user("What is it?")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")], **columns}


def encoded(record, processing_class, **settings):
    """Tokens of the prompt and of both completions as text, with the labelled ones in brackets."""
    encoder = Encoder(processing_class, **settings)
    (found,), _, _ = encoder([record])
    tokens = encoder.tokenizer.convert_ids_to_tokens

    def bracketed(completion):
        return [
            f"[{token}]" if counts else token for token, counts in zip(tokens(completion.ids), completion.loss_mask, strict=True)
        ]

    return tokens(found.prompt_ids), *map(bracketed, found.completions)


def check_every_path(record, processing_class):
    """Measured costs are those of encoded records, and packed rows have the tokens of padded ones."""
    measured = RecordMeasure(processing_class, "end_of_turn", "prompt", "raise")({"images": None, **record})
    (found,), _, _ = Encoder(processing_class)([record])
    chosen, rejected = found.completions
    sizes = {"prompt": len(found.prompt_ids), "chosen": len(chosen.ids), "rejected": len(rejected.ids)}
    assert {name: measured[name] for name in sizes} == sizes
    padded = PairCollator(processing_class)([record])
    packed = PairCollator(processing_class, layout="packed")([record])
    labels = [padded["input_ids"][row][completion_mask(padded)[row].bool()].tolist() for row in (0, 1)]
    of_packed = packed.shift_labels[0][packed.labelled.node].tolist()
    assert of_packed == labels[0] + labels[1]


# A prompt that ends in the assistant's turn


@pytest.mark.parametrize("images", [[], [make_image(0)]])
@pytest.mark.parametrize("parts", [False, True])
def test_a_prompt_that_ends_in_the_assistants_turn_is_continued(processor, images, parts):
    """The same tokens as one message of both texts, split where transformers' continue_final_message ends the prompt."""
    started, rest = [user("What is it?"), assistant("The answer is")], [assistant(" 5.")]
    whole = [user("What is it?"), assistant("The answer is 5.")]
    if parts:
        places = [{"type": "image"}] * len(images)
        started = [user([*places, {"type": "text", "text": "What is it?"}]), assistant([{"type": "text", "text": "The answer is"}])]
        rest = [assistant([{"type": "text", "text": " 5."}])]
    record = pair(prompt=started, chosen=rest, images=images)
    prompt, chosen, _ = encoded(record, processor)
    assert "".join(token.strip("[]") for token in chosen) == "Ġ5.<|im_end|>"
    assert all(token.startswith("[") for token in chosen)
    expected = encoded(pair(chosen=whole[1:], images=images), processor)
    assert prompt + [token[1:-1] for token in chosen] == expected[0] + [token[1:-1] for token in expected[1]]
    assert prompt.count("<|im_start|>") == 2
    check_every_path(record, processor)


def test_it_is_continued_in_several_messages(processor):
    completion = [assistant("5."), user("Why?"), assistant("So.")]
    prompt, chosen, rejected = encoded(pair(prompt=[user("What?"), assistant("It is ")], chosen=completion), processor)
    text = "".join(token[1:-1] if token[0] == "[" else token for token in chosen)
    assert text == "5.<|im_end|>Ċ<|im_start|>userĊWhy?<|im_end|>Ċ<|im_start|>assistantĊSo.<|im_end|>"
    assert "".join(token[1:-1] for token in chosen if token[0] == "[") == "5.<|im_end|>So.<|im_end|>"
    assert "".join(rejected) == "".join(f"[{token}]" for token in processor.tokenizer.tokenize("No.<|im_end|>"))


def test_an_empty_turn_at_its_end_is_the_completions_opening(processor):
    assert encoded(pair(prompt=[user("What is it?"), assistant("")]), processor) == encoded(pair(), processor)


def test_samples_continue_it_too(processor):
    record = {"prompt": [user("What is it?"), assistant("The answer is")]}
    (prompt,), _, _ = Encoder(processor)([record], sides=())
    ids = prompt.prompt_ids
    text = processor.apply_chat_template(prepare_multimodal_messages(record["prompt"]), tokenize=False, continue_final_message=True)
    assert ids == processor.tokenizer(text)["input_ids"]


def test_samples_ask_with_the_whole_prompt(processor):
    """In training a token may span the end of the prompt and the beginning of the completion; in generation it cannot."""
    (prompt,), _, _ = Encoder(processor)([{"prompt": "The sum is num"}], sides=())
    ids = prompt.prompt_ids
    assert ids == processor.tokenizer("The sum is num")["input_ids"]


# Messages in wrong places


CALL = assistant("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": {"city": "Rome"}}}])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": []}, "record 'p1': .*no message"),
        ({"prompt": [assistant("")]}, "record 'p1': .*no message"),
        ({"prompt": ""}, "record 'p1': prompt are text"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "record 'p1': .*empty"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "record 'p1': .*empty"),
        ({"chosen": [user("Yes.")]}, "'chosen' begins .*'user'"),
        ({"rejected": [{"role": "system", "content": "x"}, assistant("y")]}, "'rejected' begins .*'system'"),
        ({"chosen": [assistant("Yes."), user("Why?")]}, "'chosen' ends .*'user'"),
        ({"chosen": [assistant("Yes."), tool("3")]}, "'chosen' ends .*'tool'"),
        ({"chosen": [assistant(""), user("Why?"), assistant("So.")]}, "message 1 of 'chosen' is empty"),
        ({"prompt": [user("What?"), CALL]}, "a tool call, .*'chosen'"),
        ({"prompt": [{"content": "What?"}]}, "'prompt' .*without a role"),
        ({"prompt": [user(None)]}, "'prompt' .*'user' without content"),
        ({"chosen": "Yes."}, "chosen are text"),
        ({"chosen": 3}, "'chosen' is of type int"),
    ],
)
def test_refused_by_name(processor, columns, message):
    record = {key: value for key, value in pair(**columns).items() if value is not None}
    for encode in (PairCollator(processor).__call__, PairCollator(processor, layout="packed").__call__):
        with pytest.raises(ValueError, match=message):
            encode([record])
    with pytest.raises(ValueError, match=message):
        RecordMeasure(processor, "end_of_turn", "prompt", "raise")({"images": None, **record})


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [{"role": "system", "content": "Say yes."}]},
        {"prompt": [user("What?"), assistant("I look."), tool("3")]},
        {"prompt": [user("What?"), CALL], "chosen": [tool("3"), assistant("Yes.")], "rejected": [tool("4"), assistant("Yes.")]},
        {"chosen": [tool("3"), assistant("Yes.")]},
    ],
)
def test_they_have_a_header_of_their_own(processor, columns):
    """Only the assistant's text is labelled, not its header."""
    prompt, chosen, _ = encoded(pair(**columns), processor)
    assert "".join(token[1:-1] for token in chosen if token[0] == "[") == "Yes.<|im_end|>"
    before = prompt + [token for token in chosen if token[0] != "["]
    assert "".join(before).endswith("<|im_end|>Ċ<|im_start|>assistantĊ")
    check_every_path(pair(**columns), processor)


# Tokenizers with a dummy prefix


@pytest.mark.parametrize("layout", ["one message", "several", "continued"])
def test_a_completion_has_the_tokens_of_the_whole_text(prefixed, layout):
    """A text on its own begins with ▁, and "▁Y" is one token: after the header's line break it is "Y", also with images."""
    columns = {
        "one message": {},
        "several": {"chosen": [assistant("Yes."), user("Yes?"), assistant("Yes.")]},
        "continued": {"prompt": [user("What is it?"), assistant("Yes")], "chosen": [assistant("Yes")]},
    }[layout]
    beside = encoded(pair(**columns, images=[make_image(0, 32, 32)]), prefixed)
    alone = encoded(pair(**columns), prefixed)
    assert beside[1:] == alone[1:]
    text = prefixed.apply_chat_template(prepare_multimodal_messages(pair(**columns)["prompt"]), tokenize=False)
    assert alone[1][:3] == ["[Y]", "[e]", "[s]"] and "▁Y" in prefixed.tokenizer.tokenize("Yes") and text
    for record in (pair(**columns), pair(**columns, images=[make_image(0, 32, 32)])):
        check_every_path(record, prefixed)


def test_what_merges_with_the_prompt_is_left_out_of_it(processor):
    """A line break after the header's is one token with it; the prompt ends before it, with and without images."""
    columns = {"chosen": [assistant("\n\nYes.")]}
    whole = {
        "alone": encoded(pair(**columns), processor),
        "beside": encoded(pair(**columns, images=[make_image(0)]), processor),
    }
    assert whole["alone"][1:] == whole["beside"][1:]
    assert whole["alone"][0][-3:] == whole["beside"][0][-3:]
    for images in ([], [make_image(0)]):
        check_every_path(pair(**columns, images=images), processor)


# The beginning of a text


def test_bos_stands_once(prefixed):
    assert added_start(prefixed.tokenizer) == [1]
    for record in (pair(), pair(images=[make_image(0)])):
        assert encoded(record, prefixed)[0].count("<s>") == 1
    plain = {"prompt": "<IMG_CONTEXT> What?", "chosen": " Yes", "rejected": " No"}
    assert encoded({**plain, "images": [make_image(0)]}, prefixed)[0][:2] == ["<s>", "<img>"]
    assert encoded({**plain, "prompt": "What?"}, prefixed)[0][0] == "<s>"
    for images in ([], [make_image(0)]):
        record = {**plain, "prompt": plain["prompt"] if images else "What?", "images": images}
        check_every_path(record, prefixed)


# Chat templates


TEXT_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{{ m['content'] | trim }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def with_template(processing_class, template):
    changed = copy.deepcopy(processing_class)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    "template", [TEXT_ONLY, TEXT_ONLY.replace(" | trim", ""), TEXT_ONLY.replace("{{ m['c", "{{ '' + m['c"), PARTS_ONLY]
)
@pytest.mark.parametrize("of", ["processor", "tokenizer"])
@pytest.mark.parametrize("parts", [False, True])
def test_contents_come_as_the_template_takes_them(processor, template, of, parts):
    """Strings or lists of parts, in a processor or a tokenizer, give the same tokens."""
    changed = with_template(processor if of == "processor" else processor.tokenizer, template)
    record = pair()
    if parts:
        record = {**record, **{k: prepare_multimodal_messages(record[k]) for k in ("prompt", "chosen", "rejected")}}
    assert encoded(record, changed) == encoded(pair(), processor)
    assert end_of_turn_token(changed) == end_of_turn_token(processor)


@pytest.mark.parametrize(
    ("template", "columns", "message"),
    [
        (
            TEXT_ONLY,
            {"images": [make_image(0)]},
            "record 'p1' has images, .*InternVLProcessor",
        ),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", {}, "InternVLProcessor cannot render"),
        ("{{ raise_exception('never') }}", {}, "InternVLProcessor cannot render.*never"),
        ("{{ messages[0]['content'] + 1 }}", {}, "InternVLProcessor cannot render"),
        (None, {}, "record 'p1' .*InternVLProcessor has no chat"),
        (
            "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE,
            {},
            "'p1': .*template refuses.*no system",
        ),
        (
            TEXT_ONLY.replace("{{ m['content'] | trim }}", "{{ m['content'] if loop.last else m['content'] | upper }}"),
            {},
            "record 'p1': .*last message differently",
        ),
    ],
)
def test_templates_that_cannot_be_used(processor, template, columns, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(with_template(processor, template))([pair(**columns)])


def test_a_template_whose_generation_prompt_says_more(processor):
    """As DeepSeek-R1's, whose generation prompt has a <think> that completions lack: a turn begins after their common prefix."""
    opens = with_template(processor, CHAT_TEMPLATE.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}"))
    assert opens.chat_template != processor.chat_template
    for chosen in ([assistant("Yes.")], [assistant("Yes."), user("Why?"), assistant("So.")]):
        assert encoded(pair(chosen=chosen), opens) == encoded(pair(chosen=chosen), processor)


def test_a_template_that_needs_a_system_message(processor):
    """It renders records that have one, and the row with a white image for ranks without images."""
    needs = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
    changed = with_template(processor, needs)
    assert end_of_turn_token(changed) == end_of_turn_token(processor)
    record = pair(prompt=[{"role": "system", "content": "Look."}, user("What is it?")])
    batch = PairCollator(changed, blank_image=True)([record])
    assert torch.equal(batch["input_ids"][:2], PairCollator(processor, blank_image=True)([record])["input_ids"][:2])


# Tools


TOOLS_TEMPLATE = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE.replace(
    "{{ '<|im_end|>\n' }}{% endfor %}",
    "{% if 'tool_calls' in message %}{{ message['tool_calls'] | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}",
).replace("{{ '<|im_end|>\n' }}", "{% if 'name' in message %}{{ message['name'] }}{% endif %}{{ '<|im_end|>\n' }}", 1)


def calls(*arguments):
    return [{"type": "function", "function": {"name": "look", "arguments": one}} for one in arguments]


def schema(**properties):
    return [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": properties}}}]


@pytest.mark.parametrize("of", ["processor", "tokenizer"])
def test_arrows_padding_is_not_scored(processor, of):
    """Rows of a data set, whose structs have the keys of all rows, give the tokens of the original records."""
    changed = with_template(processor if of == "processor" else processor.tokenizer, TOOLS_TEMPLATE)
    records = [
        pair(
            chosen=[assistant("", tool_calls=calls({"city": "Rome"}, {"box": {"left": 1}})), tool("3"), assistant("Yes.")],
            rejected=[assistant("No.")],
            tools=schema(city={"type": "string"}),
        ),
        pair(
            chosen=[assistant("", tool_calls=calls({"box": {"top": 2}, "x": 3, "list": [{"a": 1}, {"b": [None, 2]}]}))],
            tools=schema(x={"type": "integer", "enum": [1, 2]}),
            chat_template_kwargs={"enable_thinking": True},
        ),
        pair(chosen=[assistant("Yes.", name="bot")]),
    ]
    rows = Dataset.from_list(records)
    assert rows[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"]["x"] is None
    for row, record in zip(rows, records, strict=True):
        assert encoded(row, changed) == encoded(record, changed)
        assert "null" not in "".join(encoded(record, changed)[1]) or "list" in json.dumps(record)
        check_every_path({key: value for key, value in row.items() if value is not None}, changed)


def test_json_text_is_left_as_it_is(processor):
    """Arguments and tools given as JSON text are unchanged, including nulls."""
    changed = with_template(processor, TOOLS_TEMPLATE)
    given = [assistant("", tool_calls=calls('{"city": null}'))]
    text = "".join(token.strip("[]") for token in encoded(pair(chosen=given), changed)[1])
    assert "null" in text


# A vision-language model with a tokenizer as its processing class


def test_a_tokenizer_needs_no_blank_image(processor):
    tokenizer = with_template(processor.tokenizer, CHAT_TEMPLATE)
    for layout in ("padded", "packed"):
        batch = PairCollator(tokenizer, layout=layout, blank_image=True)([pair()])
        assert torch.equal(batch["input_ids"], PairCollator(tokenizer, layout=layout)([pair()])["input_ids"])
