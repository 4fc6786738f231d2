"""`mpo train`: help, composition of every recipe, errors, a run, its resumption, a sweep."""

import copy
import gc
import inspect
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from composition import composed
from official_checkpoints import write_official
from support import make_image

from mpo.commands import main
from mpo.commands.train import _report
from mpo.data import load_conversations, load_preferences
from mpo.models.family import INTERNVL
from mpo.models.loading import load_model
from mpo.preflight.structure import build_structure, count_parameters
from mpo.training import schema
from mpo.training.job import GROUPS, OPTIONAL, TrainJob, run_train_job
from mpo.training.launch.place import KEYS
from mpo.training.schema import hints


@pytest.fixture(scope="module")
def model(tmp_path_factory, processor):
    from mpo.models.small import small_internvl

    folder = tmp_path_factory.mktemp("model")
    small_internvl(processor, hidden_size=32, vision_hidden_size=32).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for index in range(6):
        make_image(index).save(folder / f"{index}.png")
        completions = {"chosen": f"It is {index}.", "rejected": f"It is not {index}, I think."}
        lines.append(json.dumps({"image": f"{index}.png", "question": "What is it?", **completions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.fixture
def arguments(model, pairs, tmp_path):
    return [
        f"model.name_or_path={model}",
        f"data.path={pairs}",
        f"run_dir={tmp_path / 'run'}",
        "trainer.global_batch_size=3",
        "trainer.use_cpu=true",
        "trainer.dataloader_num_workers=0",
    ]


@pytest.fixture(scope="module")
def nowhere(pairs, tmp_path_factory):
    """The configuration of a run whose model does not exist. It is not changed."""
    paths = ["model.name_or_path=/nowhere", f"data.path={pairs}", f"run_dir={tmp_path_factory.mktemp('run') / 'run'}"]
    return composed([*paths, "trainer.global_batch_size=3", "trainer.use_cpu=true", "trainer.dataloader_num_workers=0"])


@pytest.mark.parametrize(
    "choices, trained",
    [
        (["train_parts.vision=freeze", "train_parts.head=freeze"], {"projector", "language"}),
        (["train_parts.vision=1", "train_parts.language=freeze", "train_parts.head=freeze"], {"vision", "projector"}),
        (["peft=lora", "train_parts.vision=lora", "train_parts.language=lora"], {"vision", "language"}),
        (["peft=lora", "train_parts.language=lora", "train_parts.projector=train"], {"projector", "language"}),
    ],
)
def test_parts_of_the_model(arguments, choices, trained):
    """The run trains the parts of the recipe, and a dry run reports the same."""
    rates = [f"lr.{part}=1e-3" for part in trained]
    job = TrainJob.from_config(composed([*arguments, *choices, *rates]))
    trainer = run_train_job(job)
    named = dict(trainer.model.named_parameters())
    assert {INTERNVL.part_of(name) for name, parameter in named.items() if parameter.requires_grad} == trained
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}  # where the schedule ended
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-3}
    counted = sum(count for _, count in count_parameters(build_structure(job).model).values())
    assert counted == sum(parameter.numel() for parameter in named.values() if parameter.requires_grad)


def test_an_official_checkpoint(arguments, tmp_path):
    """A recipe loads a checkpoint in the official format."""
    official = write_official(tmp_path / "official", "internlm2")
    job = TrainJob.from_config(composed([*arguments, f"model.name_or_path={official}", "trainer.max_steps=1", "drop_path=0.1"]))
    trainer = run_train_job(job)
    assert trainer.state.global_step == 1
    assert (Path(job.run_dir) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.learning_rat=1", "Did you mean 'learning_rate'"),
        ("seeds=1", "Did you mean 'seed'"),
        ("model.max_tile=3", "Did you mean 'max_tiles'"),
        ("data.pathh=x", "Did you mean 'path'"),
        ("loss.betta=1", "Did you mean 'beta'"),
        ("loss.loss_type=[sigmoid,bco,sft]", "Did you mean 'bco_pair'"),
        ("loss.loss_weights=[1.0]", "1 numbers for the 3 losses"),
        ("loss.label_smoothing=0.1", "no effect"),
        ("peft.r=8", "peft.r needs peft=lora"),
        ("peft.kind=loora", "Did you mean 'lora'"),
        ("trainer.output_dir=x", "trainer.output_dir .* run_dir"),
        ("trainer.beta=0.2", "trainer.beta .* loss.beta"),
        ("trainer.global_batch_size=7", None),
        ("trainer.per_device_train_batch_size=2", "trainer.global_batch_size=3 .*trainer.per_device_train_batch_size=2"),
        ("trainer.gradient_accumulation_steps=2", "trainer.gradient_accumulation_steps .*global_batch_size=null"),
        ("trainer.batching=tokens", "global_batch_size=[0-9]+ .*batching=tokens.*gradient_accumulation_steps"),
        ("launch=fsdp2", "launch=fsdp2.* launch=ddp"),
        ("launch=zero3", "pip install deepspeed"),
        ("launch.nproc_per_node=0", "launch.nproc_per_node .* got 0"),
        ("launch.nproc_per_nod=2", "Did you mean 'nproc_per_node'"),
        ("launch.nproc_per_node=2", "trainer.global_batch_size=3 .* 2 ranks"),
        ("resume=somewhere", "resume .* got 'somewhere'"),
        ("data.path=???", "data.path=..."),
        ("model._target_=mpo.models.nothing", "model._target_ .*mpo.models.nothing"),
    ],
)
def test_refusals_before_anything_loads(arguments, override, message, monkeypatch):
    """With the model's path pointing nowhere, a load would fail with another error."""
    config = composed([*arguments, "model.name_or_path=/nowhere", override])
    if message is None:
        TrainJob.from_config(config)
    else:
        with pytest.raises(ValueError, match=message):
            TrainJob.from_config(config)
        if "batching" in override:
            with pytest.raises(ValueError, match=message):
                TrainJob.from_config({**config, "dry_run": True})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=x", "trainer.max_steps .*whole number.* 'x'"),
        ("trainer.max_steps=2.5", "trainer.max_steps .*2.5"),
        ("trainer.learning_rate=fast", "trainer.learning_rate .*number.* 'fast'"),
        ("trainer.learning_rate=[0.1]", r"trainer.learning_rate .*\[0.1\]"),
        ("trainer.use_cpu=5", "trainer.use_cpu .*true or false.* 5"),
        ("trainer.global_batch_size=0", "trainer.global_batch_size .*1; got 0"),
        ("trainer.per_device_train_batch_size=0", "trainer.per_device_train_batch_size .*1; got 0"),
        ("loss.beta=null", "loss.beta .*number.* None"),
        ("loss.loss_type=7", "loss.loss_type .*7"),
        ("data.limit=abc", "data.limit .*whole number or null.* 'abc'"),
        ("data.limit=-1", "data.limit .*1; got -1"),
        ("data.max_bad_fraction=2", "data.max_bad_fraction .*1; got 2"),
        ("data.tiles.max=many", "data.tiles.max .*'many'"),
        ("data.tiles.mux=1", "Did you mean 'max'"),
        ("data.tiles=3", "data.tiles .*group of keys.* 3"),
        ("data.num_proc=0", "data.num_proc .*got 0"),
        ("model.max_tiles=0", "model.max_tiles .*1; got 0"),
        ("model.thumbnail=maybe", "model.thumbnail .*true or false.* 'maybe'"),
        ("lr.vision=fast", "lr.vision .*number or null.* 'fast'"),
        ("lr.vision=-1", "lr.vision .*0; got -1"),
        ("lr.visio=1e-6", "Did you mean 'vision'"),
        ("drop_path=1", "drop_path .*1; got 1"),
        ("seed=one", "seed .*whole number.* 'one'"),
        ("seed=true", "seed .*True"),
        ("launch.nnodes=two", "launch.nnodes .*whole number.* 'two'"),
        ("launch.master_port=70000", "launch.master_port .*65535; got 70000"),
        ("samples.count=-1", "samples.count .*0; got -1"),
        ("samples.coun=1", "Did you mean 'count'"),
        ("samples.mode=both", "samples.mode .*direct.*'both'"),
        ("samples.questions=q.jsonl", "samples.questions .*eval_strategy"),
        ("trainer.eval_strategy=steps", "trainer.eval_strategy=steps .*data.eval_path"),
        ("dry_run_gpu_gb=big", "dry_run_gpu_gb .*number.* 'big'"),
        ("model=3", "model .*group of keys.* 3"),
    ],
)
def test_a_value_of_another_type_is_named(nowhere, override, message):
    config = copy.deepcopy(nowhere)
    key, value = override.split("=", 1)
    place = config
    *groups, last = key.split(".")
    for group in groups:
        if place.get(group) is None:
            place[group] = {}
        place = place[group]
    place[last] = yaml.safe_load(value)
    with pytest.raises(ValueError, match=message):
        TrainJob.from_config(config)


def test_the_keys_of_a_job_are_the_arguments_of_what_it_calls():
    loading = inspect.signature(load_preferences).parameters
    renamed = {"meta", "mix", "eval_path", "eval_image_root", "eval_split", "eval_format"}
    assert set(hints(schema.Data)) - renamed == set(loading)
    own = set(inspect.signature(load_conversations).parameters) - set(loading) - {"settings"}  # which are those of the other
    assert set(hints(schema.Conversations)) - set(hints(schema.Data)) == own == {"from_preferences"}
    elsewhere = {"quantization_config", "fuser", "chat_template"}  # keys of the job itself, for any model
    assert set(hints(schema.Model)) - {"_target_"} == set(inspect.signature(load_model).parameters) - elsewhere
    assert set(hints(schema.Launch)) == set(KEYS)
    assert {field.name for field in fields(TrainJob)} == {*hints(schema.Job), *GROUPS, *OPTIONAL}


@pytest.mark.parametrize(
    "settings", [{"r": 0}, {"r": "8"}, {"lora_alpha": "x"}, {"lora_dropout": 1.5}, {"bias": "some"}, {"target_modules": 3}]
)
def test_a_setting_of_an_adapter_of_another_type_is_named(arguments, settings):
    config = composed([*arguments, "model.name_or_path=/nowhere", "peft=lora"])
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=f"peft.{name} .*got {value!r}"):
        TrainJob.from_config({**config, "peft": {**config["peft"], **settings}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train_parts.language=lora", "peft.target_modules=[q_proj]"], "train_parts and peft.target_modules"),
        (["train_parts.vision=freeze"], "adapts no part"),
        (["peft.task_type=CAUSAL_LM"], "'task_type' in peft"),
        (["trainer.trust_remote_code=true"], "trainer.trust_remote_code .* model.trust_remote_code"),
        (["trainer.model_init_kwargs={dtype: float32}"], "trainer.model_init_kwargs .* the keys of model"),
    ],
)
def test_adapters_that_contradict_themselves(arguments, overrides, message):
    with pytest.raises(ValueError, match=message):
        TrainJob.from_config(composed([*arguments, "model.name_or_path=/nowhere", "peft=lora", *overrides]))


def test_where_adapters_go(arguments):
    """By default every projection outside of the vision tower; modules_to_save of the recipe and of train_parts are combined."""
    asked = ["peft=lora", "train_parts.projector=train", "train_parts.language=lora", "peft.modules_to_save=[embed_tokens]"]
    adapter = TrainJob.from_config(composed([*arguments, "model.name_or_path=/nowhere", *asked])).adapter()
    assert set(adapter.modules_to_save) == {"embed_tokens", "multi_modal_projector"}
    plain = TrainJob.from_config(composed([*arguments, "model.name_or_path=/nowhere", "peft=lora"])).adapter()
    assert re.fullmatch(plain.target_modules, "model.layers.0.self_attn.q_proj")
    assert not re.fullmatch(plain.target_modules, "model.vision_tower.encoder.layer.0.attention.q_proj")


@pytest.mark.parametrize(
    ("override", "name", "near"),
    [
        ("loss=mpoo", "loss/mpoo", "'mpo'"),
        ("model=internvl3_8", "model/internvl3_8", "'internvl3_8b'"),
        ("experiment=internvl3_8b_lor", "experiment/internvl3_8b_lor", "'internvl3_8b_lora'"),
        ("experiment=nothing", "experiment/nothing", "mpo train --help"),
    ],
)
def test_unknown_option_of_a_group(override, name, near, capsys):
    assert main(["train", override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mpo: error:")
    assert name in error and near in error and "Traceback" not in error


def test_errors_are_one_message(arguments, capsys):
    assert main(["train", *arguments, "trainer.learning_rat=1"]) == 2
    error = capsys.readouterr().err
    assert "mpo: error: Unknown key 'learning_rat' in trainer. Did you mean 'learning_rate'?" in error
    assert "Traceback" not in error and gc.isenabled()


def run_mpo(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", "from mpo.commands import main; raise SystemExit(main())", *words], capture_output=True, text=True
    )


def test_help_teaches():
    """It lists the groups with their options, sizes of a family in one word, and example commands."""
    shown = run_mpo("train", "--help")
    assert shown.returncode == 0
    assert "internvl3_{1b,2b,8b,9b,14b,38b,78b}" in shown.stdout
    assert max(map(len, shown.stdout.split("The configuration")[0].splitlines())) <= 132
    for text in ("loss: bco", "peft: lora, none, qlora", "mpo train experiment=", "pairs.jsonl", "learning_rate"):
        assert text in shown.stdout
    assert "train" in run_mpo("--help").stdout


def test_cfg_job():
    shown = run_mpo("train", "--cfg", "job", "loss=dpo", "trainer.adam_beta2=0.95")
    config = yaml.safe_load(shown.stdout)
    assert config["loss"]["loss_type"] == ["sigmoid"]
    assert config["trainer"]["adam_beta2"] == 0.95


def test_a_run_without_data_is_refused_before_torch_is_imported():
    """Imports are most of the time to the message."""
    code = "import sys; from mpo.commands import main; status = main(['train']); print(status, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.stdout.split() == ["2", "False"]
        and done.stderr == "mpo: error: data.path is not set. Add data.path=... to the command.\n"
    )


def test_a_run_that_does_not_begin_says_nothing_of_its_folder(arguments, tmp_path, capsys):
    assert main(["train", *arguments, f"data.path={tmp_path / 'gone.jsonl'}"]) == 2
    said = capsys.readouterr()
    assert "gone.jsonl" in said.err and not said.out


@pytest.mark.slow
def test_a_run_and_its_resumption(arguments, pairs, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", *arguments, "trainer.max_steps=2", "trainer.save_steps=1"]) == 0
    assert yaml.safe_load((run / "resolved.yaml").read_text())["trainer"]["max_steps"] == 2
    assert {"model.safetensors", "processor_config.json", "trainer_state.json", "resolved.yaml"} <= {p.name for p in run.iterdir()}
    capsys.readouterr()
    # An incomplete checkpoint of a killed run is ignored.
    (run / "checkpoint-9").mkdir()
    assert main(["train", *arguments, "trainer.max_steps=3", "trainer.save_steps=1"]) == 0
    assert f"resuming from {run / 'checkpoint-2'}" in capsys.readouterr().out
    state = json.loads((run / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2, 3]
    assert main(["train", *arguments, "resume=never"]) == 2
    assert "resume=never, but" in capsys.readouterr().err
    # Other records of equal number, found once they are loaded; resolved.yaml stays that of the run.
    resolved = (run / "resolved.yaml").read_text()
    other = pairs.with_name("other.jsonl")
    other.write_text(pairs.read_text().replace("I think", "I guess"))
    assert main(["train", *arguments, "trainer.max_steps=4", f"data.path={other}"]) == 2
    assert "content of the data set = " in capsys.readouterr().err
    assert main(["train", *arguments, "trainer.max_steps=4", "loss=dpo", "trainer.learning_rate=1e-3"]) == 2
    error = capsys.readouterr().err
    assert "loss.loss_type = " in error and "trainer.learning_rate = 5e-06 (now 0.001)" in error
    assert (run / "resolved.yaml").read_text() == resolved


@pytest.mark.slow
def test_lora_saves_an_adapter(arguments, tmp_path):
    assert main(["train", *arguments, "peft=lora", "peft.r=2", "trainer.max_steps=1"]) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_qlora_trains_an_adapter_on_four_bits(arguments, model, tmp_path, capsys):
    """The language model's linear layers are held in 4 bits; vision tower and head are not; the adapter is saved."""
    from mpo.training.job import run_train_job

    config = composed([*arguments, "peft=qlora", "peft.r=2", "trainer.max_steps=2"])
    trainer = run_train_job(TrainJob.from_config(config))
    kinds = {name: type(module).__name__ for name, module in trainer.model.named_modules()}
    in_four_bits = [name for name, kind in kinds.items() if kind == "Linear4bit"]
    assert in_four_bits
    assert all("language_model" in name for name in in_four_bits)
    assert trainer.ref_model is None
    assert trainer.state.log_history[0]["loss/sigmoid"] == pytest.approx(0.693147, abs=1e-5)
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_qlora_without_bitsandbytes_is_refused(arguments, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'mpo-trainer\[qlora\]'"):
        TrainJob.from_config(composed([*arguments, "peft=qlora"]))


@pytest.mark.slow
def test_a_sweep(arguments, tmp_path):
    assert main(["train", "-m", *arguments, "trainer.max_steps=1", "loss=dpo,sft"]) == 0
    losses = [yaml.safe_load((tmp_path / "run" / n / "resolved.yaml").read_text())["loss"]["loss_type"] for n in ("0", "1")]
    assert losses == [["sigmoid"], ["sft"]]
    assert (tmp_path / "run" / "1" / "model.safetensors").is_file()


@pytest.mark.parametrize("subdir", [".", "${loss.beta}", "same"])
def test_a_sweep_into_one_folder_is_refused(arguments, tmp_path, subdir, capsys):
    """Before its first job runs."""
    assert main(["train", "-m", *arguments, f"hydra.sweep.subdir={subdir}", "trainer.max_steps=1,2"]) == 2
    error = capsys.readouterr().err
    assert "hydra.sweep.subdir" in error and str(tmp_path / "run") in error and "max_steps=2" in error
    assert not list(tmp_path.rglob("resolved.yaml"))


def test_json_and_a_run_with_nothing_left_to_train(arguments, tmp_path, capfd):
    """The document alone is on stdout. Three pairs a step: of two steps, the second is where the same command goes on and ends."""
    words = ["train", *arguments, "trainer.max_steps=2", "trainer.save_steps=2", "trainer.logging_steps=1", "--json"]
    found = []
    for _ in range(2):
        assert main(words) == 0
        out, err = capfd.readouterr()
        (run,) = json.loads(out)["runs"]
        found.append(run)
        assert ("nothing was left to train" in err) == (run["resumed_from"] is not None)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert [run["resumed_from"] for run in found] == [None, str(checkpoint)]
    assert all(run["run_dir"] == str(tmp_path / "run") and run["metrics"]["step"] == 2 for run in found)
    assert found[0]["metrics"]["loss"] == found[1]["metrics"]["loss"] > 0
    assert main(["train", *arguments, "dry_run=true", "--json"]) == 0
    assert "Parameters" in json.loads(capfd.readouterr().out)["runs"][0]["dry_run"]


@pytest.mark.parametrize(("rates", "set_rate", "done"), [([0.0], 1e-5, False), ([0.0], 0.0, True), ([0.0, 1e-5], 1e-5, True)])
def test_a_run_whose_only_step_had_the_rate_0_is_not_done(tmp_path, capsys, rates, set_rate, done):
    """A rate of 0 that was set, beside rates of parts, is no warm-up."""
    log = [{"learning_rate": rate, "step": step} for step, rate in enumerate(rates, 1)]
    state = {"global_step": len(rates), "max_steps": len(rates), "log_history": log}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    job = SimpleNamespace(run_dir=str(tmp_path), task="train", trainer={"learning_rate": set_rate})
    _report(job, None, -1)
    said = capsys.readouterr().out
    assert ("done" in said, "nothing was trained" in said) == (done, not done)
