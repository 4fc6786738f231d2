"""Export of every type of adapter: the exported folder computes the same as the trained model."""

import copy
import functools
import json

import pytest
import torch
from official_checkpoints import write_official
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from support import text_pairs

from mpo import MPOConfig, MPOTrainer
from mpo.commands import main
from mpo.models.export.run import export
from mpo.models.fit import check_fit
from mpo.models.loading import load_internvl, load_model, load_processor
from mpo.models.small import small_internvl
from mpo.preflight.structure import meta_model
from mpo.training.job import TrainJob

LAYERS = {"target_modules": r".*language_model.*\.(q_proj|v_proj)", "task_type": "CAUSAL_LM"}
NEW = ["<new>", "<newer>"]


def lora(**settings):
    return LoraConfig(r=4, lora_alpha=8, **{**LAYERS, **settings})


METHODS = {
    "bias": lora(bias="all"),
    "bias of layers": lora(bias="lora_only"),
    "DoRA": lora(use_dora=True),
    "rsLoRA": lora(use_rslora=True),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "IA3": IA3Config(feedforward_modules=[], **LAYERS),
    "LoHa": LoHaConfig(r=4, **LAYERS),
    "LoKr": LoKrConfig(r=4, **LAYERS),
    "VeRA": VeraConfig(r=4, **LAYERS),
    "VeRA without its projections": VeraConfig(r=4, save_projection=False, **LAYERS),
    "LoRA on embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "LoRA on both": lora(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    "whole embeddings": lora(modules_to_save=["embed_tokens"]),
    "whole embeddings and head": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "some tokens": lora(trainable_token_indices=[5, 6]),
}
CHECKED = ("bias", "OLoRA", "IA3", "VeRA")  # also by the export itself
OF_EMBEDDINGS = [name for name in METHODS if "embed" in name or "both" in name or "tokens" in name]


@pytest.fixture(scope="module")
def bases(processor, tmp_path_factory):
    """A model with an untied output head, one with a tied head, and an official one."""
    folder = tmp_path_factory.mktemp("bases")
    sizes = {"hidden_size": 32, "vision_hidden_size": 32}
    for name, settings in {"own": {}, "tied": {"text": "qwen3", "tie_word_embeddings": True}}.items():
        small_internvl(processor, **sizes, **settings).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_official(folder / "official", "qwen2")
    return folder


@functools.cache
def loaded(base):
    return load_internvl(str(base)).eval(), load_processor(str(base))


def trained(base, adapter):
    """A base with an adapter, all of whose trainable weights are changed."""
    model = get_peft_model(copy.deepcopy(loaded(base)[0]), copy.deepcopy(adapter)).eval()
    move(model)
    return model


@torch.no_grad()
def move(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))


def saved(model, base, folder, **options):
    model.save_pretrained(folder, **options)
    loaded(base)[1].save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model, *ids):
    return model(input_ids=torch.tensor([[*range(3, 30), *ids]])).logits.float()


def check_export(model, base, tmp_path, tolerance=1e-5, less=100, dtype="auto", check=True):
    """The exported model computes the same as the trained one; the change by training is far larger than the difference."""
    before, expected = logits(loaded(base)[0]), logits(model)
    export(saved(model, base, tmp_path / "run"), tmp_path / "out", dtype=dtype, check=check, progress=False)
    computed = logits(load_internvl(str(tmp_path / "out"), dtype=torch.float32).eval())
    assert (computed - expected).abs().max() < tolerance * expected.abs().max()
    assert (expected - before).abs().max() > less * (computed - expected).abs().max()


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OF_EMBEDDINGS])
def test_every_method(bases, tmp_path, name):
    check_export(trained(bases / "own", METHODS[name]), bases / "own", tmp_path, check=name in CHECKED)


@pytest.mark.parametrize("name", OF_EMBEDDINGS)
def test_tied_embeddings(bases, tmp_path, name):
    """Some methods train the shared matrix, others give one of the two a matrix of its own."""
    check_export(trained(bases / "tied", METHODS[name]), bases / "tied", tmp_path, check=False)


@pytest.mark.parametrize("name", ["DoRA", "PiSSA", "some tokens"])
def test_half_precision(bases, tmp_path, name):
    """The export's own comparison is in bfloat16; here with the trained float32 model, bfloat16 has 8 bits."""
    model = trained(bases / "own", METHODS[name])
    check_export(model, bases / "own", tmp_path, tolerance=2**-6, less=10, dtype=torch.bfloat16)
    assert load_internvl(str(tmp_path / "out")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "adapter, message",
    [
        (lora(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "PROMPT_TUNING"),
        (lora(alora_invocation_tokens=[3]), "aLoRA"),
    ],
)
def test_methods_that_are_refused(bases, tmp_path, adapter, message):
    run = saved(trained(bases / "own", adapter), bases / "own", tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        export(run, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_adapter_that_changes_nothing(bases, tmp_path):
    run = saved(get_peft_model(copy.deepcopy(loaded(bases / "own")[0]), METHODS["IA3"]), bases / "own", tmp_path / "run")
    with pytest.raises(ValueError, match=f"adapter in {run}"):
        export(run, tmp_path / "out", progress=False)


def test_an_olora_run_in_four_bits(bases, tmp_path):
    """OLoRA's decomposition of 4-bit weights differs from that of the weights on disk."""
    run = saved(trained(bases / "own", METHODS["OLoRA"]), bases / "own", tmp_path / "run")
    (run / "resolved.yaml").write_text("peft: {kind: qlora}")
    with pytest.raises(ValueError, match="init_lora_weights='olora'.*resolved.yaml"):
        export(run, tmp_path / "out", progress=False)


def test_two_runs_in_one_folder(bases, tmp_path):
    run = saved(trained(bases / "own", lora()), bases / "own", tmp_path / "run")
    loaded(bases / "own")[0].save_pretrained(run)
    with pytest.raises(ValueError, match="adapter_config.json.*model.safetensors"):
        export(run, tmp_path / "out", progress=False)


# Added tokens


def grown(base, adapter=None):
    """A model and its processor with two added tokens; the base has exactly one row per token."""
    model, processor = copy.deepcopy(loaded(base))
    processor.tokenizer.add_tokens(NEW)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    model = model if adapter is None else get_peft_model(model, copy.deepcopy(adapter))
    move(model)
    return model.eval(), processor


@pytest.mark.parametrize("form", ["transformers", "official"])
@pytest.mark.parametrize("adapter", [None, lora()], ids=["whole", "adapter"])
def test_tokens_without_a_row(bases, tmp_path, adapter, form):
    """A run with added tokens whose embeddings were saved without their rows, or not saved."""
    base = bases / ("official" if form == "official" else "own")
    model, processor = copy.deepcopy(loaded(base))
    rows = len(model.get_input_embeddings().weight)
    processor.tokenizer.add_tokens([f"<new {number}>" for number in range(rows - len(processor.tokenizer) + 2)])
    model = model if adapter is None else get_peft_model(model, adapter)
    move(model)
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    for check in (True, False):
        with pytest.raises(ValueError, match=rf"{rows + 2} tokens .*{rows} rows.*id {rows + 1}"):
            export(tmp_path / "run", tmp_path / "out", form=form, base=str(base), check=check, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_head_with_fewer_rows_than_tokens(bases, tmp_path):
    """Only the embeddings were resized."""
    model, processor = grown(bases / "own")
    model.lm_head = torch.nn.Linear(32, len(processor.tokenizer) - 2, bias=False)
    with pytest.raises(ValueError, match=rf"output head {len(processor.tokenizer) - 2} rows.*'<newer>'"):
        check_fit(model, processor)


ROWS_IN_FOLDER = {
    "saved too": (lora(), {"save_embedding_layers": True}),
    "trained whole": (lora(modules_to_save=["embed_tokens", "lm_head"]), {}),
    "with LoRA": (lora(target_modules=["q_proj", "embed_tokens", "lm_head"]), {}),
}


@pytest.mark.parametrize("form", ["own", "tied", "official"])
@pytest.mark.parametrize("name", ROWS_IN_FOLDER)
def test_rows_in_the_adapters_folder(bases, tmp_path, name, form):
    """They are exported as trained, also for the new tokens."""
    adapter, options = ROWS_IN_FOLDER[name]
    model, processor = grown(bases / form, adapter)
    ids = processor.tokenizer.convert_tokens_to_ids(NEW)
    expected = logits(model, *ids)
    model.save_pretrained(tmp_path / "run", **options)
    processor.save_pretrained(tmp_path / "run")
    to = "official" if form == "official" else "transformers"
    export(tmp_path / "run", tmp_path / "out", form=to, check=form == "own", progress=False)
    out = load_internvl(str(tmp_path / "out"))
    assert len(out.get_input_embeddings().weight) == len(out.lm_head.weight) == expected.shape[-1]
    assert (logits(out.eval(), *ids) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_new_rows_as_trained_tokens(bases, tmp_path):
    """Only the rows of the new tokens were trained; an untied head has them only if it is named."""
    first = len(load_processor(str(bases / "tied")).tokenizer)
    for base, indices, kept in (
        ("tied", [first, first + 1], True),
        ("own", {"embed_tokens": [first, first + 1], "lm_head": [first, first + 1]}, True),
        ("own", [first, first + 1], False),
        ("tied", [first + 1], False),
    ):
        folder = tmp_path / f"{base} {indices}"
        model, processor = grown(bases / base, lora(trainable_token_indices=indices))
        expected = logits(model, first, first + 1)
        model.save_pretrained(folder / "run", save_embedding_layers=False)
        processor.save_pretrained(folder / "run")
        if kept:
            export(folder / "run", folder / "out", progress=False)
            out = load_internvl(str(folder / "out")).eval()
            assert (logits(out, first, first + 1) - expected).abs().max() < 1e-5 * expected.abs().max()
        else:
            with pytest.raises(ValueError, match=f"{first + 2} rows"):
                export(folder / "run", folder / "out", progress=False)


# An adapter where a model is expected


def test_an_adapter_by_name(bases, tmp_path):
    """Every loader names the adapter, its base and the remedy."""
    run = saved(trained(bases / "own", lora()), bases / "own", tmp_path / "run")
    refused = rf"{run} is an adapter of {bases / 'own'}.*mpo export .*is_trainable=True"
    for load in (load_internvl, load_model, load_processor):
        with pytest.raises(ValueError, match=refused):
            load(str(run))
    config = {"model": {"_target_": "mpo.models.loading.load_model", "name_or_path": str(run)}, "data": {"path": "none"}}
    with pytest.raises(ValueError, match=refused):
        TrainJob.from_config(config)
    args = MPOConfig(str(tmp_path / "other"), use_cpu=True, bf16=False, report_to="none")
    with pytest.raises(ValueError, match=refused):
        MPOTrainer(model=str(run), args=args, train_dataset=text_pairs(2))
    assert main(["data", "validate", str(tmp_path / "none.jsonl"), "--model", str(run)]) == 2
    (run / "config.json").write_text((bases / "own" / "config.json").read_text())  # as some trainers write it
    with pytest.raises(ValueError, match=refused):
        load_internvl(str(run))
    again = PeftModel.from_pretrained(load_internvl(str(bases / "own")), run, is_trainable=True)
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_a_base_that_is_not_named(bases, tmp_path):
    run = saved(trained(bases / "own", lora()), bases / "own", tmp_path / "run")
    path = run / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match=f"{run} is an adapter.*adapter_config.json"):
        load_internvl(str(run))


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16"])
def test_a_dtype_or_its_name(bases, tmp_path, dtype):
    base = str(bases / "own")
    assert load_internvl(base, dtype=dtype).dtype == load_model(base, dtype=dtype).model.dtype == torch.bfloat16
    assert meta_model(load_internvl(base).config, dtype).dtype == torch.bfloat16
    job = TrainJob.from_config(
        {"model": {"_target_": "mpo.models.loading.load_model", "name_or_path": base, "dtype": dtype}, "data": {"path": "none"}}
        | {"run_dir": str(tmp_path), "trainer": {"use_cpu": True, "bf16": False, "report_to": "none"}}
    )
    assert TrainJob.load(job.save()).model["dtype"] == "bfloat16"
    for wrong in ("int8", torch.int8, None):
        with pytest.raises(ValueError, match=f"got {wrong!r}"):
            load_internvl(base, dtype=wrong)


def test_a_corrupted_head_in_the_adapters_folder(bases, tmp_path):
    """Embeddings and head with different numbers of rows fit no model."""
    model, processor = grown(bases / "own", lora())
    run = saved(model, bases / "own", tmp_path / "run", save_embedding_layers=True)
    tensors = load_file(run / "adapter_model.safetensors")
    name = next(name for name in tensors if "lm_head" in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, run / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{run} .*rows: \[\d+, \d+\]"):
        export(run, tmp_path / "out", progress=False)
