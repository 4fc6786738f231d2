"""Parts of a model: frozen, with adapters, with their own learning rate."""

import re

import pytest
import torch
from small_runs import small_run
from support import TEXTS

from mpo.models.learning_rates import split_groups
from mpo.models.parts import adapted_layers, check_parts, freeze_parts, part_of
from mpo.models.small import small_internvl, small_processor
from mpo.training.job import TrainJob


@pytest.fixture
def model():
    processor = small_processor(TEXTS, image_size=32, patch_size=8)
    return small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=3)


def trained(model) -> set[str]:
    return {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_freezing(model):
    freeze_parts(model, {"vision": "freeze", "head": "freeze", "projector": "train"})
    assert trained(model) == {"projector", "language"}


def test_the_last_layers_of_the_tower(model):
    freeze_parts(model, {"vision": 2})
    tower = model.model.vision_tower
    assert [all(p.requires_grad for p in layer.parameters()) for layer in tower.encoder.layer] == [False, True, True]
    assert not any(p.requires_grad for p in tower.embeddings.parameters())


@pytest.mark.parametrize(
    "choices, adapters, message",
    [
        ({"tower": "freeze"}, False, "vision, projector, language, head.*'tower'"),
        ({"vision": "frozen"}, False, "train_parts.vision='frozen'"),
        ({"language": 2}, False, "train_parts.language=2"),
        ({"vision": 0}, False, "train_parts.vision=0"),
        ({"vision": "lora"}, False, "train_parts.vision=lora"),
        ({"language": "train"}, True, "train_parts.language=train"),
        ({"head": "lora"}, True, "train_parts.head=lora"),
        ({"vision": "freeze", "projector": "freeze", "language": "freeze", "head": "freeze"}, False, "train_parts freezes"),
    ],
)
def test_refusals(choices, adapters, message):
    with pytest.raises(ValueError, match=message):
        check_parts(choices, adapters=adapters)


def test_more_layers_than_there_are(model):
    with pytest.raises(ValueError, match="train_parts.vision=4 .*3 layers"):
        freeze_parts(model, {"vision": 4})


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_adapters_go_to_one_part(model, part):
    pattern = re.compile(adapted_layers({part: "lora"}))
    found = {name for name, module in model.named_modules() if pattern.fullmatch(name)}
    assert found and {part_of(name) for name in found} == {part}
    assert all(isinstance(model.get_submodule(name), torch.nn.Linear) for name in found)


@pytest.mark.parametrize(
    "choices, settings, message",
    [
        ({"language": "lora"}, {"bias": "all"}, "peft.bias=all .* freezes vision, projector"),
        (
            {"language": "freeze", "vision": "lora"},
            {"modules_to_save": ["embed_tokens"]},
            "train_parts.language=freeze.*embed_tokens",
        ),
        ({"language": "freeze", "vision": "lora"}, {"trainable_token_indices": [3]}, "language=freeze.*embed_tokens"),
        ({"language": "lora", "head": "freeze"}, {"trainable_token_indices": {"lm_head": [3]}}, "train_parts.head=freeze.*lm_head"),
    ],
)
def test_what_is_frozen_is_not_trained_by_an_adapters_settings(choices, settings, message):
    job = TrainJob(model={}, data={}, peft={"kind": "lora", **settings}, train_parts=choices)
    with pytest.raises(ValueError, match=message):
        job.adapter()
    assert TrainJob(model={}, data={}, peft={"kind": "lora", **settings}).adapter() is not None
    lora_only = TrainJob(model={}, data={}, peft={"kind": "lora", "bias": "lora_only"}, train_parts=choices)
    assert lora_only.adapter().bias == "lora_only"


def test_learning_rates(model):
    """Tower of three layers, decay 0.5: its layers have 1/8, 1/4 and 1/2 of 1e-6, its embeddings 1/16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    split_groups(optimizer, model, rate=1e-5, rates={"vision": 1e-6, "head": 3e-5}, vision_layer_decay=0.5)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    tower = model.model.vision_tower
    assert [rates[id(layer.lambda_1)] for layer in tower.encoder.layer] == [1.25e-7, 2.5e-7, 5e-7]
    assert rates[id(tower.embeddings.cls_token)] == 6.25e-8
    assert rates[id(model.lm_head.weight)] == 3e-5
    assert rates[id(model.model.multi_modal_projector.linear_1.weight)] == 1e-5
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_with_learning_rates_of_parts(tmp_path, kind):
    """With a rate of 0 the language model does not change, and parts without their own rate do."""
    trainer = small_run(tmp_path, kind=kind, language_learning_rate=0.0, weight_decay=0.0, warmup_steps=0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    if kind == "lora":  # adapters are in the language model alone
        trainer.train()
        assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters() if name in before)
        return
    trainer.train()
    moved = {part_of(name) for name, parameter in trainer.model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == {"vision", "projector", "head"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"frozen_tower": True, "vision_learning_rate": 1e-6}, "vision_learning_rate=1e-06"),
        ({"frozen_tower": True, "vision_layer_decay": 0.9}, "vision_layer_decay=0.9"),
        ({"vision_layer_decay": 0.0}, "vision_layer_decay.*0.0"),
        ({"vision_drop_path": 1.0}, "vision_drop_path.*1.0"),
        ({"frozen_tower": True, "vision_drop_path": 0.1}, "vision_drop_path=0.1 .*frozen"),
    ],
)
def test_settings_without_effect(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        small_run(tmp_path, **settings).train()
