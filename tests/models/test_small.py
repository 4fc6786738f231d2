"""Small InternVL models: transformers classes, every text family, saving and loading."""

import pytest
import torch
from support import TEXTS, make_image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2Tokenizer,
)

from mpo.models.small import small_internvl, small_processor


def encode(processor, width=64):
    """One question about one image of `width` by 32 pixels."""
    content = [{"type": "image"}, {"type": "text", "text": "What is 12 plus 3?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    return processor(text=[prompt], images=[[make_image(0, width=width)]], return_tensors="pt")


def small(processor, **settings):
    return small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2, **settings)


def test_processor_is_made_of_transformers_own_classes(processor):
    assert type(processor) is InternVLProcessor
    assert type(processor.image_processor) is GotOcr2ImageProcessor
    assert type(processor.video_processor) is InternVLVideoProcessor
    assert type(processor.tokenizer) is Qwen2Tokenizer


def test_prompt_is_internvls_chatml_with_expanded_image(processor):
    """A 64 x 32 image has two 32-pixel tiles and a thumbnail; a tile of 4 x 4 patches has 4 tokens: 12 in all."""
    inputs = encode(processor, width=64)
    assert inputs["pixel_values"].shape == (3, 3, 32, 32)
    assert processor.decode(inputs["input_ids"][0]) == (
        f"<|im_start|>user\n<img>{'<IMG_CONTEXT>' * 12}</img>\nWhat is 12 plus 3?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_square_image_has_one_tile_and_no_thumbnail(processor):
    assert encode(processor, width=32)["pixel_values"].shape == (1, 3, 32, 32)


def test_digits_and_special_tokens_are_single_tokens(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.tokenize("1234<|im_end|>") == ["1", "2", "3", "4", "<|im_end|>"]
    for token in ("<|im_start|>", "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<box>"):
        assert len(tokenizer.encode(token)) == 1


@pytest.mark.parametrize("text", ["Zürich ≠ 東京 🙂", "tabs\tand  spaces\n\n"])
def test_any_text_survives_the_tokenizer(processor, text):
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_every_text_family_computes_saves_and_loads(processor, tmp_path, family):
    model = small(processor, text=family)
    assert model.config.text_config.model_type == family
    inputs = encode(processor)
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded_processor) is InternVLProcessor
    loaded_inputs = encode(loaded_processor)
    assert all(torch.equal(inputs[name], loaded_inputs[name]) for name in inputs)

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.tie_word_embeddings is False
    assert loaded.lm_head.weight.data_ptr() != loaded.get_input_embeddings().weight.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**loaded_inputs).logits, logits, rtol=0, atol=0)


def test_images_matter(internvl, processor):
    inputs = encode(processor)
    with torch.no_grad():
        seen = internvl(**inputs).logits
        inputs["pixel_values"] = -inputs["pixel_values"]
        other = internvl(**inputs).logits
    assert not torch.allclose(seen, other)


def test_generation_stops_at_the_end_of_turn(internvl, processor):
    """With a head that prefers `<|im_end|>` everywhere, the response is that token alone."""
    end_of_turn = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    internvl.lm_head = torch.nn.Linear(32, len(processor.tokenizer))
    torch.nn.init.zeros_(internvl.lm_head.weight)
    torch.nn.init.zeros_(internvl.lm_head.bias)
    internvl.lm_head.bias.data[end_of_turn] = 1.0
    inputs = encode(processor)
    generated = internvl.generate(**inputs, max_new_tokens=5)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == [end_of_turn]


def test_end_of_turn_ends_generation_whatever_eos_is():
    """As in InternLM2-based InternVLs, whose tokenizer's eos does not end a turn."""
    processor = small_processor(TEXTS, eos_token="<|endoftext|>")
    model = small(processor)
    assert processor.tokenizer.eos_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_seed_decides_the_weights_and_leaves_the_random_state(processor):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (small(processor, seed=seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_tied_embeddings_on_request(processor):
    model = small(processor, tie_word_embeddings=True)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: small_processor(TEXTS, image_size=32, patch_size=32), "32 / 32"),
        (lambda p: small_processor(TEXTS, vocab_size=100), "269 .*vocab_size=100"),
        (lambda p: small_processor(TEXTS, eos_token="</s>"), "eos_token='</s>'"),
        (lambda p: small_processor(TEXTS, max_patches=0), "max_patches=0"),
        (lambda p: small(p, text="gpt2"), "text='gpt2'"),
        (lambda p: small(p, heads=3), "hidden_size / heads"),
    ],
)
def test_sizes_that_cannot_work_are_refused(processor, build, message):
    with pytest.raises(ValueError, match=message):
        build(processor)
