"""Records to padded rows: literal tensors, the end of a completion, images, lengths."""

import pytest
import torch
from datasets import Dataset
from support import completion_mask, make_image, messages
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo.batching.collator import LabelledBatches, PairCollator
from mpo.data.encoded import with_encoded_images
from mpo.encoding.costs import RecordMeasure
from mpo.encoding.labels import end_of_turn_token

WORDS = ["<pad>", "<eos>", "<user>", "<bot>", "<end>", "\n", "two", "plus", "is", "four", "five", "sure", "why"]
# Like ChatML: a turn ends in <end>, followed by a newline.
TEMPLATE = (
    "{% for m in messages %}{{ ('<user> ' if m['role'] == 'user' else '<bot> ') + m['content'] + ' <end> \n ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bot> ' }}{% endif %}"
)
ID = {word: index for index, word in enumerate(WORDS)}


@pytest.fixture(scope="module")
def words():
    """A tokenizer whose tokens are words, so that rows can be read."""
    tokenizer = Tokenizer(models.WordLevel(ID))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<user>", "<bot>", "<end>"],
        chat_template=TEMPLATE,
    )


def as_ids(text: str, length: int) -> list[int]:
    ids = [ID[word] for word in text.replace("\n", "\\n").split()] if "\n" not in text else [ID[w] for w in text.split(" ") if w]
    return ids + [ID["<pad>"]] * (length - len(ids))


CHAT = {
    "prompt": messages("two plus two", "user"),
    "chosen": messages("is four", "assistant"),
    "rejected": messages("five", "assistant"),
}


def test_rows_of_a_conversation(words):
    """The completion ends with its <end>, without the newline after it."""
    batch = PairCollator(words)([CHAT])
    assert batch["input_ids"].tolist() == [
        as_ids("<user> two plus two <end> \n <bot> is four <end>", 10),  # chosen
        as_ids("<user> two plus two <end> \n <bot> five <end>", 10),  # rejected
    ]
    assert completion_mask(batch).tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],  # is four <end>
        [0, 0, 0, 0, 0, 0, 0, 1, 1, 0],  # five <end>
    ]
    assert batch["attention_mask"].tolist() == [[1] * 10, [1] * 9 + [0]]


def test_trls_end_of_the_completion(words):
    """With completion_end="template" the newline is labelled too."""
    batch = PairCollator(words, completion_end="template")([CHAT])
    assert batch["input_ids"][0].tolist() == as_ids("<user> two plus two <end> \n <bot> is four <end> \n", 11)
    assert completion_mask(batch).tolist() == [[0] * 7 + [1, 1, 1, 1], [0] * 7 + [1, 1, 1, 0]]


def test_only_the_assistants_turns_are_scored(words):
    """A completion of three messages: the user's turn between and the header of the second reply are context."""
    completion = messages("sure", "assistant") + messages("why", "user") + messages("is four", "assistant")
    batch = PairCollator(words)([{**CHAT, "chosen": completion}])
    row = "<user> two plus two <end> \n <bot> sure <end> \n <user> why <end> \n <bot> is four <end>"
    assert batch["input_ids"][0].tolist() == as_ids(row, 18)
    #                                           sure <end> \n user why end \n bot is four end
    assert completion_mask(batch)[0].tolist() == [0] * 7 + [1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1]


def test_plain_text_gets_eos(words):
    batch = PairCollator(words)([{"prompt": "two plus two ", "chosen": "is four ", "rejected": "five <eos>"}])
    assert batch["input_ids"].tolist() == [as_ids("two plus two is four <eos>", 6), as_ids("two plus two five <eos>", 6)]
    assert completion_mask(batch).tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_implicit_prompt(words):
    record = {"chosen": CHAT["prompt"] + CHAT["chosen"], "rejected": CHAT["prompt"] + CHAT["rejected"]}
    assert torch.equal(PairCollator(words)([record])["input_ids"], PairCollator(words)([CHAT])["input_ids"])


def test_a_packed_row(words):
    """The prompt once, both completions after it without their last token, the prompt's last token once more between them."""
    batch = PairCollator(words, layout="packed")([CHAT, {"prompt": "why ", "chosen": "sure ", "rejected": "is "}])
    first = "<user> two plus two <end> \n <bot> is four" + " <bot> five"  # a pair
    second = "why sure" + " why is"  # another: plain text, whose completions end in <eos>
    assert batch["input_ids"].tolist() == [as_ids(f"{first} {second}", 15)]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8] + [6, 7] + [0, 1] + [0, 1]]
    kept = [6, 7, 8] + [9, 10] + [11, 12] + [13, 14]  # <bot> predicts "is", "is" predicts "four", "four" predicts <end>; ...
    assert batch.positions_to_keep.index.tolist() == kept
    assert batch.shift_labels.tolist() == [as_ids("is four <end> five <end> sure <eos> is <eos>", 9)]
    assert batch["segments"].lengths == ((9, 9), (2, 8), (2, 2), (2, 2))  # the rejected one: no last prompt token
    assert batch["segments"].key_index.tolist() == [*range(9), *range(6), 9, 10, 11, 12, 13, 14]
    assert batch.labelled.lengths.tolist() == [3, 2, 2, 2]  # chosen, chosen, rejected, rejected
    assert batch.labelled.node.tolist() == [0, 1, 2] + [5, 6] + [3, 4] + [7, 8]  # among the kept positions


def test_max_length_cuts_completions(words):
    """Nine tokens: the chosen completion loses its <end>."""
    batch = PairCollator(words, max_length=9)([CHAT])
    assert batch["input_ids"][0].tolist() == as_ids("<user> two plus two <end> \n <bot> is four", 9)
    kept_end = PairCollator(words, max_length=9, truncation_mode="keep_end")([CHAT])
    assert kept_end["input_ids"][0].tolist() == as_ids("two plus two <end> \n <bot> is four <end>", 9)


def test_max_length_never_cuts_a_prompt(words):
    with pytest.raises(ValueError, match="record 'q7'.*7 tokens.*max_length=7"):
        PairCollator(words, max_length=7)([{**CHAT, "id": "q7"}])


def test_padding_to_a_multiple(words):
    assert PairCollator(words, pad_to_multiple_of=8)([CHAT])["input_ids"].shape == (2, 16)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "two", "rejected": "five"}, "has no 'chosen'"),
        ({"prompt": "two", "chosen": "five", "rejected": None}, "has no 'rejected'"),
        ({**CHAT, "images": [make_image(0)]}, "images, .*is a tokenizer"),
    ],
)
def test_refusals(words, record, message):
    with pytest.raises(ValueError, match=message):
        PairCollator(words)([record])


def test_an_empty_completion_is_refused():
    """Without a token that could end it, an empty completion has nothing to label."""
    tokenizer = Tokenizer(models.WordLevel(ID))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    with pytest.raises(ValueError, match="'rejected' is empty"):
        PairCollator(bare)([{"prompt": "two ", "chosen": "four", "rejected": ""}])


def test_end_of_turn_is_the_templates_not_the_tokenizers(words, processor):
    assert end_of_turn_token(words) == ID["<end>"] != words.eos_token_id
    assert end_of_turn_token(processor) == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


# Images


def image_record(index: int, images: int = 1) -> dict:
    return {**CHAT, "images": [make_image(index + i, width=64) for i in range(images)]}


def test_image_tokens_and_tiles(processor):
    """An image of 64 x 32 is two tiles of 32 and a thumbnail, each of 4 tokens: 12 an image. Both completions have tiles."""
    batch = PairCollator(processor)([image_record(0), image_record(5, images=2)])
    image_token = processor.image_token_id
    assert (batch["input_ids"] == image_token).sum(dim=1).tolist() == [12, 24, 12, 24]
    assert batch["pixel_values"].shape == (18, 3, 32, 32)
    assert torch.equal(batch["pixel_values"][:9], batch["pixel_values"][9:])


def test_images_and_text_in_one_batch(processor, internvl):
    """Records with and without images, in any order, give the log-probs they have alone."""
    records = [CHAT, image_record(0), CHAT, image_record(3, images=2)]
    collator = PairCollator(processor)

    def token_logps(batch):
        logits = internvl(**batch.model_inputs).logits[:, :-1].log_softmax(-1)
        chosen = logits.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (chosen * completion_mask(batch)[:, 1:]).sum(1)

    with torch.no_grad():
        together = token_logps(collator(records)).view(2, 4)
        alone = torch.stack([token_logps(collator([record])) for record in records], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_images_are_processed_once(processor, monkeypatch):
    calls = []
    original = type(processor.image_processor).__call__
    monkeypatch.setattr(
        type(processor.image_processor),
        "__call__",
        lambda self, images, *a, **k: calls.append(len(images)) or original(self, images, *a, **k),
    )
    PairCollator(processor)([image_record(0), image_record(1)])
    assert sum(calls) == 2


def test_more_placeholders_than_images(processor):
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]}]
    with pytest.raises(ValueError, match="number of image placeholders"):
        PairCollator(processor)([{**CHAT, "prompt": prompt, "images": [make_image(0)]}])


def test_keep_end_would_truncate_images(processor):
    with pytest.raises(ValueError, match="truncation_mode='keep_end' with max_length=20.*or use 'keep_start'"):
        PairCollator(processor, max_length=20, truncation_mode="keep_end")([image_record(0)])


IMAGED = {
    "id": "p",
    "images": [make_image(0)],
    "prompt": messages("What is it?", "user"),
    "chosen": messages("A cat.", "assistant"),
    "rejected": messages("A dog.", "assistant"),
}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"chosen": messages("It is <IMG_CONTEXT> 1.", "assistant")}, "'chosen' holds '<IMG_CONTEXT>'"),
        ({"prompt": messages("What is <IMG_CONTEXT>?", "user")}, "'prompt' holds '<IMG_CONTEXT>'"),
        ({"prompt": messages("What is <video>?", "user")}, "'prompt' holds '<video>'"),
        ({"images": [], "rejected": messages("<IMG_CONTEXT>", "assistant")}, "'rejected' holds '<IMG_CONTEXT>'"),
        ({"prompt": "<IMG_CONTEXT>\n<IMG_CONTEXT>?", "chosen": "A", "rejected": "B"}, "'prompt' holds '<IMG_CONTEXT>'"),
    ],
)
def test_an_images_token_in_a_text(processor, change, found):
    """The collator and the measurement refuse the record by name, or skip it."""
    bad = {**IMAGED, **change}
    with pytest.raises(ValueError, match=f"^record 'p': the text of {found}"):
        PairCollator(processor, layout="packed")([bad])
    encoded = (
        {**bad, "images": with_encoded_images(Dataset.from_list([{"images": bad["images"]}]))[0]["images"]}
        if bad["images"]
        else bad
    )
    with pytest.raises(ValueError, match=f"^record 'p': the text of {found}"):
        RecordMeasure(processor, "end_of_turn", "prompt", "raise")(encoded)
    batch = PairCollator(processor, layout="packed", on_bad_record="skip")([IMAGED, bad])
    assert batch.kept == (0,) and [one["id"] for one in batch.bad] == ["p"] and found in batch.bad[0]["reason"]
    assert (batch["input_ids"] == processor.image_token_id).sum() == len(batch["pixel_values"]) * processor.image_seq_length


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "<IMG_CONTEXT>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog."},  # the place of a plain prompt's image
        {"chosen": messages("<img> or <video> or </img>", "assistant")},
        {"images": [], "prompt": messages("The <video> of HTML?", "user")},
    ],
)
def test_texts_that_leave_the_count_of_images_alone(processor, change):
    batch = PairCollator(processor, layout="packed")([{**IMAGED, **change}])
    tiles = len(batch.model_inputs.get("pixel_values", ()))
    assert (batch["input_ids"] == processor.image_token_id).sum() == tiles * processor.image_seq_length


def test_a_users_collator_may_make_batches_of_padded_rows(processor):
    padded = PairCollator(processor)
    assert LabelledBatches(padded)([CHAT]).shift_labels.tolist() == padded([CHAT]).shift_labels.tolist()
    with pytest.raises(ValueError, match="layout='padded'"):
        LabelledBatches(PairCollator(processor, layout="packed"))([CHAT])
