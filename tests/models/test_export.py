"""Export: the result is the trained model, merged as computed by hand, in both formats; other sources are refused."""

import json
import shutil

import pytest
import torch
from official_checkpoints import write_official
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from support import image_pairs
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from mpo import MPOConfig, MPOTrainer
from mpo.models.export import trial
from mpo.models.export.run import export
from mpo.models.export.trained import merged, open_trained
from mpo.models.export.trial import Trial, in_float32, logits_of, question
from mpo.models.loading import load_internvl, load_model, load_processor
from mpo.models.official.tensors import TensorFiles
from mpo.models.small import small_internvl
from mpo.training.job import TrainJob

QUERY = "language_model.model.layers.1.self_attn.q_proj"
QUERIES_AND_VALUES = r".*language_model.*\.(q_proj|v_proj)"
RANK, ALPHA = 4, 8


def save_base(folder, processor, **sizes):
    small_internvl(processor, hidden_size=32, vision_hidden_size=32, **sizes).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def train(folder, base, *, targets=QUERIES_AND_VALUES, full=False, rate=1e-2, quantization=None, save=False):
    """Two steps of MPO; an adapter's projector is trained too."""
    dtype = "auto" if quantization is None else "bfloat16"
    loaded = load_model(str(base), dtype=dtype, quantization_config=quantization)
    adapter = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, modules_to_save=["multi_modal_projector"], task_type="CAUSAL_LM"
    )
    args = MPOConfig(
        str(folder),
        use_cpu=True,
        bf16=quantization is not None,
        report_to="none",
        gradient_checkpointing=False,
        learning_rate=rate,
        per_device_train_batch_size=2,
        max_steps=2,
        save_strategy="steps" if save else "no",
        save_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    trainer = MPOTrainer(
        model=loaded.model,
        args=args,
        train_dataset=image_pairs(4),
        processing_class=loaded.processor,
        peft_config=None if full else adapter,
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory, processor):
    return save_base(tmp_path_factory.mktemp("base") / "base", processor)


@pytest.fixture(scope="module")
def lora(tmp_path_factory, base):
    return train(tmp_path_factory.mktemp("lora") / "run", base, save=True)


@pytest.fixture(scope="module")
def full(tmp_path_factory, base):
    return train(tmp_path_factory.mktemp("full") / "run", base, full=True)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = write_official(tmp_path_factory.mktemp("official") / "official", "internlm2", dtype=torch.bfloat16)
    (folder / "modeling_internvl_chat.py").write_text("# code\n")
    return folder


@pytest.fixture(scope="module")
def official_lora(tmp_path_factory, official):
    return train(tmp_path_factory.mktemp("official_lora") / "run", official)


@pytest.fixture
def adapter(lora, tmp_path):
    """A copy to be corrupted."""
    return shutil.copytree(lora, tmp_path / "adapter")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    files = TensorFiles(folder)
    return {name: files[name] for name in files.names()}


def by_hand(base, run, name=QUERY, dtype=torch.float32) -> torch.Tensor:
    """W + alpha / r * B A: both terms are rounded to `dtype`, then their sum."""
    adapter = load_file(run / "adapter_model.safetensors")
    inside = "base_model.model.model." + name.replace("language_model.model.", "language_model.")
    update = ALPHA / RANK * adapter[f"{inside}.lora_B.weight"].float() @ adapter[f"{inside}.lora_A.weight"].float()
    assert update.abs().max() > 0
    return tensors_of(base)[f"{name}.weight"].to(dtype) + update.to(dtype)


def corrupt(folder, change) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def settings(folder, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_whole_model(full, tmp_path):
    done = export(full, tmp_path / "out", progress=False)
    assert (done.dtype, done.base, done.comparison.difference, done.comparison.moved) == ("float32", None, 0.0, None)
    assert done.comparison.responses[0] == done.comparison.responses[1]
    before, after = tensors_of(full), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert done.tensors == len(after)
    assert done.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_an_adapter_is_merged(base, lora, tmp_path, record_property):
    """One layer by hand, the trained projector as it was saved, everything else as in the base; no adapter is left."""
    done = export(lora, tmp_path / "out", progress=False)
    assert done.base == str(base)
    assert done.comparison.difference < 1e-5 < done.comparison.moved
    record_property("difference", ("logits of an exported adapter and of the trained one", done.comparison.difference))
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    torch.testing.assert_close(after[f"{QUERY}.weight"], by_hand(base, lora), atol=1e-7, rtol=1e-6)
    saved = load_file(lora / "adapter_model.safetensors")["base_model.model.model.multi_modal_projector.linear_1.weight"]
    assert torch.equal(after["multi_modal_projector.linear_1.weight"], saved)
    assert not torch.equal(before["multi_modal_projector.linear_1.weight"], saved)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("q_proj" in name or "v_proj" in name or "multi_modal_projector" in name for name in changed)
    assert not list((tmp_path / "out").glob("adapter*"))
    assert not (tmp_path / "out.partial").exists()


def test_a_folder_to_serve_from(lora, tmp_path):
    """It loads on its own, with the run's processor and chat template, and has the tokens that end a response."""
    settings = json.loads((lora / "processor_config.json").read_text())
    settings["image_processor"]["max_patches"] = 3  # the run's, not the base's
    run = shutil.copytree(lora, tmp_path / "run")
    (run / "processor_config.json").write_text(json.dumps(settings))
    export(run, tmp_path / "out", progress=False)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.max_patches == 3
    assert processor.chat_template == AutoProcessor.from_pretrained(run).chat_template
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["InternVLForConditionalGeneration"]
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end == model.generation_config.eos_token_id


def test_without_a_processor_the_bases_is_taken(base, adapter, tmp_path):
    for name in ("processor_config.json", "tokenizer_config.json", "tokenizer.json", "chat_template.jinja"):
        (adapter / name).unlink()
    export(adapter, tmp_path / "out", progress=False)
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template == load_processor(str(base)).chat_template


def test_a_checkpoint_of_a_run(base, lora, tmp_path):
    export(lora / "checkpoint-1", tmp_path / "out", progress=False)
    first = tensors_of(tmp_path / "out")[f"{QUERY}.weight"]
    torch.testing.assert_close(first, by_hand(base, lora / "checkpoint-1"), atol=1e-7, rtol=1e-6)
    assert not torch.equal(first, by_hand(base, lora))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(base, lora, tmp_path, dtype):
    """Its logits differ by no more than four times what rounding does to the trained model, well below the trained change."""
    done = export(lora, tmp_path / "out", dtype=dtype, progress=False)
    after = tensors_of(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {getattr(torch, dtype)}
    expected = by_hand(base, lora, dtype=getattr(torch, dtype))
    torch.testing.assert_close(after[f"{QUERY}.weight"], expected, rtol=torch.finfo(expected.dtype).eps, atol=0)
    assert 0 < done.comparison.roundings < 4
    assert 1e-6 < done.comparison.difference < done.comparison.moved
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert load_internvl(str(tmp_path / "out")).dtype == getattr(torch, dtype)


def test_a_whole_model_in_bfloat16(full, tmp_path):
    done = export(full, tmp_path / "out", dtype="bfloat16", progress=False)
    assert (done.comparison.difference, done.comparison.roundings) == (0.0, 0.0)
    before, after = tensors_of(full), tensors_of(tmp_path / "out")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)


def test_files(lora, tmp_path):
    """Files of at most the given size, except for a larger tensor; together they have all tensors."""
    export(lora, tmp_path / "one", progress=False)
    done = export(lora, tmp_path / "many", shard_gb=4e-5, progress=False)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert done.files == len(files) > 5
    assert all(sum(t.nbytes for t in held.values()) <= 40_000 or len(held) == 1 for held in map(load_file, files))
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in files}
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_an_official_base(official, official_lora, tmp_path):
    """Both formats of the export have the same model; the official one has the base's config, tokenizer and Python files."""
    assert json.loads((official_lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(official)
    ours = export(official_lora, tmp_path / "ours", dtype="float32", progress=False)
    done = export(official_lora, tmp_path / "theirs", form="official", dtype="float32", progress=False)
    assert ours.comparison.difference < 1e-5 < ours.comparison.moved
    assert done.official_difference < 1e-5
    states = [load_internvl(str(tmp_path / name)).state_dict() for name in ("ours", "theirs")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "theirs", official))
    assert (config["torch_dtype"], config["llm_config"]["torch_dtype"]) == ("float32", "float32")
    config["torch_dtype"] = config["llm_config"]["torch_dtype"] = "bfloat16"
    assert config == original
    assert (tmp_path / "theirs" / "modeling_internvl_chat.py").exists()
    assert tensors_of(tmp_path / "theirs").keys() == tensors_of(official).keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_official_queries_by_hand(official, official_lora, tmp_path):
    """InternLM2 holds for each key-value head its two query heads, its keys and its values below each other, 8 rows each."""
    done = export(official_lora, tmp_path / "out", form="official", progress=False)
    assert done.dtype == "bfloat16"
    name = "language_model.model.layers.1.attention.wqkv.weight"
    adapter = load_file(official_lora / "adapter_model.safetensors")
    inside = "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora"
    update = ALPHA / RANK * adapter[f"{inside}_B.weight"].float() @ adapter[f"{inside}_A.weight"].float()
    before, after = (tensors_of(folder)[name] for folder in (official, tmp_path / "out"))
    torch.testing.assert_close(after[:16], before[:16] + update[:16].bfloat16())
    torch.testing.assert_close(after[32:48], before[32:48] + update[16:].bfloat16())
    assert not torch.equal(after[:16], before[:16])
    assert torch.equal(after[16:24], before[16:24])  # keys had no adapter


def test_the_official_config_of_a_converted_base(official, tmp_path):
    from mpo.models.official.convert import convert

    convert(official, tmp_path / "base", compare=False, progress=False)
    run = train(tmp_path / "run", tmp_path / "base")
    export(run, tmp_path / "out", form="official", progress=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((official / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))
    (official / "more.py").write_text("")
    export(run, tmp_path / "like", form="official", like=official, progress=False)
    assert (tmp_path / "like" / "more.py").exists()


def test_a_whole_model_of_official_origin(official, tmp_path):
    """Its folder does not name its base; --base or --like does."""
    run = train(tmp_path / "run", official, full=True, rate=1e-1)
    with pytest.raises(ValueError, match=f"{run}.*--like"):
        export(run, tmp_path / "out", form="official", progress=False)
    done = export(run, tmp_path / "out", form="official", base=str(official), progress=False)
    assert done.official_difference < 1e-5
    state = load_internvl(str(tmp_path / "out")).state_dict()
    expected = load_internvl(str(run)).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("full", [True, False])
def test_tied_embeddings(processor, tmp_path, full):
    """They remain tied."""
    base = save_base(tmp_path / "base", processor, text="qwen3", tie_word_embeddings=True)
    export(train(tmp_path / "run", base, full=full), tmp_path / "out", progress=False)
    assert "language_model.lm_head.weight" not in tensors_of(tmp_path / "out")
    model = load_internvl(str(tmp_path / "out"))
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_an_adapter_of_tied_embeddings(tmp_path):
    """Merged into the shared matrix it would change the output head too; the export unties them, in both formats."""
    base = write_official(tmp_path / "base", "qwen3")
    config = json.loads((base / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    (base / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor for name, tensor in tensors_of(base).items() if "lm_head" not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = train(tmp_path / "run", base, targets=rf"{QUERIES_AND_VALUES}|.*embed_tokens")
    for form in ("transformers", "official"):
        done = export(run, tmp_path / form, form=form, progress=False)
        assert done.comparison.difference < 1e-5
        model = load_internvl(str(tmp_path / form))
        embeddings = tensors_of(base)["language_model.model.embed_tokens.weight"]
        assert torch.equal(model.lm_head.weight, embeddings)
        assert not torch.equal(model.get_input_embeddings().weight, embeddings)


@pytest.mark.slow
def test_qlora(base, tmp_path):
    """Trained in 4 bits, merged into the base as it is on disk."""
    pytest.importorskip("bitsandbytes")
    job = TrainJob(model={"name_or_path": str(base)}, data={}, peft={"kind": "qlora"})
    run = train(tmp_path / "run", base, quantization=job.quantization())
    done = export(run, tmp_path / "out", dtype="float32", progress=False)
    assert done.comparison.difference < 1e-5 < done.comparison.moved
    torch.testing.assert_close(tensors_of(tmp_path / "out")[f"{QUERY}.weight"], by_hand(base, run), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("dtype, scale", [("float32", 1.0), ("bfloat16", 10.0)])
def test_a_layer_that_was_not_merged_is_found(adapter, tmp_path, dtype, scale):
    """An export that lacks the adapter of one layer is another model; in bfloat16 where its change exceeds rounding."""
    corrupt(adapter, lambda tensors: [tensor.mul_(scale) for name, tensor in tensors.items() if "lora_B" in name])
    run = open_trained(adapter)
    model, processor = run.load(dtype), run.processor()
    asked = Trial.of(model, processor)
    before = model.model.model.language_model.layers[0].self_attn.v_proj.base_layer.weight.clone()
    model = merged(model, progress=False)
    processor.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    asked.compare(tmp_path / "out")
    with torch.no_grad():
        model.model.language_model.layers[0].self_attn.v_proj.weight.copy_(before)
    model.save_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match=str(tmp_path / "out")):
        asked.compare(tmp_path / "out")


def test_another_processor_is_found(lora, tmp_path):
    run = open_trained(lora)
    model, processor = run.load("float32"), run.processor()
    asked = Trial.of(model, processor)
    merged(model, progress=False).save_pretrained(tmp_path)
    processor.image_processor.max_patches = 1
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"processor in {tmp_path}"):
        asked.compare(tmp_path)


def test_a_failed_comparison_leaves_no_folder(lora, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="out.partial"):
        export(lora, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    export(lora, tmp_path / "out", progress=False)
    assert not (tmp_path / "out.partial").exists()


def test_unchecked(lora, tmp_path):
    done = export(lora, tmp_path / "out", check=False, progress=False)
    assert (done.comparison, done.official_difference) == (None, None)
    assert (tmp_path / "out" / "model.safetensors").exists()


@torch.no_grad()
def test_float32_arithmetic_of_a_model_in_bfloat16(processor, internvl):
    """It is that of the model cast to float32; afterwards all weights are unchanged."""
    model = internvl.bfloat16()
    inputs = question(processor)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16().float()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    tokens = torch.tensor([[5, 6]])
    with in_float32(model):
        computed = logits_of(model, inputs, tokens)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    rounded = logits_of(model, inputs, tokens)
    expected = logits_of(model.float(), inputs, tokens)
    torch.testing.assert_close(computed, expected)
    assert (rounded - expected).abs().max() > 100 * (computed - expected).abs().max()


def zero_b(tensors):
    tensors.update({name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "lora_B" in name})


def not_finite(tensors):
    tensors[next(name for name in tensors if "layers.1" in name and "lora_A" in name)][0, 0] = float("nan")


def other_rank(tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:2].clone()


def without_one(tensors):
    del tensors[next(name for name in tensors if "lora_A" in name)]


def too_large(tensors):
    tensors.update({name: torch.full_like(tensor, 1e3) for name, tensor in tensors.items() if "layers.1.self_attn.v_proj" in name})


@pytest.mark.parametrize(
    "change, dtype, message",
    [
        (zero_b, "auto", "is zero in all 4"),
        (not_finite, "auto", r"model.language_model.layers.1.self_attn.q_proj.lora_A.weight\."),
        (other_rank, "auto", r"lora_A.weight: \(2, 32\), expected \(4, 32\).*--base"),
        (without_one, "auto", "1 tensor missing .*lora_A"),
        (too_large, "float16", "layers.1.self_attn.v_proj.weight .*float16"),
    ],
)
def test_adapters_that_are_refused(adapter, tmp_path, change, dtype, message):
    corrupt(adapter, change)
    with pytest.raises(ValueError, match=message):
        export(adapter, tmp_path / "out", dtype=dtype, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"base_model_name_or_path": None}, "adapter_config.json .*--base"),
        ({"base_model_name_or_path": "None"}, "adapter_config.json .*--base"),
        ({"base_model_name_or_path": "/gone/model"}, "/gone/model.*--base"),
        ({"base_model_name_or_path": "nobody/no-such-model"}, "nobody/no-such-model.*--base"),
        ({"peft_type": "IA3", "feedforward_modules": None}, "IA3 .*feedforward_modules"),
        ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING"),
    ],
)
def test_adapters_without_a_base(base, adapter, tmp_path, changes, message):
    settings(adapter, **changes)
    with pytest.raises(ValueError, match=message):
        export(adapter, tmp_path / "out", progress=False)
    if "peft_type" not in changes:
        export(adapter, tmp_path / "out", base=str(base), check=False, progress=False)


def test_bases_that_are_refused(processor, base, lora, tmp_path):
    other = save_base(tmp_path / "other", processor, layers=1)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.q_proj.*--base"):
        export(lora, tmp_path / "out", base=str(other), progress=False)
    with pytest.raises(ValueError, match=f"base {lora}"):
        export(lora, tmp_path / "out", base=str(lora), progress=False)
    with pytest.raises(ValueError, match="no folder .*nowhere. Give that of a run"):
        export(tmp_path / "nowhere", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="nowhere"):
        export(lora, tmp_path / "out", base=str(tmp_path / "nowhere"), progress=False)
    quantised = shutil.copytree(base, tmp_path / "quantised")
    config = json.loads((base / "config.json").read_text())
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(ValueError, match=r"quantised .*bitsandbytes.*--base"):
        export(lora, tmp_path / "out", base=str(quantised), progress=False)
    tensors = load_file(base / "model.safetensors")
    del tensors[f"{QUERY}.weight"]
    partial = shutil.copytree(base, tmp_path / "partial")
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensor missing \(.*layers.1.self_attn.q_proj"):
        export(lora, tmp_path / "out", base=str(partial), progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_whole_models_that_are_refused(full, tmp_path):
    corrupted = shutil.copytree(full, tmp_path / "corrupted")
    tensors = load_file(full / "model.safetensors")
    tensors[f"{QUERY}.weight"][0, 0] = float("inf")
    tensors["multi_modal_projector.linear_1.bias"][3] = float("nan")
    save_file(tensors, corrupted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"multi_modal_projector.linear_1.bias.*layers.1.self_attn.q_proj.weight"):
        export(corrupted, tmp_path / "out", progress=False)
    tensors = load_file(full / "model.safetensors")
    tensors[f"{QUERY}.weight"][0, 0] = 1e5
    save_file(tensors, corrupted / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="q_proj.weight.*--dtype bfloat16"):
        export(corrupted, tmp_path / "out", dtype="float16", progress=False)
    (corrupted / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{corrupted} has no model.safetensors"):
        export(corrupted, tmp_path / "out", progress=False)


def test_folders_that_are_refused(lora, official, base, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(ValueError, match=str(tmp_path / "there")):
        export(lora, tmp_path / "there", progress=False)
    run = tmp_path / "run"
    shutil.copytree(lora / "checkpoint-1", run / "checkpoint-1")
    with pytest.raises(ValueError, match="run.*checkpoint-1"):
        export(run, tmp_path / "out", progress=False)
    (run / "checkpoint-1" / "trainer_state.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint-1 .*trainer_state.json"):
        export(run / "checkpoint-1", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="--shard-gb=0"):
        export(lora, tmp_path / "out", shard_gb=0, progress=False)
    with pytest.raises(ValueError, match=f"--like={official}.*--output-format official"):
        export(lora, tmp_path / "out", like=official, progress=False)
    with pytest.raises(ValueError, match=f"--like={base}.*InternVLChatModel"):
        export(lora, tmp_path / "out", form="official", like=base, progress=False)
    with pytest.raises(ValueError, match=f"{official} as --like"):
        export(lora, tmp_path / "out", form="official", like=official, progress=False)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
