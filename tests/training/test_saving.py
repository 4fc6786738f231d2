"""Every folder a run leaves holds the trained weights, strictly; the card says what was done; trackers get the logs."""

import json
import re
from importlib.metadata import version

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from small_runs import LORA, difference, small_run
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from mpo import MPOTrainer
from mpo.training.checkpoint import load_weights


def weights(model) -> dict:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def loaded(folder) -> dict:
    return weights(AutoModelForImageTextToText.from_pretrained(folder))


def test_save_only_model(tmp_path):
    """Its folders hold the weights; resuming from one is refused, since it lacks the optimizer."""
    trainer = small_run(tmp_path, save_strategy="steps", save_steps=4, save_only_model=True)
    trainer.train()
    assert difference(loaded(tmp_path / "checkpoint-4"), weights(trainer.model)) == 0
    with pytest.raises(ValueError, match="save_only_model"):
        small_run(tmp_path, num_train_epochs=2).train(resume_from_checkpoint=True)


def test_sharded_checkpoints_resume(tmp_path):
    trainer = small_run(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    resumed = small_run(tmp_path, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(folder))
    assert difference(weights(trainer.model), weights(resumed.model)) == 0


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_a_missing_or_unexpected_tensor_is_an_error(tmp_path, change):
    trainer = small_run(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    file = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        name = next(name for name in tensors if "q_proj" in name)
        del tensors[name]
    else:
        name = "language_model.model.layers.7.extra.weight"
        tensors[name] = torch.zeros(3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit InternVL.*(q_proj|extra)"):
        small_run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("change", ["missing", "other rank"])
def test_adapters_are_restored_strictly(tmp_path, change):
    trainer = small_run(tmp_path, kind="lora", save_strategy="steps", save_steps=2)
    trainer.train()
    file = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:2].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lora_A"):
        small_run(tmp_path, kind="lora").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_mixed_dtypes_come_back_exactly(tmp_path):
    """bfloat16 layers beside float32 ones."""
    model = small_run(tmp_path).model
    model.model.language_model.to(torch.bfloat16)
    expected = weights(model)
    model.save_pretrained(tmp_path / "mixed")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights(model, tmp_path / "mixed")
    assert difference(weights(model), expected) == 0
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16, torch.float32}


def test_a_half_written_checkpoint_is_refused(tmp_path):
    small_run(tmp_path, save_strategy="steps", save_steps=2).train()
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_st')
    with pytest.raises(ValueError, match="checkpoint-4.*checkpoint-2"):
        small_run(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match="no complete checkpoint"):
        small_run(tmp_path / "empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"pairs": 10}, "in the data set = 8"),
        ({"gradient_accumulation_steps": 2}, "pairs per step = 2"),
        ({"seed": 1}, "seed = 42"),
    ],
)
def test_a_resume_with_other_pairs_is_refused(tmp_path, settings, what):
    small_run(tmp_path, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=what):
        small_run(tmp_path, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_hubs_folder(tmp_path, monkeypatch):
    """What would be uploaded holds the trained weights. Only the network is replaced."""
    import transformers.trainer as trainer_module

    uploaded = []

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": "me/small-mpo"})()

        def upload_folder(self, folder_path, **kwargs):
            uploaded.append(loaded(folder_path))
            return type("Job", (), {"done": lambda self: True, "result": lambda self: None})()

    monkeypatch.setattr(trainer_module, "hf_api", Hub)
    trainer = small_run(tmp_path, save_strategy="steps", save_steps=4, push_to_hub=True, hub_model_id="me/small-mpo")
    trainer.train()
    assert uploaded
    assert difference(uploaded[-1], weights(trainer.model)) == 0


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"])
def test_a_checkpoint_that_lacks_a_file_is_refused(tmp_path, file):
    """transformers would reset the optimizer or the random numbers."""
    small_run(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    (tmp_path / "checkpoint-2" / file).unlink()
    with pytest.raises(ValueError, match=file.split(".")[0]):
        small_run(tmp_path, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_an_adapter_loads_on_its_base(tmp_path):
    trainer = small_run(tmp_path / "run", kind="lora", max_steps=3)
    base = small_run(tmp_path / "base").model
    trainer.train()
    trainer.save_model()
    assert difference(weights(PeftModel.from_pretrained(base, tmp_path / "run")), weights(trainer.model)) == 0
    assert LORA.r == json.loads((tmp_path / "run" / "adapter_config.json").read_text())["r"]
    AutoProcessor.from_pretrained(tmp_path / "run")


def test_a_continued_adapter_resumes(tmp_path):
    """Its reference is its start; both come back."""

    def run(folder, **settings):
        made = small_run(folder, **settings)
        torch.manual_seed(3)
        adapted = get_peft_model(made.model, LORA)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        return MPOTrainer(model=adapted, args=made.args, train_dataset=made.train_dataset, processing_class=made.processing_class)

    settings = {"save_strategy": "steps", "save_steps": 2}
    straight = run(tmp_path / "a", **settings)
    straight.train()
    resumed = run(tmp_path / "a", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert difference(weights(straight.model), weights(resumed.model)) == 0


def test_model_card(tmp_path):
    trainer = small_run(tmp_path, max_steps=1)
    trainer.create_model_card(model_name="small-mpo")
    card = (tmp_path / "README.md").read_text()
    for told in ("2411.10442", "| `sigmoid` | 0.8 |", "| `bco_pair` | 0.2 |", "| `sft` | 1 |", "beta: 0.1", "preference pairs: 8"):
        assert told in card, told
    assert f"mpo-trainer: {version('mpo-trainer')}" in card
    assert "None" not in re.sub(r"max_length: None", "", card)
    assert set(trainer.model.model_tags) >= {"trl", "mpo"}


def test_trackers_get_every_term(tmp_path, monkeypatch):
    """`report_to="tensorboard"`, from the files it writes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    small_run(tmp_path, max_steps=2, report_to="tensorboard").train()
    events = next((tmp_path / "logs").rglob("events.*"), None)
    assert events is not None
    accumulator = EventAccumulator(str(events.parent))
    accumulator.Reload()
    assert {"train/loss", "train/loss/sigmoid", "train/loss/bco_pair", "train/loss/sft", "train/reward_shift"} <= set(
        accumulator.Tags()["scalars"]
    )


def test_callbacks_read_the_state(tmp_path):
    seen = []

    class Reader(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append((state.global_step, logs.get("loss/sft"), state.log_history[-1].get("loss/sft")))

    small_run(tmp_path, max_steps=2, callbacks=[Reader()]).train()
    assert [step for step, *_ in seen] == [1, 2, 2]
    assert all(mine == kept for _, mine, kept in seen)
    assert seen[0][1] > 0
