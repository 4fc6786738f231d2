"""The trainer on packed rows: the loss, gradients and logs of padded rows, and every image once."""

import copy

import pytest
import torch
from datasets import Dataset
from small_runs import LORA, difference
from support import image_pairs, make_image, messages, perturbed, text_pairs

from mpo import MPOConfig, MPOTrainer
from mpo.models.small import small_internvl
from mpo.models.tower import find_tower


def mixed_pairs(count: int) -> Dataset:
    """Pairs with one prompt, text-only pairs, several images, equal completions in two pairs."""
    rows = image_pairs(2).to_list()
    shared = [{**rows[0], "rejected": messages(f"It is {i}, I think.", "assistant")} for i in range(3)]
    several = [{**rows[1], "images": [make_image(5), make_image(6, 96, 32)]}]
    text = [{**row, "images": []} for row in text_pairs(2).to_list()]
    return Dataset.from_list((shared + several + text)[:count])


DATA = {"images": lambda: image_pairs(6), "text": lambda: text_pairs(6), "mixed": lambda: mixed_pairs(6)}


def run(tmp_path, processor, model, dataset, *, ref_model=None, peft_config=None, freeze_tower=False, **settings):
    model = copy.deepcopy(model)
    if freeze_tower:
        find_tower(model).requires_grad_(False)
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 6,
        "max_steps": 2,
        "disable_tqdm": True,
    }
    trainer = MPOTrainer(
        model=model,
        ref_model=ref_model,
        args=MPOConfig(str(tmp_path), **{**defaults, **settings}),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def logs(trainer) -> list[dict]:
    timed = ("runtime", "per_second", "data_wait", "flos", "num_tokens")
    return [{k: v for k, v in log.items() if not any(word in k for word in timed)} for log in trainer.state.log_history]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("kind", ["full", "frozen tower", "lora"])
@pytest.mark.parametrize("data", DATA)
def test_same_as_padded_rows(processor, internvl, tmp_path, data, kind, checkpointing):
    """Two steps of SGD: weights within 1e-6, every logged value within 1e-4 of its size (float32)."""
    settings = {"gradient_checkpointing": checkpointing, "freeze_tower": kind == "frozen tower"}
    settings |= {"peft_config": LORA if kind == "lora" else None, "loss_type": ["sigmoid", "bco_pair", "sft"]}
    settings |= {"loss_weights": [0.8, 0.2, 1.0], "disable_dropout": True}
    if kind == "lora":
        adapter = copy.deepcopy(LORA)
        adapter.lora_dropout = 0.0
        settings["peft_config"] = adapter
    ends = {rows: run(tmp_path, processor, internvl, DATA[data](), rows=rows, **settings) for rows in ("packed", "padded")}
    assert {rows: trainer.layout for rows, trainer in ends.items()} == {"packed": "packed", "padded": "padded"}
    packed, padded = (ends[rows].model.state_dict() for rows in ("packed", "padded"))
    assert difference(packed, padded) < 1e-6
    for mine, theirs in zip(logs(ends["packed"]), logs(ends["padded"]), strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-5), name


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_every_text_model(processor, tmp_path, kind):
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2, text=kind)
    first = [run(tmp_path, processor, model, mixed_pairs(6), rows=rows) for rows in ("packed", "padded")]
    assert first[0].layout == "packed"
    assert difference(first[0].model.state_dict(), first[1].model.state_dict()) < 1e-6


@pytest.mark.parametrize(
    "option", [{"ld_alpha": 0.3}, {"use_weighting": True, "loss_type": ["sigmoid"]}, {"max_length": 70}], ids=str
)
def test_options(processor, internvl, tmp_path, option):
    reference = perturbed(copy.deepcopy(internvl))
    losses = [
        run(
            tmp_path, processor, internvl, mixed_pairs(6), rows=rows, ref_model=copy.deepcopy(reference), **option
        ).state.log_history
        for rows in ("packed", "padded")
    ]
    assert losses[0][0]["loss"] == pytest.approx(losses[1][0]["loss"], rel=1e-5)
    assert losses[0][1]["loss"] == pytest.approx(losses[1][1]["loss"], rel=1e-4)


def test_pairs_of_one_question_share_its_row(processor, internvl, tmp_path):
    """Three pairs with one prompt and one chosen completion: one row, one image, each completion once."""
    records = mixed_pairs(3).to_list()
    trainer = run(tmp_path, processor, internvl, Dataset.from_list(records), per_device_train_batch_size=3, max_steps=1)
    one, three = (trainer.data_collator(mixed_pairs(3).select(range(count))) for count in (1, 3))
    assert one["pixel_values"].shape == three["pixel_values"].shape
    assert len(three.labelled.lengths) == 6
    prompt = one.tokens - int(one.labelled.lengths.sum())
    distinct_tokens = int(three.labelled.lengths[[0, 3, 4, 5]].sum())
    assert three.tokens < prompt + distinct_tokens + 3


def test_the_same_question_about_another_image_is_another_row(processor, internvl, tmp_path):
    row = image_pairs(1)[0]
    records = [row, {**row, "images": [make_image(99, 32, 32)]}]
    trainer = run(tmp_path, processor, internvl, Dataset.from_list(records), max_steps=1)
    batch = trainer.data_collator([row, {**row, "images": [make_image(99, 32, 32)]}])
    assert len(batch["pixel_values"]) == 2 * len(trainer.data_collator([row])["pixel_values"])


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("full", 3), ("frozen tower", 1), ("lora", 1), ("cached", 1), ("explicit reference", 2)],
)
def test_the_tower_sees_an_image_once(processor, internvl, tmp_path, kind, passes, monkeypatch):
    """Once per model, and once in all when it is frozen; TRL shows it four times. Counted in tiles.

    A tower that is trained sees the first batch once more, in evaluation mode: the check of the start.
    """
    from transformers.models.internvl.modeling_internvl import InternVLVisionModel

    tiles, forward = [], InternVLVisionModel.forward

    def counting(self, pixel_values, *args, **kwargs):
        tiles.append(len(pixel_values))
        return forward(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(InternVLVisionModel, "forward", counting)
    settings = {"peft_config": LORA if kind == "lora" else None, "freeze_tower": kind in ("frozen tower", "explicit reference")}
    settings |= (
        {"reference": "cached", "reference_cache": str(tmp_path / "cache"), "freeze_tower": True} if kind == "cached" else {}
    )
    reference = perturbed(copy.deepcopy(internvl)) if kind == "explicit reference" else None
    trainer = run(tmp_path, processor, internvl, image_pairs(6), ref_model=reference, max_steps=1, **settings)
    filling = 6 * len(trainer.data_collator([image_pairs(1)[0]])["pixel_values"]) if kind == "cached" else 0
    in_batch = len(trainer.data_collator(list(image_pairs(6)))["pixel_values"])
    assert sum(tiles) == passes * in_batch + (in_batch if filling else 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_tower_keeps_no_graph(processor, internvl, tmp_path, checkpointing):
    """Gradient checkpointing with adapters makes embeddings require gradients, those of a frozen tower too."""
    grads = []
    trainer = run(
        tmp_path, processor, internvl, image_pairs(6), peft_config=LORA, gradient_checkpointing=checkpointing, max_steps=1
    )
    find_tower(trainer.model).register_forward_hook(
        lambda module, args, output: grads.append(output.last_hidden_state.requires_grad)
    )
    batch = trainer._prepare_inputs(trainer.data_collator(list(image_pairs(2))))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    assert set(grads) == {False}


def test_a_shared_tower_is_not_shared_with_a_later_trainer(processor, internvl, tmp_path):
    """A model that is trained twice keeps working, and its copy runs its own tower."""
    find_tower(internvl).requires_grad_(False)
    args = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1, "save_strategy": "no"}
    for _ in range(2):
        MPOTrainer(
            model=internvl, args=MPOConfig(str(tmp_path), **args), train_dataset=image_pairs(4), processing_class=processor
        ).train()
    copied = copy.deepcopy(internvl)
    pixels = torch.randn(1, 3, 32, 32)
    before = find_tower(internvl)(pixels).last_hidden_state
    perturbed(find_tower(internvl), scale=1.0)
    assert not torch.allclose(find_tower(internvl)(pixels).last_hidden_state, before)
    assert copied is not internvl


def test_generate_works_behind_training(processor, internvl, tmp_path):
    trainer = run(tmp_path, processor, internvl, image_pairs(4), max_steps=1)
    inputs = processor(text=["What is it?", "What is 1 plus 1, and why?"], return_tensors="pt", padding=True)
    assert trainer.model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    trainer.save_model()
    assert "shared_prefix" not in (tmp_path / "config.json").read_text()


def test_models_that_do_not_fit_are_padded_and_say_why(processor, tmp_path, caplog):
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), sliding_window=8, **sizes))
    trainer = run(tmp_path, tokenizer, model, text_pairs(4), max_steps=1)
    assert trainer.layout == "padded"
    assert sum("Rows are padded" in record.message and "sliding" in record.message for record in caplog.records) == 1
    with pytest.raises(ValueError, match="rows='packed'.*sliding"):
        run(tmp_path, tokenizer, model, text_pairs(4), rows="packed")
