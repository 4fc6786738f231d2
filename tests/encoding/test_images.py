"""An image in several prompts of a batch is split and encoded once, and nothing else changes."""

import copy

import pytest
import torch
from datasets import Dataset
from small_runs import LORA
from support import make_image, messages, perturbed
from transformers.models.internvl.modeling_internvl import InternVLVisionModel

from mpo import MPOConfig, MPOTrainer
from mpo.batching.collator import PairCollator
from mpo.data.images import open_image
from mpo.encoding.keys import image_key
from mpo.models.tower import find_tower


def record(question: str, *images) -> dict:
    return {
        "prompt": messages(question, "user"),
        "chosen": messages("The sum is 5.", "assistant"),
        "rejected": messages("It is a dog.", "assistant"),
        "images": list(images),
    }


def records() -> list[dict]:
    """Four prompts with six images, three of them distinct; equal ones are different objects. For tile_budget="image"."""
    one, two, three = make_image(0), make_image(1, 32, 32), make_image(2)
    return [
        record("What is it?", one),
        record("Which is the largest?", two, one.copy()),
        record("What is the sum?", one.copy()),
        record("Is it?"),
        record("Which is which?", three, two.copy()),
    ]


@pytest.fixture
def split(processor, monkeypatch):
    """The number of images in each call of the image processor."""
    given, kind = [], type(processor.image_processor)
    original = kind.__call__
    monkeypatch.setattr(
        kind, "__call__", lambda self, images, **kwargs: given.append(len(images)) or original(self, images, **kwargs)
    )
    return given


def test_each_distinct_image_is_split_once(processor, split):
    batch = PairCollator(processor, layout="packed", tile_budget="image")(records())
    assert sum(split) == 3
    order = batch["tile_order"].tolist()
    # one and three: two tiles and a thumbnail
    assert len(batch["pixel_values"]) == 3 + 1 + 3
    assert order == [0, 1, 2] + [3] + [0, 1, 2] + [0, 1, 2] + [4, 5, 6] + [3]


def test_padded_rows_have_every_image(processor, split):
    """As TRL's: tiles of all prompts, for the chosen rows and then for the rejected ones."""
    batch = PairCollator(processor, tile_budget="image")(records())
    assert sum(split) == 3 and "tile_order" not in batch
    alone = [PairCollator(processor, tile_budget="image")([one]).model_inputs.get("pixel_values") for one in records()]
    expected = torch.cat([pixels[: len(pixels) // 2] for pixels in alone if pixels is not None])
    assert torch.equal(batch["pixel_values"], torch.cat([expected, expected]))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_image_in_a_turn_of_a_tool(processor, layout):
    """Images are in the order of their turns; the same turn of the user has the same tokens but for the role."""
    turns = [("user", "What is it?", 1), ("assistant", "I look.", 0), ("tool", "here", 1)]
    asked = [
        {"role": role, "content": [*[{"type": "image"}] * shown, {"type": "text", "text": text}]} for role, text, shown in turns
    ]
    given = {**record("", make_image(0), make_image(1, 32, 32)), "prompt": asked}
    by_tool = PairCollator(processor, layout=layout)([given])
    by_user = PairCollator(processor, layout=layout)([{**given, "prompt": [*asked[:2], {**asked[2], "role": "user"}]}])
    assert torch.equal(by_tool["pixel_values"], by_user["pixel_values"])
    decoded = processor.tokenizer.decode(by_user["input_ids"][0]).rsplit("user", 1)
    assert processor.tokenizer.decode(by_tool["input_ids"][0]) == "tool".join(decoded)


def test_nothing_to_order_without_repeats(processor):
    assert "tile_order" not in PairCollator(processor, layout="packed")(records()[:1] + records()[3:])


def test_images_that_look_alike_are_not_the_same(processor, split):
    other = make_image(0)
    other.putpixel((0, 0), (1, 2, 3))
    batch = PairCollator(processor, layout="packed")([record("What is it?", make_image(0)), record("What is it?", other)])
    assert sum(split) == 2 and len(batch["pixel_values"]) == 6


def test_each_image_is_hashed_once_at_most(processor, monkeypatch):
    """However many have its shape; and one that is alone with its shape not at all, in however many prompts."""
    hashed = []
    monkeypatch.setattr("mpo.encoding.images.image_key", lambda image: hashed.append(image) or image_key(image))
    shapes = [(64, 32)] * 8 + [(32, 32)]
    given = [record(f"What is {number}?", make_image(number, *shape)) for number, shape in enumerate(shapes)]
    given += [record("Is it?", given[0]["images"][0]), record("Is it?", given[8]["images"][0])]
    batch = PairCollator(processor, layout="packed")(given)
    assert len(hashed) == len({id(image) for image in hashed}) == 8
    assert len(batch["pixel_values"]) == len(set(batch["tile_order"].tolist())) < len(batch["tile_order"])


def test_an_image_with_fewer_tiles_is_another(processor, split):
    """Images of one prompt share its four tiles, so the second prompt's image may have two."""
    batch = PairCollator(processor, layout="packed")(records()[:2])
    assert sum(split) == 3 and "tile_order" not in batch


def train(tmp_path, processor, model, *, rows="packed", freeze=False, **settings):
    model = copy.deepcopy(model)
    if freeze:
        find_tower(model).requires_grad_(False)
    defaults = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "optim": "sgd"}
    defaults |= {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_steps": 2,
        "tile_budget": "image",
    }
    peft_config = settings.pop("peft_config", None)
    trainer = MPOTrainer(
        model=model,
        args=MPOConfig(
            str(tmp_path), rows=rows, per_device_train_batch_size=5, gradient_checkpointing=False, **defaults, **settings
        ),
        train_dataset=Dataset.from_list(records()),
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


KINDS = {
    "full": ({}, 2),  # the policy's tower and the reference's
    "frozen tower": ({"freeze": True}, 1),  # the reference uses the output of the policy's tower
    "lora": ({"peft_config": LORA}, 1),
    "checkpointing": ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, 2),
    "trained twice": ({}, 2),
}


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_each_image_of_a_batch_is_opened_once(processor, tmp_path, monkeypatch, form):
    """Three pairs of one prompt and one of another have an image that is stored in a file, or as bytes; one has another."""
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for seed, file in enumerate(files):
        make_image(seed).save(file)
    images = [
        {"path": str(file), "bytes": None} if form == "path" else {"path": None, "bytes": file.read_bytes()} for file in files
    ]
    questions, own = ["What is it?"] * 3 + ["Which?"] * 2, [images[0]] * 4 + [images[1]]
    records = [
        {
            "prompt": messages(question, "user"),
            "chosen": messages("A cat.", "assistant"),
            "rejected": messages(f"A dog {place}.", "assistant"),
            "images": [image],
        }
        for place, (question, image) in enumerate(zip(questions, own, strict=True))
    ]
    opened = []
    monkeypatch.setattr("mpo.encoding.turns.open_image", lambda *args, **kwargs: opened.append(args) or open_image(*args, **kwargs))
    batch = PairCollator(processor, layout="packed")(records)
    assert len(opened) == 2
    alone = PairCollator(processor, layout="packed")([{**records[0], "images": [make_image(0)]}])
    assert torch.equal(batch["pixel_values"][: len(alone["pixel_values"])], alone["pixel_values"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_tower_sees_each_distinct_tile_once(processor, internvl, tmp_path, monkeypatch, kind):
    """Seven distinct tiles of seventeen, and the weights of padded rows. A trained tower sees the first batch once more."""
    settings, passes = KINDS[kind]
    settings = dict(settings)
    if "peft_config" in settings:
        settings["peft_config"] = copy.deepcopy(settings["peft_config"])
        settings["peft_config"].lora_dropout = 0.0
    if kind == "trained twice":  # a model used by a trainer before, and its copy
        internvl = train(tmp_path, processor, perturbed(internvl)).model
    seen, forward = [], InternVLVisionModel.forward

    def counting(self, pixel_values, *args, **kwargs):
        seen.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(InternVLVisionModel, "forward", counting)
    packed = train(tmp_path, processor, internvl, **settings)
    assert sum(seen) == 7 * passes * 2 + 7 * (passes - 1)  # two steps, and the check of a trained tower's start
    padded = train(tmp_path, processor, internvl, rows="padded", **settings)
    for name, value in packed.model.state_dict().items():
        torch.testing.assert_close(
            value, padded.model.state_dict()[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
