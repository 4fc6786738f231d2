"""A checkpoint whose tensors differ from its config is refused with their names, however the model is loaded."""

import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support import image_pairs
from transformers import AutoModelForImageTextToText, Qwen2Config, Qwen2ForCausalLM

from mpo import MPOConfig, MPOTrainer
from mpo.models.loading import load_internvl, load_model
from mpo.models.small import small_internvl
from mpo.training.checkpoint import load_weights
from mpo.training.job import TrainJob, run_train_job

QUERIES = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(processor, tmp_path):
    model = small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def drop(tensors):
    del tensors[QUERIES]
    for name in [name for name in tensors if "multi_modal_projector" in name]:
        del tensors[name]


def add(tensors):
    tensors["language_model.model.layers.2.mlp.up_proj.weight"] = torch.zeros(2, 2)


def shrink(tensors):
    tensors[QUERIES] = tensors[QUERIES][:8].clone()


CHANGES = {
    "missing": (drop, r"7 tensors missing \(model.language_model.layers.1.self_attn.q_proj.weight, model.multi_modal_projector"),
    "unexpected": (add, r"1 tensor not of .*\(.*layers.2.mlp.up_proj.weight\)"),
    "shrunk": (shrink, r"1 tensor .*shape \(.*layers.1.self_attn.q_proj.weight: \(8, 32\), expected \(32, 32\)\)"),
}


def by_trainer(folder, processor, tmp_path, **settings):
    args = MPOConfig(str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none")
    MPOTrainer(model=str(folder), args=args, train_dataset=image_pairs(2), processing_class=processor, **settings)


@pytest.mark.parametrize("kind", CHANGES)
def test_every_loader_refuses_it(folder, processor, tmp_path, kind):
    edit, message = CHANGES[kind]
    change(folder, edit)
    refused = rf"model do not fit InternVLForConditionalGeneration .*{message}"
    with pytest.raises(ValueError, match=refused):
        load_model(str(folder))
    with pytest.raises(ValueError, match=refused):
        by_trainer(folder, processor, tmp_path)
    with pytest.raises(ValueError, match=refused):
        by_trainer(folder, processor, tmp_path, peft_config=LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=message):
        load_weights(small_internvl(processor, hidden_size=32, layers=2, vision_hidden_size=32, vision_layers=2), folder)


def test_a_job_refuses_it_before_training(folder, tmp_path):
    change(folder, drop)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"question": "?", "chosen": "a", "rejected": "b"}))
    config = {
        "model": {"_target_": "mpo.models.loading.load_model", "name_or_path": str(folder)},
        "data": {"path": str(tmp_path / "pairs.jsonl")},
        "trainer": {"use_cpu": True, "bf16": False, "report_to": "none"},
        "run_dir": str(tmp_path / "run"),
    }
    with pytest.raises(ValueError, match="7 tensors missing"):
        run_train_job(TrainJob.from_config(config))


def test_a_text_model(tmp_path, processor):
    config = Qwen2Config(vocab_size=len(processor.tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    config.num_attention_heads = config.num_key_value_heads = 4
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    assert load_internvl(str(tmp_path)).config.hidden_size == 32
    change(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.down_proj.weight"))
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM.*\(model.layers.0.mlp.down_proj.weight\)"):
        load_internvl(str(tmp_path))


@pytest.mark.parametrize("written", [False, True], ids=["left out", "written too"])
def test_a_tied_head_is_no_missing_tensor(tmp_path, processor, written):
    """The output head is the embedding matrix. Files leave it out, or have it a second time."""
    model = small_internvl(processor, hidden_size=32, vision_hidden_size=32, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embeddings = "language_model.model.embed_tokens.weight"
    assert "language_model.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    if written:
        change(tmp_path, lambda tensors: tensors.update({"language_model.lm_head.weight": tensors[embeddings].clone()}))
    loaded = load_internvl(str(tmp_path))
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_what_old_files_have_besides_is_no_extra_tensor(folder):
    """Rotary frequencies were saved once, in every layer; models compute them."""
    names = [f"language_model.model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    change(folder, lambda tensors: tensors.update({name: torch.ones(4) for name in names}))
    assert torch.isfinite(next(load_internvl(str(folder)).parameters())).all()


def test_several_files(folder):
    """An index without one of its files."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    loaded = load_internvl(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    sorted(folder.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=rf"{folder}.*model-00002-of"):
        load_internvl(str(folder))


def test_a_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=str(folder)):
        load_internvl(str(folder))
