"""The forms in which checkpoints come: head sizes, names of tensors, tied heads, unmerged adapters, broken files."""

import json

import pytest
import torch
from official_checkpoints import write_official
from safetensors.torch import load_file, save_file

from mpo.models.export.run import export
from mpo.models.loading import load_internvl, load_model
from mpo.models.official.checkpoint import open_official
from mpo.models.official.convert import convert
from mpo.models.small import small_internvl

EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, part=None, **values):
    config = json.loads((folder / "config.json").read_text())
    (config if part is None else config[part]).update(values)
    (folder / "config.json").write_text(json.dumps(config))


def same(first, second):
    before, after = tensors_of(first), tensors_of(second)
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def converted(tmp_path, family, **options):
    official = write_official(tmp_path / "official", family, **options)
    convert(official, tmp_path / "ours", compare=False, progress=False)
    return official, tmp_path / "ours"


@pytest.mark.parametrize("family", ["qwen2", "internlm2", "internlm3", "llama", "qwen3", "qwen3_moe"])
def test_heads_of_another_size_than_the_width_has_for_each(tmp_path, family):
    """4 heads of 12 in a width of 32, as Qwen3-30B-A3B's 32 of 128 in 2048: its config class does not name head_dim."""
    official = write_official(tmp_path / "official", family, head_dim=12)
    assert convert(official, tmp_path / "ours", compare=True, progress=False).difference < 1e-5
    for folder in ("official", "ours"):
        attention = load_internvl(str(tmp_path / folder)).model.language_model.layers[1].self_attn
        assert attention.q_proj.weight.shape == (48, 32) and attention.k_proj.weight.shape == (24, 32)
        assert attention.o_proj.weight.shape == (32, 48) and attention.scaling == 12**-0.5
    if family not in ("internlm2", "internlm3"):
        (tmp_path / "ours" / "official_config.json").unlink()  # the one that is created has every key too
    assert convert(tmp_path / "ours", tmp_path / "back", compare=True, progress=False).difference < 1e-5
    assert same(official, tmp_path / "back")


@pytest.mark.parametrize(
    "family, layout", [("llama", "in memory"), *(("qwen3_moe", name) for name in ("in memory", "with a prefix", "stacked experts"))]
)
def test_every_layout_that_transformers_reads(tmp_path, family, layout):
    """It is loaded, exported and converted, bit for bit."""
    official, ours = converted(tmp_path, family)
    standard = tensors_of(ours)
    if layout == "stacked experts":  # a state dict saved by hand
        tensors = {name: tensor.clone() for name, tensor in load_internvl(str(ours)).state_dict().items()}
    else:
        inner = "model.language_model." if layout == "in memory" else "model.language_model.model."
        names = {name: name.replace("language_model.model.", inner) for name in standard}
        names = {name: new if new.startswith(inner) else f"model.{new}" for name, new in names.items()} | {HEAD: "lm_head.weight"}
        tensors = {names[name]: tensor for name, tensor in standard.items()}
        tensors["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write(ours, tensors)
    assert convert(ours, tmp_path / "back", compare=True, progress=False).difference < 1e-5
    assert same(official, tmp_path / "back")
    export(ours, tmp_path / "exported", check=False, progress=False)
    assert tensors_of(tmp_path / "exported").keys() == standard.keys() and same(tmp_path / "exported", restored(ours, standard))


def restored(folder, tensors):
    write(folder, tensors)
    return folder


def test_a_tensor_under_two_names(tmp_path):
    _, ours = converted(tmp_path, "qwen2")
    write(ours, {**tensors_of(ours), "lm_head.weight": torch.zeros(3, 3)})
    with pytest.raises(ValueError, match=f"{HEAD} twice: .*lm_head.weight"):
        convert(ours, tmp_path / "back", progress=False)


def test_a_head_that_differs_from_the_embeddings_it_is_tied_to(tmp_path):
    """Refused with both names in either format; the same one written twice is one matrix."""
    official = write_official(tmp_path / "official", "qwen3")
    edit_config(official, "llm_config", tie_word_embeddings=True)
    named = f"{HEAD}.*{EMBEDDINGS}.*tie_word_embeddings"
    for refused in (
        lambda: load_internvl(str(official)),
        lambda: convert(official, tmp_path / "no", compare=False, progress=False),
    ):
        with pytest.raises(ValueError, match=named):
            refused()
    write(official, {**tensors_of(official), HEAD: tensors_of(official)[EMBEDDINGS].clone()})
    ours = tmp_path / "ours"
    convert(official, ours, compare=True, progress=False)
    written = tensors_of(ours)
    write(ours, {**written, HEAD: written[EMBEDDINGS].clone()})
    assert load_internvl(str(ours)).lm_head.weight.shape == written[EMBEDDINGS].shape
    convert(ours, tmp_path / "back", compare=False, progress=False)
    write(ours, {**written, HEAD: torch.ones_like(written[EMBEDDINGS])})
    with pytest.raises(ValueError, match="lm_head.weight and model.language_model.embed_tokens.weight.*tie_word_embeddings"):
        load_internvl(str(ours))
    with pytest.raises(ValueError, match=named):
        convert(ours, tmp_path / "again", compare=False, progress=False)


@pytest.mark.parametrize("edit", ["weights", "use_llm_lora", "use_backbone_lora"])
def test_unmerged_adapters_are_refused(tmp_path, edit):
    official = write_official(tmp_path / "official", "qwen2")
    if edit == "weights":
        tensors = tensors_of(official)
        name = "language_model.model.layers.0.self_attn.q_proj.weight"
        inner = name.replace("language_model.", "language_model.base_model.model.")
        tensors[inner.replace("weight", "base_layer.weight")] = tensors.pop(name)
        tensors[inner.replace("weight", "lora_A.default.weight")] = torch.ones(4, 32)
        write(official, tensors)
    else:
        edit_config(official, **{edit: 16})
    for refused in (lambda: load_model(str(official)), lambda: convert(official, tmp_path / "ours", progress=False)):
        with pytest.raises(ValueError, match=f"{official}.*LoRA.*merge_lora.py"):
            refused()


@pytest.mark.parametrize(
    "family, words, token", [("internlm2", 92_553, 92_546), ("qwen2", 151_674, 151_667), ("internlm2", 128_512, None)]
)
def test_the_image_token_without_a_tokenizer(tmp_path, family, words, token):
    """Known for the published vocabularies alone."""
    official = write_official(tmp_path / "official", family, tokenizer=False)
    edit_config(official, "llm_config", vocab_size=words)
    if token is not None:
        assert open_official(official, weights=False).config.image_token_id == token
        return
    with pytest.raises(ValueError, match=f"{official} has no tokenizer.*{words}"):
        open_official(official, weights=False)


BROKEN = {
    "BOM": b"\xef\xbb\xbf{}",
    "cut off": b'{"weight_map": {',
    "list": b"[]",
    "null": b"null",
    "empty": b"",
    "another type": b'{"weight_map": 3}',
    "no keys": b"{}",
    "a path": b'{"weight_map": {"a": "../x.safetensors"}}',
}


@pytest.mark.parametrize("form", ["official", "ours"])
def test_files_that_are_cut_off_or_of_another_kind(tmp_path, form):
    """Refused with the name of the file, in either format; a tokenizer's settings may be left out."""
    converted(tmp_path, "qwen2")
    folder = tmp_path / form
    for name in ("config.json", "model.safetensors.index.json", "tokenizer_config.json", "tokenizer.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        for kind, content in BROKEN.items():
            if name.startswith("tokenizer") and kind not in ("BOM", "cut off", "list"):
                continue
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=str(folder)) as caught:
                load_model(str(folder))
            assert name in str(caught.value) or name.startswith("tokenizer"), f"{name}, {kind}: {caught.value}"
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
    load_model(str(folder))


def test_the_name_of_a_dtype(tmp_path):
    official, ours = converted(tmp_path, "qwen2", dtype=torch.bfloat16)
    edit_config(official, torch_dtype="torch.bfloat16")
    assert load_internvl(str(official)).dtype == torch.bfloat16
    edit_config(official, torch_dtype="bf16")
    with pytest.raises(ValueError, match=f"{official}/config.json: torch_dtype='bf16'"):
        load_internvl(str(official))
    edit_config(ours, "text_config", dtype="torch.bfloat16")
    with pytest.raises(ValueError, match=f"{ours}, config.json: 'dtype': 'torch.bfloat16'"):
        load_internvl(str(ours))


@pytest.mark.parametrize("values", [{"hidden_size": "32"}, {"hidden_size": None}, {"num_attention_heads": 0}, {"hidden_act": "x"}])
def test_values_of_transformers_format(tmp_path, processor, values):
    small_internvl(processor, hidden_size=32, vision_hidden_size=32).save_pretrained(tmp_path)
    edit_config(tmp_path, "text_config", **values)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        load_internvl(str(tmp_path))
