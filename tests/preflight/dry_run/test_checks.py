"""Records and processors that a dry run refuses, and the setting that its message names."""

import copy
import json
import re

import pytest
from datasets import Dataset
from support import TEXTS, make_image, messages
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mpo import MPOConfig
from mpo.encoding.costs import measure
from mpo.models.fit import check_fit, open_processor
from mpo.models.small import small_internvl, small_processor
from mpo.training.record_checks import check_records, fitting_tiles, name_of


def records(*sizes, chosen="A cat."):
    rows = [
        {
            "id": f"image-{place}",
            "prompt": messages("What is it?", "user"),
            "chosen": messages(chosen, "assistant"),
            "rejected": messages("A dog.", "assistant"),
            "images": [make_image(0, *size)],
        }
        for place, size in enumerate(sizes)
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def twelve_tiles():
    """16 tokens per tile, up to 12 tiles and a thumbnail."""
    return small_processor(TEXTS, image_size=64, patch_size=8, max_patches=12)


def checked(dataset, processor, context=8192, **settings):
    model = small_internvl(processor, max_position_embeddings=context)
    args = MPOConfig("unused", use_cpu=True, bf16=False, report_to="none", **settings)
    check_records(dataset, measure(dataset, processor), processor, model.config, args)


def test_tiles_beyond_the_context(twelve_tiles):
    """The message names the largest value that fits: with one more tile, a record does not fit."""
    dataset = records((64, 64), (256, 192))
    checked(dataset, twelve_tiles)
    with pytest.raises(ValueError, match="record 'image-1'.*208 .*13 tiles.*model.max_tiles=") as refusal:
        checked(dataset, twelve_tiles, context=150)
    assert "1 of 2 records" in str(refusal.value) and "context of 150 tokens" in str(refusal.value)
    fits = int(re.search(r"max_tiles=(\d+)", str(refusal.value))[1])
    for tiles, raises in ((fits, False), (fits + 1, True)):
        processor = copy.deepcopy(twelve_tiles)
        processor.image_processor.max_patches = tiles
        if raises:
            with pytest.raises(ValueError, match="do not fit"):
                checked(dataset, processor, context=150)
        else:
            checked(dataset, processor, context=150)


def test_tiles_beyond_max_length(twelve_tiles):
    with pytest.raises(ValueError, match=r"trainer.max_length=150 .*Set model.max_tiles=\d+"):
        checked(records((256, 192)), twelve_tiles, max_length=150)


def test_what_is_skipped_is_not_refused(twelve_tiles):
    """max_length=150 skips the second prompt with its 208 image tokens; if only the context is too short, it is refused."""
    dataset = records((64, 64), (256, 192))
    checked(dataset, twelve_tiles, context=150, max_length=150, on_bad_record="skip")
    tokens = int(measure(dataset.select([0]), twelve_tiles).tokens().max())
    budget = {"batching": "tokens", "max_tokens_per_batch": tokens}
    checked(dataset, twelve_tiles, max_length=150, on_bad_record="skip", **budget)
    costs = measure(dataset, twelve_tiles, max_length=150, on_bad_record="skip")
    assert costs.tokens().tolist() == [tokens, 3] and costs.tiles[1] == 0
    with pytest.raises(ValueError, match="context of 150 tokens"):
        checked(dataset, twelve_tiles, context=150, max_length=4096, on_bad_record="skip")


def test_not_even_one_tile_fits(twelve_tiles):
    with pytest.raises(ValueError, match=r"one tile per image.*trainer.max_length=\d+"):
        checked(records((256, 192)), twelve_tiles, max_length=20)
    assert fitting_tiles(records((256, 192)), [0], 20, twelve_tiles, MPOConfig("unused", use_cpu=True, bf16=False)) is None


def test_long_answers(twelve_tiles):
    """Without images the message names no tile setting; truncated to max_length, completions fit the context."""
    dataset = records((64, 64), chosen="A cat. " * 100).remove_columns("images")
    with pytest.raises(ValueError, match="context of 150 tokens") as refusal:
        checked(dataset, twelve_tiles, context=150)
    assert "tile" not in str(refusal.value)
    checked(dataset, twelve_tiles, context=150, max_length=100)


def test_a_batch_that_cannot_fit(twelve_tiles):
    dataset = records((64, 64), (256, 192))
    tokens = int(measure(dataset, twelve_tiles).tokens().max())
    checked(dataset, twelve_tiles, batching="tokens", max_tokens_per_batch=tokens)
    with pytest.raises(ValueError, match=f"max_tokens_per_batch={tokens - 1} .*'image-1' with {tokens} tokens.*at least {tokens}"):
        checked(dataset, twelve_tiles, batching="tokens", max_tokens_per_batch=tokens - 1)
    with pytest.raises(ValueError, match="max_tiles_per_batch=12 .*record 'image-1'.*at least 13"):
        checked(dataset, twelve_tiles, batching="tokens", max_tokens_per_batch=tokens, max_tiles_per_batch=12)


def test_records_without_an_id_go_by_their_place():
    assert name_of(Dataset.from_list([{"chosen": "a"}]), 0) == "record 0"


@pytest.fixture(scope="module")
def plain_tokenizer():
    """Bytes and the control tokens of a chat template, without image tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(bytes_)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def test_a_folder_whose_tokenizer_has_no_image_tokens(processor, plain_tokenizer, tmp_path):
    processor.save_pretrained(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    plain_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no image tokens.*<IMG_CONTEXT>"):
        open_processor(str(tmp_path))


def test_a_tokenizer_that_cuts_image_tokens_into_pieces(processor, internvl, plain_tokenizer):
    check_fit(internvl, processor)
    broken = copy.copy(processor)
    broken.tokenizer = plain_tokenizer
    with pytest.raises(ValueError, match="image token <img>.* 5 tokens"):
        check_fit(internvl, broken)


def test_another_mistake_is_not_renamed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl"}))
    with pytest.raises((OSError, ValueError)) as error:
        open_processor(str(tmp_path))
    assert "image tokens" not in str(error.value)
