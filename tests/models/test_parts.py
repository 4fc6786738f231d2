"""Parts of a model: frozen, with adapters, with their own learning rate."""

import ast
import re
from pathlib import Path

import pytest
import torch
from small_runs import small_run
from support import TEXTS, text_pairs
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

import mpo
from mpo import MPOConfig, MPOTrainer
from mpo.encoding.images import add_tile_order
from mpo.models.family import FAMILIES, INTERNVL, PARTS, TEXT, family_of, known_family
from mpo.models.parts import check_parts, freeze_parts, split_groups
from mpo.models.small import small_internvl, small_processor
from mpo.models.tower import DropPath, SharedTower, can_share, find_tower, tower_layers
from mpo.training.job import TrainJob


@pytest.fixture
def model():
    processor = small_processor(TEXTS, image_size=32, patch_size=8)
    return small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=3)


def trained(model) -> set[str]:
    return {INTERNVL.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


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
        ({"tower": "freeze"}, False, "vision, fuser, projector, language, head.*'tower'"),
        ({"vision": "frozen"}, False, "train_parts.vision='frozen'"),
        ({"language": 2}, False, "train_parts.language=2"),
        ({"vision": 0}, False, "train_parts.vision=0"),
        ({"vision": "lora"}, False, "train_parts.vision=lora"),
        ({"language": "train"}, True, "train_parts.language=train"),
        ({"head": "lora"}, True, "train_parts.head=lora"),
        ({"fuser": "lora"}, True, "train_parts.fuser=lora"),
        ({"fuser": "lora"}, False, "train_parts.fuser=lora"),
        (dict.fromkeys(PARTS, "freeze"), False, "train_parts freezes"),
        ({"vision": "freeze", "projector": "freeze", "language": "freeze", "head": "freeze"}, False, "train_parts freezes"),
    ],
)
def test_refusals(choices, adapters, message):
    with pytest.raises(ValueError, match=message):
        check_parts(choices, adapters=adapters)


def test_the_fuser_alone_is_trained():
    check_parts({**dict.fromkeys(PARTS, "freeze"), "fuser": "train"}, adapters=False)
    check_parts({"language": "lora", "fuser": "train"}, adapters=True)


def test_more_layers_than_there_are(model):
    with pytest.raises(ValueError, match="train_parts.vision=4 .*3 layers"):
        freeze_parts(model, {"vision": 4})


@pytest.mark.parametrize("part", ["vision", "projector", "language"])
def test_adapters_go_to_one_part(model, part):
    pattern = re.compile(INTERNVL.adapted_layers({part: "lora"}))
    found = {name for name, module in model.named_modules() if pattern.fullmatch(name)}
    assert found and {INTERNVL.part_of(name) for name in found} == {part}
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
        with pytest.raises(ValueError, match="'language': 0.0"):
            trainer.train()
        assert all(torch.equal(before[name], parameter) for name, parameter in trainer.model.named_parameters() if name in before)
        return
    trainer.train()
    moved = {
        INTERNVL.part_of(name) for name, parameter in trainer.model.named_parameters() if not torch.equal(before[name], parameter)
    }
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


VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    **{
        "depth": 2,
        "hidden_size": 32,
        "embed_dim": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "mlp_ratio": 2,
    },
    **{"patch_size": 14, "fullatt_block_indexes": [1], "deepstack_visual_indexes": [1], "num_position_embeddings": 16},
}
LANGUAGE = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    **{"vocab_size": 100, "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def shaped(kind, device="meta", **more):
    """A model of a family, by default without weights."""
    if kind.startswith("qwen"):
        rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
        config = CONFIG_MAPPING[kind](vision_config=QWEN_VISION, text_config={**LANGUAGE, "rope_parameters": rope}, **more)
    else:
        tower = "siglip_vision_model" if kind in ("llava_onevision", "paligemma") else "clip_vision_model"
        text = {"llava_onevision": "qwen2", "paligemma": "gemma"}.get(kind, "llama")
        config = CONFIG_MAPPING[kind](
            vision_config={"model_type": tower, **VISION}, text_config={"model_type": text, **LANGUAGE}, projection_dim=32, **more
        )
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config)


OTHERS = [name for family in FAMILIES for name in family.types if name != "internvl" and not family.fuser]


@pytest.mark.parametrize("kind", OTHERS)
def test_the_parts_of_other_families(kind):
    """Nothing of the tower counts as language: not its parameters, not its adapters, not what QLoRA quantizes."""
    model = shaped(kind)
    family = family_of(model.config, "train_parts")
    parts = {name: family.part_of(name) for name, _ in model.named_parameters()}
    assert set(parts.values()) == set(PARTS) - {"fuser"}
    tower = model.get_submodule(f"model.{family.vision}")
    inside = {id(parameter) for parameter in tower.parameters()}
    bridge = {id(p) for name, m in model.named_modules() if name.split(".")[-1] in family.projector for p in m.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in bridge:
            assert parts[name] == "projector"
        elif id(parameter) in inside:
            assert parts[name] == "vision"
        elif "image_newline" not in name:
            assert parts[name] == ("head" if name.startswith("lm_head") else "language")
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    language = {name for name in linear if family.part_of(name) == "language"}
    assert {name for name in linear if re.fullmatch(family.projections(), name)} == language
    for part in ("vision", "projector", "language"):
        own = {name for name in linear if family.part_of(name) == part and ".head." not in name}
        assert {name for name, _ in model.named_modules() if re.fullmatch(family.adapted_layers({part: "lora"}), name)} - {
            name for name in linear if ".head." in name
        } == own
    skipped = {name for name in linear if any(re.match(pattern, name) for pattern in family.not_quantized())}
    assert linear - skipped == language
    assert {family.vision_depth(name) for name, part in parts.items() if part == "vision"} == {None, 0, 1}
    freeze_parts(model, {"vision": 1, "head": "freeze"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {family.vision_depth(name) for name in trained if parts[name] == "vision"} == {1}


def test_a_familys_names_stand_in_its_spec_alone():
    """Where another module names a tower or a projector, the models of other families are overlooked."""
    names = {name for family in FAMILIES for name in (family.vision, family.language, *family.projector)}
    package = Path(mpo.__file__).parent
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "models" / "official") or path.name in ("family.py", "small.py", "smollm2.py"):
            continue  # the official form and the small models are InternVL's
        for node in ast.walk(ast.parse(path.read_text())):
            found = node.attr if isinstance(node, ast.Attribute) else node.value if isinstance(node, ast.Constant) else None
            words = found.split(".") if isinstance(found, str) and " " not in found else []
            assert names.isdisjoint(words), f"{path}:{node.lineno} names {found}"


@pytest.mark.parametrize("kind", OTHERS)
def test_the_tower_of_other_families(kind):
    """It is found, and its layers; stochastic depth works where a layer's branches have a row per image, or is refused by name."""
    model = shaped(kind)
    family = known_family(model.config)
    assert find_tower(model) is model.get_submodule(f"model.{family.vision}")
    layers = tower_layers(model)
    assert [family.vision_depth(name) for name, module in model.named_modules() if module in layers] == [0, 1]
    add_tile_order(model.base_model)
    assert not hasattr(find_tower(model), "tile_order")
    if not family.branches:
        with pytest.raises(ValueError, match=f"vision_drop_path=0.5 .*'{kind}'"):
            DropPath(model, 0.5)
        return
    model = shaped(kind, device="cpu")
    DropPath(model.train(), 0.5)
    tower, pixels = find_tower(model), torch.randn(1, 3, 28, 28).repeat(32, 1, 1, 1)
    dropped = tower(pixels).last_hidden_state
    assert 1 < len({tuple(image.flatten().tolist()) for image in dropped}) <= 4  # attention, MLP, both or none of the last layer
    freeze_parts(model, {"vision": "freeze"})
    with pytest.raises(ValueError, match="vision_drop_path=0.5 .*frozen"):
        DropPath(model, 0.5)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_a_frozen_tower_of_other_families_is_shared(kind):
    """The reference computes the same from the policy's output, without running its own tower."""
    image = {"image_token_index": 5} if kind == "llava" else {"image_token_id": 5}
    policy, reference = shaped(kind, "cpu", **image).eval(), shaped(kind, "cpu", **image).eval()
    reference.load_state_dict(policy.state_dict())
    assert not can_share(policy)
    freeze_parts(policy, {"vision": "freeze", "projector": "freeze"})
    assert can_share(policy)
    inputs = {"input_ids": torch.tensor([[7, 5, 5, 5, 5, 8]])}
    if kind == "llava":
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28)
    else:
        inputs |= {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]])}
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == 5).int()
    expected = reference(**inputs).logits
    tower = SharedTower(policy, reference)
    assert torch.equal(policy(**inputs).logits, expected)
    inputs["pixel_values"].fill_(torch.nan)
    with tower.playing():
        assert torch.equal(reference(**inputs).logits, expected)
    assert reference(**inputs).logits.isnan().any()


@pytest.mark.parametrize("kind, layout", [("llava", "packed"), ("qwen3_vl", "padded"), ("paligemma", "padded")])
def test_other_families_train(tmp_path, kind, layout, processor):
    """Also an unknown one, where no setting needs to know the parts; packed only around a plain text model."""
    tokenizer = processor.tokenizer
    tokenizer.chat_template = processor.chat_template
    model = shaped(kind, "cpu")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "save_strategy": "no"}
    args = MPOConfig(str(tmp_path), max_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", warmup_steps=0, **settings)
    trainer = MPOTrainer(model=model, args=args, train_dataset=text_pairs(4), processing_class=tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    assert trainer.layout == layout
    trainer.train()
    assert not torch.equal(before, model.get_input_embeddings().weight)


def test_an_unknown_family_is_refused_only_where_parts_matter(tmp_path):
    model = shaped("paligemma")
    with pytest.raises(ValueError, match="train_parts .*'paligemma'"):
        freeze_parts(model, {"vision": "freeze"})
    with pytest.raises(ValueError, match="vision_drop_path=0.1 .*'paligemma'"):
        DropPath(model, 0.1)
    assert find_tower(model) is None and not can_share(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="vision_learning_rate .*'paligemma'"):
        split_groups(optimizer, model, rate=1.0, rates={"vision": 0.5}, vision_layer_decay=1)
    for settings, name in (
        ({"peft": {"kind": "qlora"}}, "peft=qlora"),
        ({"peft": {"kind": "lora"}}, "peft=lora without peft.target_modules"),
        ({"train_parts": {"vision": "freeze"}}, "train_parts"),
    ):
        with pytest.raises(ValueError, match=f"{name} .*'paligemma'"):
            TrainJob(model={}, data={}, **settings).family(model.config)
    for settings in ({}, {"peft": {"kind": "lora", "target_modules": ["q_proj"]}}):
        TrainJob(model={}, data={}, **settings).family(model.config)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'paligemma'"):
        TrainJob(model={"name_or_path": str(tmp_path)}, data={}, peft={"kind": "qlora"}).quantization()


@pytest.mark.parametrize("kind", ["emu3", "fuyu", "chameleon", "moshi", "mllama", "gemma3", "qwen2_audio", "pi0"])
def test_a_model_of_more_than_text_is_not_taken_for_one_of_text(kind):
    with pytest.raises(ValueError, match=f"train_parts .*'{kind}'"):
        family_of(CONFIG_MAPPING[kind](), "train_parts")


@pytest.mark.parametrize(
    "key", ["vision_cfg", "visual", "mm_vision_tower", "img_processor", "speech_config", "audio_encoder_config"]
)
def test_a_config_that_names_an_encoder_in_its_own_way_is_not_text(key):
    with pytest.raises(ValueError, match="train_parts"):
        family_of(CONFIG_MAPPING["qwen2"](**{key: {"hidden_size": 8}}), "train_parts")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe", "mixtral", "deepseek_v3", "llama", "gpt2", "mpt", "dbrx", "qwen3_vl_text"])
def test_text_models(kind):
    assert family_of(CONFIG_MAPPING[kind](), "train_parts") is TEXT


def test_a_tower_of_another_kind_is_another_family():
    config = CONFIG_MAPPING["llava"](vision_config={"model_type": "pixtral"}, text_config={"model_type": "llama"})
    with pytest.raises(ValueError, match="'llava' .*'pixtral'"):
        family_of(config, "train_parts")


def test_what_peft_cannot_train_is_refused_by_name():
    job = TrainJob(model={}, data={}, peft={"kind": "lora"}, train_parts={"projector": "train", "language": "lora"})
    for kind, name in (
        ("qwen3_vl", "deepstack_merger_list"),
        ("llava_next", "image_newline"),
        ("llava_onevision", "image_newline"),
    ):
        with pytest.raises(ValueError, match=f"train_parts.projector=train .*{name}"):
            job.adapter(family_of(shaped(kind).config, "train_parts"))
    assert "multi_modal_projector" in job.adapter(family_of(shaped("llava").config, "train_parts")).modules_to_save
    with pytest.raises(ValueError, match="model.name_or_path"):
        TrainJob(model={"_target_": "x.y", "path": "m"}, data={}, peft={"kind": "qlora"}).quantization()
