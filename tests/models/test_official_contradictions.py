"""Files of a checkpoint that contradict each other, and settings that the other format cannot say, are refused by name."""

import json
import math
import shutil

import pytest
import torch
from official_checkpoints import write_official
from safetensors.torch import load_file, save_file

from mpo.models.export.run import export
from mpo.models.loading import load_internvl, load_model, load_processor
from mpo.models.official.convert import convert, largest_difference
from mpo.models.official.tensors import TensorFiles
from mpo.models.small import small_internvl

NAME = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_official(folder / "official", "qwen2")
    convert(folder / "official", folder / "ours", compare=False, progress=False)
    return folder


@pytest.fixture
def official(made, tmp_path):
    return shutil.copytree(made / "official", tmp_path / "official")


@pytest.fixture
def ours(made, tmp_path):
    return shutil.copytree(made / "ours", tmp_path / "ours")


def edit(folder, part=None, name="config.json", **values):
    found = json.loads((folder / name).read_text())
    (found if part is None else found[part]).update(values)
    (folder / name).write_text(json.dumps(found))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(source, target, match, **options):
    """In converting, with and without the comparison; nothing is written."""
    for compare in (True, False):
        with pytest.raises(ValueError, match=match):
            convert(source, target, compare=compare, progress=False, **options)
    assert not target.exists()


OTHER = [
    ("llm_config", {"rope_theta": 10_000.0}, "rope_theta"),
    ("llm_config", {"rms_norm_eps": 1e-2}, "rms_norm_eps=0.01"),
    ("llm_config", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("llm_config", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters.*linear"),
    ("llm_config", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}, "num_attention_heads=2"),
    ("llm_config", {"use_sliding_window": True, "sliding_window": 2, "max_window_layers": 0}, "layer_types"),
    ("llm_config", {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "model_type='llama'"),
    ("llm_config", {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "model_type='qwen3'"),
    ("vision_config", {"layer_norm_eps": 1e-2}, "layer_norm_eps=0.01"),
    ("vision_config", {"hidden_act": "relu"}, "hidden_act='relu'"),
    ("vision_config", {"num_attention_heads": 4}, "num_attention_heads=4"),
    (None, {"select_layer": -2}, "vision_feature_layer=-2"),
]


@pytest.mark.parametrize("part, values, match", OTHER, ids=[match for *_, match in OTHER])
def test_an_official_config_of_another_model(official, ours, tmp_path, part, values, match):
    """As --like of convert and export, and as the one that a converted folder keeps."""
    edit(official, part, **values)
    refused(ours, tmp_path / "out", rf"--like={official}.*{match}", like=official)
    with pytest.raises(ValueError, match=f"{official} as --like.*{match}"):
        export(ours, tmp_path / "out", form="official", like=official, check=False, progress=False)
    shutil.copyfile(official / "config.json", ours / "official_config.json")
    refused(ours, tmp_path / "out", rf"{ours}/official_config.json.*{match}")
    with pytest.raises(ValueError, match=match):
        export(ours, tmp_path / "out", form="official", check=False, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_written_config_is_compared(official, ours):
    """Another setting on either side gives other logits."""
    assert largest_difference(official, ours) < 1e-5
    edit(official, "llm_config", rms_norm_eps=1.0)
    assert largest_difference(official, ours) > 1e-3
    edit(official, "llm_config", rms_norm_eps=1e-6, rope_scaling={"type": "linear", "factor": 8.0})
    assert largest_difference(official, ours) > 1e-3


UNSAYABLE = [
    (None, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='default', expected 'full'"),
    (None, {"projector_hidden_act": "relu"}, "projector_hidden_act='gelu', expected 'relu'"),
    (None, {"image_seq_length": 5}, "image_seq_length=4, expected 5"),
    (None, {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer=\[-1, -2\]"),
    (None, {"vision_feature_layer": 0}, "vision_feature_layer=0"),
    (None, {"vision_feature_layer": 3}, "vision_feature_layer=3"),
    ("vision_config", {"use_mean_pooling": False}, "use_mean_pooling=True, expected False|layernorm"),
    ("vision_config", {"hidden_dropout_prob": 0.5}, "hidden_dropout_prob"),
    ("text_config", {"rms_norm_eps": 1e-2}, "rms_norm_eps"),
]


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "created"])
@pytest.mark.parametrize("part, values, match", UNSAYABLE, ids=[str(values) for _, values, _ in UNSAYABLE])
def test_an_edited_config(ours, tmp_path, part, values, match, kept):
    """The official config that was kept is stale; one that is created cannot have every setting."""
    edit(ours, part, **values)
    if not kept:
        (ours / "official_config.json").unlink()
    if not kept and part == "text_config":
        assert convert(ours, tmp_path / "out", progress=False).difference < 1e-5
        assert json.loads((tmp_path / "out" / "config.json").read_text())["llm_config"]["rms_norm_eps"] == 1e-2
    else:
        refused(ours, tmp_path / "out", match)


def test_the_tiles_of_the_processor(ours, tmp_path):
    """They are carried to the official config; what it cannot say is refused."""
    edit(ours, name="processor_config.json", image_seq_length=9)
    refused(ours, tmp_path / "no", f"{ours}.*image_seq_length=9, not 4")
    edit(ours, name="processor_config.json", image_seq_length=4)
    edit(ours, "image_processor", "processor_config.json", max_patches=3, min_patches=2, use_thumbnail=False)
    convert(ours, tmp_path / "out", compare=False, progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[name] for name in ("max_dynamic_patch", "min_dynamic_patch", "use_thumbnail")] == [3, 2, False]
    tiles = load_processor(str(tmp_path / "out")).image_processor
    assert (tiles.max_patches, tiles.min_patches, tiles.use_thumbnail) == (3, 2, False)
    for name, value in (
        ("max_patches", 1),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("size", {"height": 64, "width": 64}),
        ("do_rescale", False),
        ("image_processor_type", "CLIPImageProcessor"),
    ):
        folder = shutil.copytree(ours, tmp_path / name)
        edit(folder, "image_processor", "processor_config.json", **{name: value})
        refused(folder, tmp_path / "no", f"{folder}.*{name.replace('max_patches', 'max_dynamic_patch')}=")


def test_another_chat_template(ours, tmp_path, caplog):
    convert(ours, tmp_path / "same", compare=False, progress=False)
    assert not caplog.records
    template = ours / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|>!"))
    convert(ours, tmp_path / "out", compare=False, progress=False)
    assert "chat template" in caplog.text and str(ours) in caplog.text


def test_the_tokenizer_of_another_model(official, ours, tmp_path, processor):
    settings = json.loads((official / "tokenizer.json").read_text())
    swapped = {"<img>": "</img>", "</img>": "<img>"}
    for token in settings["added_tokens"]:
        token["content"] = swapped.get(token["content"], token["content"])
    (official / "tokenizer.json").write_text(json.dumps(settings))
    decoder = json.loads((official / "tokenizer_config.json").read_text())
    decoder.pop("added_tokens_decoder", None)
    (official / "tokenizer_config.json").write_text(json.dumps(decoder))
    refused(ours, tmp_path / "out", "</?img>", like=official)


@pytest.mark.parametrize("form", ["official", "ours"])
def test_weights_that_are_there_twice(made, tmp_path, form):
    folder = shutil.copytree(made / form, tmp_path / form)
    shard = "model-00001-of-00001.safetensors"
    shutil.copyfile(folder / "model.safetensors", folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(folder / shard), shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    match = f"{folder}/model.safetensors.index.json.*{folder}/model.safetensors "
    refused(folder, tmp_path / "out", match)
    with pytest.raises(ValueError, match=match):
        load_internvl(str(folder))
    (folder / "model.safetensors").unlink()
    load_internvl(str(folder))


@pytest.mark.parametrize("text", ["qwen2", "llama", "qwen3"])
def test_a_tied_model_can_be_read_again(processor, tmp_path, text):
    model = small_internvl(processor, text=text, hidden_size=32, vision_hidden_size=32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "ours")
    processor.save_pretrained(tmp_path / "ours")
    for target in ("out", "exported"):
        if target == "out":
            assert convert(tmp_path / "ours", tmp_path / target, progress=False).difference < 1e-5
        else:
            shutil.copyfile(tmp_path / "out" / "config.json", tmp_path / "ours" / "official_config.json")
            export(tmp_path / "ours", tmp_path / target, form="official", progress=False)
        loaded = load_internvl(str(tmp_path / target))
        assert torch.equal(loaded.lm_head.weight, model.get_input_embeddings().weight)
        assert ("language_model.lm_head.weight" in TensorFiles(tmp_path / target).names()) is (text != "qwen3")


def test_a_layer_that_is_none(official):
    for layer in (0, 3, -4):
        edit(official, select_layer=layer)
        with pytest.raises(ValueError, match=f"{official}/config.json.*select_layer.*{layer}"):
            load_internvl(str(official))


def test_an_added_token_with_two_ids(official, ours, tmp_path):
    number = load_processor(str(official)).tokenizer.convert_tokens_to_ids("<img>")
    for folder in (official, ours):
        (folder / "added_tokens.json").write_text(json.dumps({"<img>": number}))
    load_processor(str(official))
    for folder in (official, ours):
        (folder / "added_tokens.json").write_text(json.dumps({"<img>": number + 1}))
    for refuse in (lambda: load_processor(str(official)), lambda: convert(ours, tmp_path / "out", progress=False)):
        with pytest.raises(ValueError, match=f"<img>.* {number} and {number + 1}"):
            refuse()


def test_a_tokenizer_without_the_end_of_a_turn(official):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (official / name).write_text((official / name).read_text().replace("<|im_end|>", "<|other|>"))
    with pytest.raises(ValueError, match=rf"{official} has no <\|im_end\|>"):
        load_processor(str(official))


ROPES = [
    {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 6.0}},
    {"rope_theta": math.nan},
    {"rope_scaling": {"type": "linear", "factor": 0.0}},
    {"rope_scaling": {"type": "linear", "factor": math.nan}},
    {"rope_scaling": {"type": "dynamic", "factor": -2.0}},
    {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 3.0},
    },
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": math.inf}},
]


@pytest.mark.parametrize("values", ROPES, ids=str)
def test_rotary_settings(official, ours, tmp_path, values):
    for folder, part in ((official, "llm_config"), (ours, "text_config")):
        edit(folder, part, **values)
        refused(folder, tmp_path / "out", f"{folder}/config.json.*(rope_theta|factor)")
        with pytest.raises(ValueError, match=f"{folder}/config.json.*(rope_theta|factor)"):
            load_model(str(folder))


def test_two_types_of_rotary_scaling(official):
    """InternLM2's code reads ``type`` alone, and knows two."""
    edit(official, "llm_config", rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(ValueError, match=f"{official}/config.json.*type='linear' and rope_type='dynamic'"):
        load_internvl(str(official))
    for kind in ({"rope_type": "linear"}, {"type": "yarn"}):
        edit(official, "llm_config", architectures=["InternLM2ForCausalLM"], rope_scaling={**kind, "factor": 2.0})
        with pytest.raises(ValueError, match=f"{official}/config.json.*rope_scaling=.*{next(iter(kind.values()))}"):
            load_internvl(str(official))


def test_tokens_that_were_added(official, ours, tmp_path):
    """Their tokenizer is the model's own, in a folder made like one without them."""
    loaded = load_model(str(ours))
    loaded.processor.tokenizer.add_tokens(["<new>"])
    loaded.model.resize_token_embeddings(len(loaded.processor.tokenizer), mean_resizing=False)
    loaded.model.save_pretrained(tmp_path / "grown")
    loaded.processor.save_pretrained(tmp_path / "grown")
    assert convert(tmp_path / "grown", tmp_path / "out", like=official, progress=False).difference < 1e-5
    assert load_processor(str(tmp_path / "out")).tokenizer.get_vocab() == loaded.processor.tokenizer.get_vocab()


def test_a_key_that_is_there_twice(official, ours, tmp_path):
    for folder, key in ((official, "rms_norm_eps"), (ours, "rms_norm_eps"), (ours, "model_type")):
        path = folder / "config.json"
        before = path.read_text()
        path.write_text(before.replace(f'"{key}": ', f'"{key}": 1, "{key}": ', 1))
        refused(folder, tmp_path / "out", f"{path}.*'{key}'")
        with pytest.raises(ValueError, match=f"{path}.*'{key}'"):
            load_internvl(str(folder))
        path.write_text(before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensors_of_other_dtypes(made, tmp_path, dtype):
    for form in ("official", "ours"):
        folder = shutil.copytree(made / form, tmp_path / form)
        edit_tensors(folder, lambda tensors: tensors.update({NAME: tensors[NAME].to(dtype)}))
        refused(folder, tmp_path / "out", f"{folder}.*{NAME}: ")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_not_finite(made, tmp_path, value):
    """A row of the embeddings that no prompt has, too."""
    for form in ("official", "ours"):
        folder = shutil.copytree(made / form, tmp_path / form)
        edit_tensors(folder, lambda tensors: tensors["language_model.model.embed_tokens.weight"][-1].fill_(value))
        with pytest.raises(ValueError, match="language_model.model.embed_tokens.weight"):
            convert(folder, tmp_path / "out", compare=True, progress=False)


@pytest.mark.parametrize("size", [math.inf, math.nan, 0, -1.0])
def test_the_size_of_a_shard(made, tmp_path, size):
    for form in ("official", "ours"):
        refused(made / form, tmp_path / "out", "--shard-gb=", shard_gb=size)
    with pytest.raises(ValueError, match="--shard-gb="):
        export(made / "ours", tmp_path / "out", shard_gb=size, progress=False)


def test_the_processor_of_another_kind_of_model(ours, tmp_path):
    edit(ours, name="processor_config.json", processor_class="Qwen2VLProcessor")
    edit(ours, name="tokenizer_config.json", processor_class="Qwen2VLProcessor")
    refused(ours, tmp_path / "out", f"{ours}")
