"""`mpo train peft=qlora`: the adapter is trained on a 4-bit base model, the run resumes bitwise, and its folder can be loaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from composition import composed
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from small_runs import KillAt, difference, in_fork, write_job
from support import image_pairs
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaImageProcessor, LlavaProcessor

from mpo import MPOConfig, MPOTrainer
from mpo.batching.collator import PairCollator
from mpo.commands import main
from mpo.models import add_fuser
from mpo.models.export.run import export
from mpo.models.loading import load_model
from mpo.training.job import TrainJob, run_train_job

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return [
        *write_job(tmp_path_factory.mktemp("qlora"), pairs=12),
        *("peft=qlora", "peft.r=4", "trainer.num_train_epochs=2", "trainer.save_steps=2"),
    ]


def job(settings, folder) -> TrainJob:
    return TrainJob.from_config(composed([*settings, f"run_dir={folder}"]))


def base_weights(model) -> dict[str, torch.Tensor]:
    """All weights except the adapter's, by their names in the base model; 4-bit ones as packed bytes, with their scales."""
    found = {}
    for name, value in model.state_dict().items():
        if "lora_" not in name:
            found[name.replace("base_model.model.", "").replace("base_layer.", "")] = value.detach().clone()
    return found


def losses(folder) -> list[float]:
    state = json.loads((Path(folder) / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]


def test_the_adapter_learns_and_the_base_does_not(settings, tmp_path):
    """Six steps. The base model equals a freshly loaded one bit for bit, and loading the run folder gives the trained model."""
    asked = job(settings, tmp_path / "run")
    trainer = run_train_job(asked)
    trained = trainer.model.eval()
    fresh = load_model(**{k: v for k, v in asked.model.items() if k != "_target_"}, quantization_config=asked.quantization())
    before, after = base_weights(fresh.model), base_weights(trained)
    assert difference(before, after) == 0
    assert sum(value.dtype == torch.uint8 for value in after.values()) >= 14  # seven projections in each of two layers
    second = {name: value for name, value in trained.named_parameters() if "lora_B" in name}  # zero initially
    assert second and all(value.abs().max() > 1e-4 for value in second.values())
    logged = losses(tmp_path / "run")
    assert len(logged) == 6 and logged[-1] < logged[0]

    assert {value.dtype for name, value in trained.named_parameters() if "lora_" in name} == {torch.float32}
    reloaded = PeftModel.from_pretrained(fresh.model, tmp_path / "run").eval()
    batch = PairCollator(fresh.processor, layout="padded")(image_pairs(2).to_list())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        assert torch.equal(trained(**inputs).logits, reloaded(**inputs).logits)
        with reloaded.disable_adapter():
            assert not torch.equal(trained(**inputs).logits, reloaded(**inputs).logits)


def test_killed_and_run_again_it_ends_the_same(settings, tmp_path, capsys, record_property):
    """kill -9 after the fifth of six steps; the same command resumes from the fourth."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert in_fork(lambda: run_train_job(job(settings, straight))) == 0
    assert in_fork(lambda: run_train_job(job(settings, killed), callbacks=[KillAt("step", 5)])) == -9
    assert main(["train", *settings, f"run_dir={killed}"]) == 0
    assert f"resuming from {killed / 'checkpoint-4'}" in capsys.readouterr().out
    ends = [load_file(folder / "adapter_model.safetensors") for folder in (straight, killed)]
    record_property("difference", ("QLoRA, killed and resumed", difference(*ends)))
    assert difference(*ends) == 0
    assert losses(straight) == losses(killed)
    deltas = [json.loads((folder / "checkpoint-6" / "mpo_state.json").read_text())["reward_shift"] for folder in (straight, killed)]
    assert deltas[0] == deltas[1] and deltas[0]["0.total"] != 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialization_that_decomposes_the_base_is_refused(settings, tmp_path, init):
    with pytest.raises(ValueError, match=f"{init}.*quantized"):
        run_train_job(job([*settings, f"++peft.init_lora_weights={init}"], tmp_path / "run"))


def test_an_adapter_that_is_trained_further_starts_where_it_was(settings, tmp_path):
    """The trainer does not round the adapter's float32 values, so the reference is exactly the adapter of the folder."""
    asked = job(settings, tmp_path / "run")
    loading = {k: v for k, v in asked.model.items() if k != "_target_"} | {"quantization_config": asked.quantization()}
    base = load_model(**loading)
    torch.manual_seed(0)
    begun = get_peft_model(
        base.model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)", init_lora_weights=False)
    )
    begun.save_pretrained(tmp_path / "begun")
    policy = PeftModel.from_pretrained(load_model(**loading).model, tmp_path / "begun", is_trainable=True)
    args = MPOConfig(
        str(tmp_path / "on"), use_cpu=True, bf16=False, report_to="none", max_steps=2, learning_rate=1e-2, warmup_steps=0
    )
    args.per_device_train_batch_size = 2
    trainer = MPOTrainer(model=policy, args=args, train_dataset=image_pairs(4), processing_class=base.processor)
    saved = load_file(tmp_path / "begun" / "adapter_model.safetensors")
    held = get_peft_model_state_dict(trainer.model)
    assert held.keys() == saved.keys() and all(torch.equal(held[name], saved[name]) for name in saved)
    batch = trainer.data_collator(image_pairs(2).to_list())
    # On CPUs, bitsandbytes would pack its layers for inference here, and training would fail.
    trainer.evaluate(image_pairs(2))
    before = trainer.compute_ref_log_probs(trainer.model, batch)
    trainer.train()
    assert not all(torch.equal(value, saved[name]) for name, value in get_peft_model_state_dict(trainer.model).items())
    assert torch.equal(trainer.compute_ref_log_probs(trainer.model, batch), before)


def write_with_fuser(folder, kind) -> list[str]:
    """`write_job` with a model whose fuser has an effect from the start; a LLaVA shares the InternVL's tokenizer."""
    settings = write_job(folder, pairs=8)
    loaded = load_model(str(folder / "model"))
    model, processor = loaded.model, loaded.processor
    if kind == "llava":
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        vision = {"model_type": "clip_vision_model", **sizes, "image_size": 28, "patch_size": 7}
        text = {"model_type": "llama", **sizes, "vocab_size": len(processor.tokenizer)}
        placeholder = {"image_token_index": processor.image_token_id, "image_seq_length": 16, "vision_feature_layer": -1}
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, **placeholder))
        images = LlavaImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
        reading = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "patch_size": 7}
        template = {"chat_template": processor.chat_template, "image_token": processor.image_token}
        processor = LlavaProcessor(images, processor.tokenizer, **reading, **template)
    fused = add_fuser(model, 1, num_heads=2)
    torch.nn.init.constant_(fused.model.fuser.gamma1, 0.5)
    for part in (fused, processor):
        part.save_pretrained(folder / "model")
    return settings


@pytest.mark.parametrize(
    "kind, peft, choice",
    [
        ("internvl", "qlora", "train"),
        ("internvl", "qlora", "freeze"),
        ("llava", "qlora", "train"),
        ("llava", "qlora", "freeze"),
        ("llava", "lora", "train"),
    ],
)
def test_a_model_with_a_fuser(tmp_path, kind, peft, choice, capsys):
    """The fuser is never quantized. Trained, it moves beside the adapter and the reference keeps the first one; frozen, it stays
    bit for bit. The folder gives the trained model again, and its export is the adapter and the fuser on the unquantized base."""
    parts = ["train_parts.language=lora", *(["train_parts.fuser=train"] if choice == "train" else [])]
    settings = [*write_with_fuser(tmp_path, kind), f"peft={peft}", "peft.r=4", "trainer.learning_rate=1e-2", *parts]
    assert main(["train", *settings, f"run_dir={tmp_path / 'run'}", "dry_run=true"]) == 0
    planned = re.search(r"total +[\d,]+ +([\d,]+)\n", capsys.readouterr().out)[1].replace(",", "")
    asked = job(settings, tmp_path / "run")
    loading = {k: v for k, v in asked.model.items() if k != "_target_"} | {"quantization_config": asked.quantization()}
    start, fresh = load_model(**loading), load_model(**loading).model
    batch = PairCollator(start.processor, layout="padded")(image_pairs(2).to_list())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    trained = run_train_job(asked).model.eval()
    four_bits = {name for name, module in trained.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(four_bits) == (14 if peft == "qlora" else 0) and all(".language_model." in name for name in four_bits)
    assert int(planned) == sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    base = load_file(tmp_path / "model" / "model.safetensors")
    begun = {name.partition("fuser.")[2]: value for name, value in base.items() if ".fuser." in name}
    own = trained.base_model.model.model.fuser
    own = own.modules_to_save["default"] if choice == "train" else own
    held = dict(own.named_parameters())
    assert held.keys() == begun.keys()
    moved = {name for name in held if not torch.equal(held[name].float(), begun[name].float())}
    assert moved == ({*held} if choice == "train" else set())
    assert all(parameter.requires_grad == (choice == "train") for parameter in held.values())
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert any(".fuser." in name for name in saved) == (choice == "train")

    reloaded = PeftModel.from_pretrained(fresh, tmp_path / "run").eval()
    with torch.no_grad():
        before, after = start.model.eval()(**inputs).logits, trained(**inputs).logits
        assert torch.equal(after, reloaded(**inputs).logits) and not torch.equal(after, before)
        for model in (trained, reloaded):
            with model.disable_adapter():
                assert torch.equal(model(**inputs).logits, before)
    done = export(tmp_path / "run", tmp_path / "out", progress=False)
    assert done.comparison.difference < 1e-4
    merged = load_model(str(tmp_path / "out")).model.model.fuser.state_dict()
    assert all(torch.equal(merged[name].float(), value.float()) for name, value in held.items())
