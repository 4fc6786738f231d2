"""Official LLaVA-1.5 checkpoints with an MMFuser, converted: the same logits, bits, templates and images; and their stages."""

import copy
import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from official_llava import Parts
from PIL import Image
from safetensors.torch import load_file
from support import make_image

from mpo.batching.attention import packed_attention
from mpo.batching.collator import ConversationCollator
from mpo.commands import main
from mpo.encoding.turns import CONVERSATION, SIDES
from mpo.encoding.turns import render as render_record
from mpo.models.fused import LlavaWithFuser
from mpo.models.llava import SYSTEM
from mpo.models.loading import load_model

TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a cat?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a dog."}]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llava")


@pytest.fixture(scope="module")
def parts(folder):
    return Parts(folder)


@pytest.fixture(scope="module")
def converted(parts, folder):
    assert main(["convert", str(folder / "with"), str(folder / "hf"), "--tower", str(folder / "clip"), "--shard-gb", "5e-5"]) == 0
    return load_model(str(folder / "hf"))


def test_the_same_logits_and_bits(parts, folder, converted):
    model = converted.model
    assert type(model) is LlavaWithFuser and model.config.fuser_layers == [1, 3, 4]
    assert len(list((folder / "hf").glob("*.safetensors"))) > 1
    assert all(torch.equal(value, model.model.fuser.state_dict()[name]) for name, value in parts.fuser.state_dict().items())
    assert torch.equal(model.lm_head.weight[: parts.words], parts.text.lm_head.weight)
    before, after = torch.tensor([[1, 7, 8]]), torch.tensor([[9, 10]])
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    ids = torch.cat([before, torch.full((1, 16), model.config.image_token_index), after], dim=1)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, pixel_values=pixels).logits
    assert logits.argmax(-1).max() < parts.words  # the placeholder is never the largest
    torch.testing.assert_close(logits[..., : parts.words], parts.logits(before, pixels, after), rtol=1e-5, atol=1e-5)


def test_templates_and_padding(folder, converted):
    """Vicuna's turns, or a caption alone; an image is padded to a square with the mean colour, which becomes about 0."""
    render = converted.processor.apply_chat_template
    vicuna = f"<s>{SYSTEM} USER: <image>\na cat? ASSISTANT: a dog.</s>"
    assert render(TALK) == vicuna
    assert render(TALK + TALK[:1], add_generation_prompt=True) == vicuna + "USER: <image>\na cat? ASSISTANT:"
    plain = load_model(str(folder / "hf"), chat_template="plain").processor
    asked = {"images": [Image.new("RGB", (8, 8))], "prompt": TALK[:1]}
    pair = {"chosen": TALK[1:], "rejected": [{"role": "assistant", "content": "a cat."}]}
    alone = {"prompt": [{"role": "user", "content": "a cat?"}], "completion": TALK[1:]}
    for lost, sides in ((alone, CONVERSATION), (asked, ()), (asked | pair, SIDES)):
        with pytest.raises(ValueError, match="leaves out .*chat_template=vicuna"):
            render_record(lost, plain, sides=sides)
        assert "a cat?" in render_record(lost, converted.processor, sides=sides).prompt
    assert render_record(asked | {"completion": TALK[1:]}, plain, sides=CONVERSATION).prompt == "<s><image>"
    assert plain.apply_chat_template(TALK) == "<s><image>a dog.\n"
    for wrong in (TALK + TALK, [{"role": "system", "content": "Be brief."}, *TALK]):
        with pytest.raises(Exception, match="an image and its caption"):
            plain.apply_chat_template(wrong)
    with pytest.raises(ValueError, match="plain or vicuna.*'chatml'"):
        load_model(str(folder / "hf"), chat_template="chatml")
    image = Image.fromarray(np.full((20, 40, 3), 250, dtype=np.uint8))
    pixels = converted.processor.image_processor(image, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 28, 28) and pixels[:, 0].abs().max() < 0.05 and pixels[:, 14].min() > 1
    shown = [{"role": "user", "content": [{"type": "image", "image": image}, TALK[0]["content"][1]]}, TALK[1]]
    inputs = render(shown, tokenize=True, return_dict=True, return_tensors="pt")
    assert (inputs["input_ids"] == converted.model.config.image_token_index).sum() == 16
    assert (inputs["input_ids"] == 1).sum() == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type.*'linear'"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end.*True"),
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio.*'anyres'"),
        ({"mm_vision_select_layer": "list-5/x"}, "mm_vision_select_layer.*'list-5/x'"),
        ({"mm_vision_select_layer": -2}, r"\[-2\] and 1 MMFusers"),
        ({"mm_vision_select_layer": "list-5/-4/-3/-2"}, "attention_weights"),
        ({"mm_vision_select_layer": [-9, -3, -2]}, r"\[-9\]"),
        ({"vocab_size": 10}, "2 tensors of another shape .*embed_tokens"),  # rows for the placeholder alone are added
        ({"vocab_size": None}, "config.json does not describe a LLaVA-1.5"),
        ({"num_attention_heads": 3}, "config.json does not describe a LLaVA-1.5: .*heads"),
        ({"hidden_act": "curve"}, "config.json does not describe a LLaVA-1.5: .*curve"),
    ],
)
def test_checkpoints_that_are_refused(parts, folder, tmp_path, capsys, change, message):
    (tmp_path / "wrong").mkdir()
    for path in (folder / "with").iterdir():
        (tmp_path / "wrong" / path.name).symlink_to(path)
    (tmp_path / "wrong" / "config.json").unlink()
    (tmp_path / "wrong" / "config.json").write_text(json.dumps(parts.config | change))
    assert main(["convert", str(tmp_path / "wrong"), str(tmp_path / "out"), "--tower", str(folder / "clip")]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_captions_in_one_row(folder, converted):
    """With the template plain a prompt ends in an image token, and nothing branches: log-probs are those of a row each."""
    processor = load_model(str(folder / "hf"), chat_template="plain").processor
    records = [
        {"messages": [TALK[0], {"role": "assistant", "content": text}], "images": [make_image(number)]}
        for number, text in enumerate(["a dog.", "a cat and a dog."])
    ]
    sums = {}
    for layout, backend in (("packed", "segments"), ("padded", None)):
        batch = ConversationCollator(processor, layout=layout)(copy.deepcopy(records))
        with torch.no_grad(), packed_attention(converted.model, backend=backend) if backend else nullcontext():
            logits = converted.model(**batch.model_inputs, use_cache=False).logits.flatten(0, 1)[batch.positions_to_keep.index]
        sums[layout] = batch.sums(logits.log_softmax(-1).gather(1, batch.shift_labels[0, :, None])[None, :, 0])[0]
    torch.testing.assert_close(sums["packed"], sums["padded"], rtol=1e-5, atol=1e-5)


def test_two_stages_and_mpo(folder, converted, tmp_path):
    """On captions with the template plain, then on conversations with Vicuna's: the loss falls, and the right parts alone move.

    What is opened after the first stage has Vicuna's template again, without being told."""
    lines, pairs = [], []
    for index in range(8):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
        talk = [{"role": "user", "content": "<image>a cat?"}, {"role": "assistant", "content": "a dog and a cat."}]
        lines.append(json.dumps({"images": [f"{index}.png"], "messages": talk}))
        pairs.append(json.dumps({"image": f"{index}.png", "question": "a cat?", "chosen": "a dog.", "rejected": "a cat."}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(pairs))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    small = ["use_cpu=true", "per_device_train_batch_size=2", "global_batch_size=4", "max_steps=4", "dataloader_num_workers=0"]
    before, both = folder / "hf", ("model.fuser", "model.multi_modal_projector")
    for stage, moving in ((1, both), (2, (*both, "model.language_model", "lm_head"))):
        words = [f"model.name_or_path={before}", f"data.path={tmp_path / 'chats.jsonl'}", f"run_dir={tmp_path / str(stage)}"]
        words += [f"trainer.{setting}" for setting in (*small, "learning_rate=1e-2", "warmup_steps=0")]
        chosen = ["model=llava1_5_vicuna7b", f"method=mmfuser_stage{stage}", "fuser.layers=null"]
        assert main(["sft", *chosen, *words]) == 0
        history = json.loads((tmp_path / str(stage) / "trainer_state.json").read_text())["log_history"]
        losses = [log["loss"] for log in history if "loss" in log]
        assert losses[-1] < losses[0], losses
        one, two = (load_model(str(path)).model.state_dict() for path in (before, tmp_path / str(stage)))
        moved = {name for name in one if not torch.equal(one[name], two[name])}
        assert moved and all(name.startswith(moving) for name in moved)
        assert all(any(name.startswith(part) for name in moved) for part in moving)
        before = tmp_path / str(stage)
        assert load_model(str(before)).processor.chat_template == converted.processor.chat_template
    words = [f"model.name_or_path={before}", f"data.path={tmp_path / 'pairs.jsonl'}", f"run_dir={tmp_path / 'mpo'}"]
    alone = {name: "freeze" for name in ("vision", "projector", "language", "head")} | {"fuser": "train"}
    words += [f"trainer.{setting}" for setting in (*small[:3], "max_steps=1", small[4], "learning_rate=1e-2", "warmup_steps=0")]
    assert main(["train", *words, *(f"train_parts.{part}={choice}" for part, choice in alone.items())]) == 0
    one, two = (load_file(path / "model.safetensors") for path in (before, tmp_path / "mpo"))
    moved = {name for name in one if not torch.equal(one[name], two[name])}
    assert moved and all("fuser." in name for name in moved)
