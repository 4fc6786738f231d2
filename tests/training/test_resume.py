"""What may change before a run is resumed, and what is refused by name: by the trainer, and by a recipe."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from small_runs import small_run
from support import make_image, text_pairs

from mpo import MPOConfig
from mpo.training.content import content_of
from mpo.training.job import FINAL_WEIGHTS, TrainJob
from mpo.training.same_run import MAY_CHANGE, MAY_CHANGE_IN_RECIPES

SAVING = {"kind": "lora", "pairs": 4, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    small_run(folder, **SAVING).train()
    return folder / "checkpoint-1"


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy of the checkpoint, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoint-1")


def test_the_lists_name_existing_fields():
    of_newer_transformers = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # 5.24
    assert set(MPOConfig.__dataclass_fields__) | of_newer_transformers >= MAY_CHANGE
    assert {f"trainer.{name}" for name in MAY_CHANGE} <= MAY_CHANGE_IN_RECIPES


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"learning_rate": 0.5}, [("learning_rate", "0.001", "0.5")]),
        ({"beta": 0.3, "optim": "sgd"}, [("beta", "0.1", "0.3"), ("optim", "adamw_torch_fused", "sgd")]),
        ({"loss_type": ["sigmoid"]}, [("loss_type", "bco_pair", '["sigmoid"]')]),
        ({"loss_weights": [1.0, 1.0, 1.0]}, [("loss_weights", "0.8", "[1.0, 1.0, 1.0]")]),
        ({"reward_shift": "none"}, [("reward_shift", "running_mean", "none")]),
        ({"warmup_steps": 0.5, "weight_decay": 0.0}, [("warmup_steps", "0.05", "0.5"), ("weight_decay", "0.05", "0.0")]),
        ({"max_length": 40}, [("max_length", "null", "40")]),
        ({"language_learning_rate": 1e-5}, [("language_learning_rate", "null", "1e-05")]),
        ({"lora_dropout": 0.5}, [("lora_dropout", "0.1", "0.5")]),
        ({"lora_targets": ["q_proj"]}, [("target_modules", "v_proj", "q_proj"), ("trained parameters", "8", "4")]),
        ({"kind": "full"}, [("adapters", "LORA", "{}"), ("trained parameters", "8", "73")]),
        ({"pairs": 5}, [("pairs in the data set", "4", "5"), ("content of the data set", '"', '"')]),
        ({"kind": "text", "learning_rate": 0.5}, [("content of the data set", '"', '"'), ("learning_rate", "0.001", "0.5")]),
        ({"gradient_accumulation_steps": 2}, [("pairs per step", "2", "4")]),
        ({"seed": 1}, [("seed", "42", "1")]),
    ],
    ids=str,
)
def test_the_trainer_refuses(saved, settings, names):
    """Each changed setting is listed with both values, before a step."""
    trainer = small_run(saved.parent, **{**SAVING, **settings, "max_steps": 2})
    with pytest.raises(ValueError, match="output_dir") as refusal:
        trainer.train(resume_from_checkpoint=str(saved))
    lines = {line.split(" = ")[0].strip(): line for line in str(refusal.value).splitlines() if " = " in line}
    assert trainer.state.global_step == 0
    for name, before, now in names:
        line = next(line for key, line in lines.items() if key.endswith(name))
        first, second = line.split(" = ", 1)[1].split(" (now ")
        assert before in first and now in second


@pytest.mark.parametrize(
    ("key", "value"), [("text_config.rms_norm_eps", 0.1), ("vision_config.layer_norm_eps", 0.2), ("downsample_ratio", 0.25)]
)
def test_another_config_of_the_model_is_refused(saved, key, value):
    trainer = small_run(saved.parent, **{**SAVING, "max_steps": 2})
    *parts, name = key.split(".")
    config = trainer.model.get_base_model().config
    for part in parts:
        config = getattr(config, part)
    setattr(config, name, value)
    trainer._start_loop()
    with pytest.raises(ValueError, match=rf"config.json's {key} = .* \(now {value}\)"):
        trainer.train(resume_from_checkpoint=str(saved))


def test_an_optimizer_of_the_user(tmp_path):
    def run(kind, rate, steps):
        trainer = small_run(tmp_path, **{**SAVING, "kind": "full", "max_steps": steps})
        again = type(trainer)(
            trainer.model,
            args=trainer.args,
            train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
            optimizers=(kind(trainer.model.parameters(), lr=rate), None),
        )
        return again

    run(torch.optim.SGD, 0.1, 1).train()
    for kind, rate, found in ((torch.optim.AdamW, 0.1, "AdamW"), (torch.optim.SGD, 0.2, "0.2")):
        with pytest.raises(ValueError, match=f"optimizer.*SGD.*{found}"):
            run(kind, rate, 2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_train_epochs": 5, "logging_steps": 3, "save_steps": 7, "save_total_limit": 1, "report_to": "none", "run_name": "b"},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"eval_pairs": 2, "eval_strategy": "steps", "eval_steps": 1, "dataloader_num_workers": 1, "max_steps": 2},
        {"pairs": 6, "seed": 3, "ignore_data_skip": True},
    ],
    ids=str,
)
def test_the_trainer_accepts(checkpoint, settings):
    steps = settings.get("max_steps", 1)
    output = small_run(checkpoint.parent, **{**SAVING, **settings}).train(resume_from_checkpoint=str(checkpoint))
    assert output.global_step == steps


def test_a_longer_run_goes_on_at_the_rate_of_its_own_schedule(tmp_path):
    """Not at the last rate of the shorter one, which is 0 at its end."""

    def rates(steps, resume=None):
        trainer = small_run(tmp_path, **{**SAVING, "max_steps": steps, "logging_steps": 1}, lr_scheduler_type="linear")
        trainer.train(resume_from_checkpoint=resume)
        return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]

    whole = rates(4)
    first = rates(2)
    assert rates(4, str(tmp_path / "checkpoint-2")) == [*first, *whole[2:]]
    assert whole[2] > 0


def test_a_checkpoint_without_settings(checkpoint, caplog):
    """One warning; what it holds is compared."""
    state = json.loads((checkpoint / "mpo_state.json").read_text())
    del state["run"], state["order"]["content of the data set"]
    (checkpoint / "mpo_state.json").write_text(json.dumps(state))
    small_run(checkpoint.parent, **SAVING, learning_rate=0.5).train(resume_from_checkpoint=str(checkpoint))
    assert sum("checkpoint-1 was written by" in message for message in caplog.messages) == 1
    with pytest.raises(ValueError, match="pairs in the data set = 4 .now 6"):
        small_run(checkpoint.parent, **{**SAVING, "pairs": 6}).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("size", [0, 0.5, 0.99])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "mpo_state.json", "adapter_model.safetensors"])
def test_a_truncated_file_is_named(checkpoint, file, size):
    content = (checkpoint / file).read_bytes()
    (checkpoint / file).write_bytes(content[: int(len(content) * size)])
    with pytest.raises(ValueError, match=f"checkpoint-1/{file} .*checkpoint-1 "):
        small_run(checkpoint.parent, **SAVING).train(resume_from_checkpoint=str(checkpoint))


# --- A recipe


@pytest.fixture(scope="module")
def composed():
    with initialize_config_module("mpo.recipes", version_base="1.3"):
        config = compose("train", ["peft=lora", "++data.path=a.jsonl", "++model.name_or_path=nowhere", "++trainer.use_cpu=true"])
    return OmegaConf.to_container(config, resolve=True)


def changed(config, changes):
    config = OmegaConf.create(config)
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    return OmegaConf.to_container(config)


@pytest.fixture
def interrupted(composed, tmp_path):
    """The configuration of a job that has saved a checkpoint."""
    config = {**composed, "run_dir": str(tmp_path)}
    TrainJob.from_config(config).save()
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    return config


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"trainer.learning_rate": 1e-4}, [("trainer.learning_rate", "5e-06", "0.0001")]),
        ({"trainer.adam_beta2": 0.95}, [("trainer.adam_beta2", "0.999", "0.95")]),
        ({"trainer.global_batch_size": 8}, [("trainer.global_batch_size", "256", "8")]),
        ({"loss.beta": 0.5, "seed": 3}, [("loss.beta", "0.1", "0.5"), ("seed", "0", "3")]),
        ({"peft.lora_alpha": 64}, [("peft.lora_alpha", "32", "64")]),
        ({"peft.use_rslora": True}, [("peft.use_rslora", "false", "true")]),
        ({"model.dtype": "float32", "drop_path": 0.2}, [("drop_path", "0.0", "0.2"), ("model.dtype", "auto", "float32")]),
        ({"model.max_tiles": 4}, [("model.max_tiles", "null", "4")]),
        ({"data.limit": 10, "data.tiles.max": 2}, [("data.limit", "null", "10"), ("data.tiles.max", "null", "2")]),
        ({"lr.projector": 1e-3}, [("lr.projector", "null", "0.001")]),
        ({"train_parts.language": "lora"}, [("train_parts.language", "null", "lora")]),
    ],
    ids=str,
)
@pytest.mark.parametrize("resume", ["auto", "checkpoint-3"])
def test_a_recipe_refuses(interrupted, changes, names, resume):
    if resume != "auto":
        changes = {**changes, "resume": f"{interrupted['run_dir']}/{resume}", "run_dir": f"{interrupted['run_dir']}/other"}
    with pytest.raises(ValueError, match=r"checkpoint-3 [^$]*run_dir") as refusal:
        TrainJob.from_config(changed(interrupted, changes))
    assert len([line for line in str(refusal.value).splitlines() if " = " in line]) == len(names)
    for name, before, now in names:
        assert any(
            line.split() == [name, "=", before, "(now", f"{now})"] for line in str(refusal.value).replace('"', "").splitlines()
        )


def test_another_kind_of_training(interrupted):
    with pytest.raises(ValueError, match=r"\n  peft.kind = .lora. .now .none..\nSet"):
        TrainJob.from_config({**interrupted, "peft": {"kind": "none"}})


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer.max_steps": 9, "trainer.num_train_epochs": 3, "trainer.adam_beta2": 0.999},
        {"trainer.logging_steps": 5, "trainer.save_steps": 2, "trainer.save_total_limit": None, "samples.every": 7},
        {"data.eval_path": "b.jsonl", "trainer.eval_strategy": "steps", "trainer.eval_steps": 2, "data.num_proc": 1},
        {"launch.nproc_per_node": 2, "trainer.gradient_checkpointing": False, "trainer.dataloader_num_workers": 0},
        {"data.path": "moved/a.jsonl", "model.name_or_path": "moved", "dry_run_records": 5},  # compared by content
    ],
    ids=str,
)
def test_a_recipe_accepts(interrupted, changes):
    job = TrainJob.from_config(changed(interrupted, changes))
    assert job.checkpoint().endswith("checkpoint-3")


@pytest.mark.parametrize("text", ["a: [", "", "- 1", b"\xff\xfe"], ids=repr)
def test_a_damaged_recipe_is_named(interrupted, text):
    path = Path(interrupted["run_dir"], "resolved.yaml")
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged"):
        TrainJob.from_config(interrupted)


@pytest.mark.parametrize("resume", [True, False, None, 3, "maybe"])
def test_what_resume_may_be(interrupted, resume):
    with pytest.raises(ValueError, match=f"resume .*auto, never.* {resume!r}"):
        TrainJob.from_config({**interrupted, "resume": resume})


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("name", FINAL_WEIGHTS)
def test_a_finished_run_without_a_checkpoint_is_not_replaced(composed, tmp_path, resume, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} contains {name}.*run_dir"):
        TrainJob.from_config({**composed, "run_dir": str(tmp_path), "resume": resume})


def test_a_checkpoint_of_another_run_does_not_replace_a_run(interrupted, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(interrupted["run_dir"], other, dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"resume=.*other.*contains checkpoint-3"):
        TrainJob.from_config({**interrupted, "resume": f"{other}/checkpoint-3"})


# --- The content of the records


def records(folder, count=3):
    folder.mkdir(exist_ok=True)
    rows = text_pairs(count).to_list()
    for index, row in enumerate(rows):
        make_image(index).save(folder / f"{index}.png")
        row["images"] = [{"bytes": None, "path": str(folder / f"{index}.png")}]
        row["id"] = f"{folder}:{index}"
    return Dataset.from_list(rows, features=None).cast_column("images", [ImageFeature(decode=False)])


def test_content_is_of_values_not_of_places(tmp_path):
    """The folder and the ids of records do not count, nor how often a data set was selected from."""
    first, second = records(tmp_path / "a"), records(tmp_path / "b")
    assert content_of(first) == content_of(second)
    backwards = second.select([2, 1, 0])
    assert content_of(backwards) != content_of(first)
    assert content_of(backwards.select([2, 1, 0])) == content_of(first) == content_of(backwards.flatten_indices().select([2, 1, 0]))
    assert content_of(first.select([0, 1])) != content_of(first)
    assert content_of(first.to_iterable_dataset()) == content_of(second.to_iterable_dataset()) != content_of(first)
    assert content_of(backwards.to_iterable_dataset()) != content_of(first.to_iterable_dataset())


def test_content_changes_with_every_value(tmp_path):
    dataset = records(tmp_path / "a")
    found = {content_of(dataset)}
    rows = dataset.to_list()
    rows[1]["chosen"][0]["content"] += "!"
    found.add(content_of(Dataset.from_list(rows, features=dataset.features)))
    found.add(content_of(dataset.add_column("margin", [0.1, 0.2, 0.3])))
    found.add(content_of(dataset.add_column("margin", [0.1, 0.2, None])))
    make_image(9).save(tmp_path / "a" / "1.png")
    found.add(content_of(dataset))
    embedded = [[{"bytes": (tmp_path / "a" / f"{i}.png").read_bytes(), "path": None}] for i in range(3)]
    found.add(content_of(dataset.remove_columns("images").add_column("images", embedded)))
    embedded[0][0]["bytes"] = embedded[0][0]["bytes"][:-1] + b"?"
    found.add(content_of(dataset.remove_columns("images").add_column("images", embedded)))
    assert len(found) == 7
