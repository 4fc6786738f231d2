"""`mpo.models.join`: towers and language models of every form become an InternVL that transformers loads."""

import json
import re
from pathlib import Path

import official_checkpoints
import pytest
import torch
from official_checkpoints import language_shapes, write_official
from safetensors.torch import load_file, save_file
from separate_parts import plain_tokenizer, write_language, write_vision
from support import TEXTS, make_image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, InternVLVisionModel

from mpo.commands import main
from mpo.models import join, load_internvl
from mpo.models.small import INTERNVL_TOKENS, small_internvl, small_processor


def write_official_vision(folder: Path, large: bool) -> Path:
    """An InternViT as it is published, taken out of a whole official checkpoint."""
    whole = write_official(folder.with_name(f"{folder.name}-whole"), "qwen2", large=large)
    folder.mkdir()
    vision = json.loads((whole / "config.json").read_text())["vision_config"]
    (folder / "config.json").write_text(json.dumps({**vision, "model_type": "intern_vit_6b"}))
    tensors = load_file(whole / "model.safetensors")
    prefix = "vision_model."
    save_file(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        folder / "model.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return write_language(tmp_path_factory.mktemp("language") / "qwen2")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    return write_vision(tmp_path_factory.mktemp("vision") / "vit")


def logits(model, processor):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[make_image(0, width=64)], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)


def test_saved_it_is_an_internvl_of_transformers(vision, language, tmp_path, capsys):
    """The command, then plain transformers: the same logits and responses as of the joined model in memory, for the same seed."""
    out = tmp_path / "joined"
    assert main(["join", str(vision), str(language), "--output", str(out), "--max-tiles", "4", "--seed", "3"]) == 0
    assert "internvl2_5_stage1" in capsys.readouterr().out
    model, processor = AutoModelForImageTextToText.from_pretrained(out), AutoProcessor.from_pretrained(out)
    joined = join(vision, language, max_tiles=4, seed=3)
    before, text = logits(joined.model, joined.processor)
    after, same = logits(model, processor)
    assert torch.equal(before, after) and torch.equal(text, same)
    assert processor.image_processor.max_patches == 4 and processor.image_seq_length == model.config.image_seq_length == 4
    rendered = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert rendered.startswith("<|im_start|>system") and rendered.endswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.generation_config.eos_token_id == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    # The parts are unchanged, the projector depends on the seed alone.
    tower = InternVLVisionModel.from_pretrained(vision).state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in model.model.vision_tower.state_dict().items())
    state = torch.get_rng_state()
    other = join(vision, language, seed=4).model.model.multi_modal_projector
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(other.linear_1.weight, model.model.multi_modal_projector.linear_1.weight)
    assert other.linear_1.weight.abs().max() <= 64**-0.5  # PyTorch's: uniform to 1 / sqrt(4 x 16)
    assert other.linear_1.bias.abs().max() > 0
    assert main(["join", str(vision), str(language), "--output", str(out)]) == 2
    assert str(out) in capsys.readouterr().err


@pytest.mark.parametrize("kind, tied, spare", [("qwen2", False, 20), ("qwen2", True, 0), ("qwen3", True, 20), ("llama", False, 0)])
def test_rows_of_the_new_tokens(vision, tmp_path, kind, tied, spare):
    """Ids follow the language model's own in the order of the official code; a Qwen2 with spare rows has none left, a Qwen3 keeps
    them and its tied head; new rows of the head are the mean of the others."""
    folder = write_language(tmp_path / "text", kind, tied=tied, spare=spare)
    words, source = len(AutoTokenizer.from_pretrained(folder)), AutoModelForCausalLM.from_pretrained(folder)
    model, processor = join(vision, folder).model, join(vision, folder).processor
    assert processor.tokenizer.convert_tokens_to_ids(INTERNVL_TOKENS) == [*range(words, words + 9)]
    assert model.config.image_token_id == words + 2 == processor.image_token_id
    keeps = kind == "qwen3"
    assert len(model.lm_head.weight) == model.config.text_config.vocab_size == (words + spare if keeps else words + 9)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == keeps == model.config.tie_word_embeddings
    torch.testing.assert_close(model.lm_head.weight[words : words + 9], source.lm_head.weight[:words].mean(0).expand(9, -1))
    assert torch.equal(model.get_input_embeddings().weight[:words], source.get_input_embeddings().weight[:words])
    if spare and not keeps:  # rows of the language model
        assert torch.equal(model.get_input_embeddings().weight[words:], source.get_input_embeddings().weight[words : words + 9])


@pytest.mark.parametrize("form", ["official", "official large", "official InternVL", "InternVL"])
def test_towers_of_other_forms(language, tmp_path, form):
    """Each has the features of the checkpoint that it was taken from."""
    if form.startswith("official") and form != "official InternVL":
        given = write_official_vision(tmp_path / "vit", large="large" in form)
        whole = load_internvl(str(tmp_path / "vit-whole"))
    elif form == "official InternVL":
        given = write_official(tmp_path / "internvl", "internlm2")
        whole = load_internvl(str(given))
    else:
        given, made = tmp_path / "internvl", small_processor(TEXTS)
        whole = small_internvl(made, hidden_size=32, vision_hidden_size=32)
        whole.save_pretrained(given)
        made.save_pretrained(given)
    model = join(given, language).model
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (one.model.vision_tower(pixels).last_hidden_state for one in (model, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_internlm2(vision, tmp_path):
    """The language model of the official checkpoint, from a folder of its own: the same logits of a text."""
    whole = write_official(tmp_path / "whole", "internlm2")
    folder = tmp_path / "internlm"
    folder.mkdir()
    plain_tokenizer(folder, official_checkpoints.TEXTS)
    tokens = len(AutoTokenizer.from_pretrained(folder))
    config = json.loads((whole / "config.json").read_text())["llm_config"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": tokens}))
    prefix = "language_model."
    tensors = {name.removeprefix(prefix): value for name, value in load_file(whole / "model.safetensors").items()}
    kept = {name: tensors[name] for name in language_shapes("internlm2", tokens)}
    for name in ("model.tok_embeddings.weight", "output.weight"):
        kept[name] = kept[name][:tokens].clone()
    save_file(kept, folder / "model.safetensors")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        ours, theirs = (
            model(input_ids=ids).logits[..., :tokens] for model in (join(vision, folder).model, load_internvl(str(whole)))
        )
    torch.testing.assert_close(ours, theirs[..., :tokens])


@pytest.mark.parametrize(
    "vision_settings, language_settings, message",
    [
        ({"image_size": [24, 24]}, {}, r"\[24, 24\].*\[8, 8\]"),
        ({"image_size": [32, 48]}, {}, r"\[32, 48\]"),
        ({}, {"model_type": "gemma3_text"}, "qwen2, qwen3.*'gemma3_text'"),
        ({}, {"model_type": "internvl"}, "'internvl'"),
        ({}, {"tokenizer": None}, r"<\|im_start\|>"),
        ({}, {"intermediate_size": 40}, "gate_proj"),
        ({}, {"num_hidden_layers": 1}, "layer_types"),
    ],
)
def test_refusals(tmp_path, language, vision, vision_settings, language_settings, message):
    """Each names the folder and what was expected."""
    tower = write_vision(tmp_path / "vit", **vision_settings) if vision_settings else vision
    folder = language if not language_settings else write_language(tmp_path / "text")
    if "tokenizer" in language_settings:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_text((folder / name).read_text().replace("<|im_", "<|ix_"))
    elif language_settings:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **language_settings}))
    with pytest.raises(ValueError, match=message) as caught:
        join(tower, folder)
    assert str(folder if language_settings else tower) in str(caught.value)


def test_swapped_and_missing_parts(vision, language, tmp_path):
    for first, second, named in ((language, vision, vision), (vision, tmp_path / "none", "none"), (tmp_path, language, tmp_path)):
        with pytest.raises(ValueError, match=re.escape(str(named))):
            join(first, second)
