"""`mpo sft`: three stages and MPO after them, resumption, adapters, plans, and what is refused before a model loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import composition
import pytest
import torch
import yaml
from safetensors.torch import load_file
from separate_parts import write_language, write_vision
from small_runs import difference
from support import make_image
from transformers import LlavaConfig

from mpo.commands import main
from mpo.models.family import INTERNVL_FUSER
from mpo.models.joining import save_joined
from mpo.models.loading import load_model
from mpo.training.job import TrainJob, run_train_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A joined model, twelve conversations of one and two turns, and pairs."""
    folder = tmp_path_factory.mktemp("sft")
    save_joined(write_vision(folder / "vit"), write_language(folder / "text"), folder / "joined", max_tiles=2)
    chats, pairs = [], []
    for index in range(12):
        make_image(index).save(folder / f"{index}.png")
        messages = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": f"It is {index}."}]
        more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes, it is."}]
        chats.append(json.dumps({"id": str(index), "images": [f"{index}.png"], "messages": messages + more * (index % 2)}))
        answers = {"chosen": f"It is {index}.", "rejected": "It is not that, I think."}
        pairs.append(json.dumps({"image": f"{index}.png", "question": "What is it?", **answers}))
    (folder / "chats.jsonl").write_text("\n".join(chats))
    (folder / "pairs.jsonl").write_text("\n".join(pairs))
    return folder


def words(folder: Path, run_dir: Path, *more: str, data: str = "chats.jsonl", rows: bool = True) -> list[str]:
    """The overrides of a run on a CPU whose steps are two packed rows of two conversations."""
    settings = ["use_cpu=true", "dataloader_num_workers=0", "gradient_checkpointing=false", "warmup_steps=0", "global_batch_size=2"]
    settings += ["max_tokens_per_batch=500", "learning_rate=1e-2"] if rows else []
    paths = [f"model.name_or_path={folder / 'joined'}", f"data.path={folder / data}", f"run_dir={run_dir}"]
    return [*paths, *(f"trainer.{setting}" for setting in settings), *more]


def composed(overrides: list[str], command: str = "sft") -> dict:
    return composition.composed(overrides, command)


def moved(before: Path, after: Path) -> set[str]:
    """The parts that differ, of those that were there before; a model with a fuser has its names on disk as in memory."""
    one, two = (
        {
            re.sub(r"^model\.|(?<=language_model\.)model\.|language_model\.(?=lm_head)", "", name): tensor
            for name, tensor in read.items()
        }
        for read in (load_file(path / "model.safetensors") for path in (before, after))
    )
    return {INTERNVL_FUSER.part_of(name) for name in one if not torch.equal(one[name], two[name])}


def losses(run_dir: Path) -> list[float]:
    return [log["loss"] for log in json.loads((run_dir / "trainer_state.json").read_text())["log_history"] if "loss" in log]


def test_three_stages_and_mpo(folder, tmp_path, capsys):
    """In each stage its parts alone move and the loss falls; `mpo train` goes on from the last one, in its run folder."""
    everything = {"vision", "projector", "language", "head"}
    before = folder / "joined"
    for stage, parts in {"stage1": {"projector"}, "stage1_5": {"vision", "projector"}, "stage2": everything}.items():
        run = tmp_path / stage
        more = [f"method=internvl2_5_{stage}", f"model.name_or_path={before}", "trainer.max_steps=12"]
        assert main(["sft", *words(folder, run, *more)]) == 0
        assert f"mpo sft: done. The trained model was saved to {run}" in capsys.readouterr().out
        assert moved(before, run) == parts
        found = losses(run)  # three steps an epoch
        assert len(found) == 12 and sum(found[-3:]) < sum(found[:3]), found
        before = run
    card = (run / "README.md").read_text()
    assert "2412.05271" in card and "SFT" in card and "- conversations: 12" in card and "- loss_average: square" in card
    after = words(folder, tmp_path / "mpo", "trainer.max_steps=1", data="pairs.jsonl", rows=False)
    assert main(["train", *after, f"model.name_or_path={run}", "trainer.learning_rate=1e-3"]) == 0
    assert moved(run, tmp_path / "mpo") == everything


def test_two_stages_of_mmfuser_and_mpo(folder, tmp_path, capsys):
    """Stage 1 adds the fuser and trains it with the projector, stage 2 the language model too; the loss falls, the tower stays."""
    before, learned = folder / "joined", {"projector", "language", "head"}
    for stage, parts, more in ((1, {"projector"}, ["fuser.layers=[1,2]"]), (2, learned | {"fuser"}, [])):
        run = tmp_path / str(stage)
        small = ["trainer.per_device_train_batch_size=2", "trainer.global_batch_size=4", "trainer.max_steps=12", *more]
        own = [word for word in words(folder, run, f"method=mmfuser_stage{stage}", *small) if "max_tokens" not in word]
        assert main(["sft", *own, f"model.name_or_path={before}"]) == 0
        assert moved(before, run) == parts
        found = losses(run)
        assert len(found) == 12 and sum(found[-3:]) < sum(found[:3]), found
        before = run
    tensors = load_file(tmp_path / "1" / "model.safetensors")
    assert next(tensor for name, tensor in tensors.items() if name.endswith("fuser.gamma1")).abs().max() > 1e-3
    after = words(folder, tmp_path / "mpo", "trainer.max_steps=1", "train_parts.vision=freeze", data="pairs.jsonl", rows=False)
    assert main(["train", *after, f"model.name_or_path={before}"]) == 0
    assert moved(before, tmp_path / "mpo") == learned | {"fuser"}
    capsys.readouterr()
    assert main(["sft", *own, f"model.name_or_path={before}", "fuser.layers=1", f"run_dir={tmp_path / 'twice'}"]) == 2
    assert re.search(r"already has a fuser of the layers \[1, 2\]", capsys.readouterr().err)
    for wrong, message in (
        (["fuser.layers=[2,1]"], r"fuser_layers.*\[2, 1\]"),
        (["fuser.fusion=concat"], "fuser.fusion=concat needs fuser.layers"),
        (["fuser.layers=1", "chat_template=plain"], "'plain' for a InternVLProcessor"),
        (["fuser.layer=1"], "layers"),
    ):
        assert main(["sft", *words(folder, tmp_path / "wrong", *wrong)]) == 2
        assert re.search(message, capsys.readouterr().err), wrong
    assert main(["sft", *words(folder, tmp_path / "dry", "fuser.layers=1", "fuser.fusion=concat", "dry_run=true")]) == 0
    assert re.search(r"projector +\S*\d", capsys.readouterr().out)
    stage = ["method=mmfuser_stage1", "fuser.layers=1", "fuser.fusion=concat", "trainer.max_steps=1"]
    for more, message in (
        (["lr.fuser=1e-4"], "lr.fuser=0.0001 .*internvl_mmfuser has layers that its projector fuses.*lr.fuser=null"),
        (["fuser.layers=null", "fuser.fusion=mmfuser"], "train_parts.fuser: a internvl has no fuser"),
        (["fuser.layers=null", "fuser.fusion=mmfuser", "train_parts.fuser=null", "lr.fuser=1"], "the internvl has no fuser"),
    ):
        assert main(["sft", *words(folder, tmp_path / "wrong", *stage, *more, "dry_run=true")]) == 2
        assert re.search(message, capsys.readouterr().err), more
    own = words(folder, tmp_path / "wide", *stage, "trainer.per_device_train_batch_size=2")
    assert main(["sft", *(word for word in own if "max_tokens" not in word)]) == 0
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    (name,) = [name for name in wide if name.endswith("multi_modal_projector.linear_1.weight")]
    narrow = next(tensor for other, tensor in tensors.items() if other.endswith("projector.linear_1.weight"))
    assert wide[name].shape[1] == 2 * narrow.shape[1] and not any("fuser" in name for name in wide)


def test_resumed_within_an_epoch_it_is_bitwise_the_same(folder, tmp_path, capfd):
    """Three steps an epoch; the run of four is cut after the second. Other settings, and another command, are refused by name."""
    more = [
        "method=internvl2_5_stage2",
        "drop_path=0.2",
        "trainer.max_steps=4",
        "trainer.save_steps=1",
        "trainer.save_total_limit=4",
    ]
    assert main(["sft", *words(folder, tmp_path / "whole", *more)]) == 0
    checkpoint = tmp_path / "again" / "checkpoint-2"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", checkpoint)
    shutil.copy(tmp_path / "whole" / "resolved.yaml", tmp_path / "again")
    capfd.readouterr()
    assert main(["sft", *words(folder, tmp_path / "again", *more, "--json")]) == 0
    (run,) = json.loads(capfd.readouterr().out)["runs"]
    assert run["resumed_from"] == str(checkpoint) and run["metrics"]["step"] == 4
    assert difference(*(load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))) == 0
    assert yaml.safe_load((tmp_path / "again" / "resolved.yaml").read_text())["task"] == "sft"
    for changed in (["sft", "trainer.loss_average=token"], ["sft", "trainer.train_on=last"]):
        assert main([changed[0], *words(folder, tmp_path / "again", *more, changed[1])]) == 2
        name, value = changed[1].split("=")
        assert re.search(rf'{name} = .* \(now "{value}"\)', capfd.readouterr().err)
    pairs = words(folder, tmp_path / "again", data="pairs.jsonl", rows=False)
    assert main(["train", *pairs]) == 2
    assert 'task = "sft" (now "train")' in capfd.readouterr().err


def test_an_adapter_and_mpo_after_it(folder, tmp_path, capsys):
    """`mpo sft peft=lora` saves an adapter, which `mpo train` takes once it is merged, as it does its own."""
    run, merged = tmp_path / "lora", tmp_path / "merged"
    assert main(["sft", *words(folder, run, "peft=lora", "peft.r=2", "trainer.max_steps=2")]) == 0
    assert (run / "adapter_model.safetensors").is_file()
    after = words(folder, tmp_path / "mpo", f"model.name_or_path={run}", data="pairs.jsonl", rows=False)
    capsys.readouterr()
    assert main(["train", *after]) == 2
    assert f"mpo export {run}" in capsys.readouterr().err
    assert main(["export", str(run), str(merged), "--no-check"]) == 0
    assert moved(folder / "joined", merged) == {"language"}
    assert main(["train", *after, f"model.name_or_path={merged}", "trainer.max_steps=1"]) == 0


def test_qlora(folder, tmp_path, monkeypatch):
    """It needs bitsandbytes, with which the language model alone is held in 4 bits; a fuser is trained whole beside the adapter."""
    base = load_model(str(folder / "joined"), fuser={"layers": 1, "num_heads": 2})
    base.model.save_pretrained(tmp_path / "base")
    base.processor.save_pretrained(tmp_path / "base")
    parts = [f"model.name_or_path={tmp_path / 'base'}", "train_parts.language=lora", "train_parts.fuser=train"]
    overrides = words(folder, tmp_path / "run", "peft=qlora", "peft.r=2", "trainer.max_steps=1", *parts)
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "bitsandbytes", None)
        with pytest.raises(ValueError, match=r"pip install 'mpo-trainer\[qlora\]'"):
            TrainJob.from_config(composed(overrides))
    pytest.importorskip("bitsandbytes")
    trainer = run_train_job(TrainJob.from_config(composed(overrides)))
    quantized = [name for name, module in trainer.model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert quantized and all("language_model" in name for name in quantized)
    saved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert next(tensor for name, tensor in saved.items() if name.endswith("fuser.gamma1")).any()


def test_a_plan_of_a_run(folder, tmp_path, capsys):
    """Rows, lengths and one conversation with its labels; chosen completions of pairs; evaluation data and samples."""
    chosen = [f"data.eval_path={folder / 'pairs.jsonl'}", "trainer.eval_strategy=steps"]
    for data, more in (("chats.jsonl", ["method=internvl2_5_stage1"]), ("pairs.jsonl", ["data.from_preferences=true", *chosen])):
        assert main(["sft", *words(folder, tmp_path / "run", *more, "dry_run=true", data=data)]) == 0
        page = capsys.readouterr().out
        assert "12 conversations; epochs: 1;" in page and "rows: packed" in page and "prompts counted" not in page
        assert "reference model" in page and "not needed by the losses" in page
        assert "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}It is 0." in page
    assert not list(tmp_path.rglob("resolved.yaml"))


def test_samples_while_training(folder, tmp_path):
    """To the first turns of the evaluation data, with their images alone; and the accuracy on questions, which chooses the best."""
    (tmp_path / "asked").mkdir()
    for index in range(2):
        shutil.copy(folder / f"{index}.png", tmp_path / "asked")
    asked = [
        {"id": str(index), "question": "What is it?", "image": f"{index}.png", "answer": "no such thing"} for index in range(2)
    ]
    (tmp_path / "asked" / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    chats = (folder / "chats.jsonl").read_text().splitlines()[1:2]
    (folder / "val.jsonl").write_text("\n".join(chats))
    more = [f"data.eval_path={folder / 'val.jsonl'}", "samples.every=1", "samples.max_new_tokens=2", "trainer.max_steps=1"]
    more += [
        f"samples.questions={tmp_path / 'asked' / 'questions.jsonl'}",
        "samples.mode=cot",
        "trainer.metric_for_best_model=accuracy",
    ]
    assert main(["sft", *words(folder, tmp_path / "run", *more, "trainer.eval_strategy=steps", "trainer.eval_steps=1")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {line["prompt"] for line in lines} == {"<image>What is it?"} and {line["step"] for line in lines} == {0, 1}
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in log for log in history)
    [log] = [log for log in history if "eval_accuracy" in log]
    assert log["eval_accuracy"] == 0 < log["eval_accuracy_high"] < 1


def test_a_mixture(folder, tmp_path, capfd):
    """Conversations, twice, and the chosen completions of pairs, with an evaluation part; the run and its plan count records."""
    own = [{"path": str(folder / "chats.jsonl"), "repeat_time": 2}]
    own += [{"path": str(folder / "pairs.jsonl"), "from_preferences": True, "cap": 5, "image_root": str(folder)}]
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sources": own, "eval_size": 4, "eval_by": "image"}))
    mixture = ["data=mixture", f"data.mix={tmp_path / 'mix.yaml'}", "trainer.eval_strategy=epoch", "samples.count=0"]
    plain = [word for word in words(folder, tmp_path / "run") if not word.startswith("data.path")]
    assert main(["sft", *plain, *mixture, "dry_run=true"]) == 0
    plan = capfd.readouterr().out
    assert main(["sft", *plain, *mixture]) == 0
    said = capfd.readouterr()
    logged = (tmp_path / "run" / "sft.log").read_text()
    count = int(re.search(r"Batches: (\d+) records in", logged)[1])
    assert f"{count} conversations;" in plan and f"batches: {count} records in" in plan and "pairs in" not in plan + said.err
    table = re.findall(r"^(chats|pairs|in all) +(\d+) +(\d+) +\S+ +(\d+)$", logged, re.MULTILINE)
    by_name = {name: tuple(map(int, counts)) for name, *counts in table}
    assert by_name["chats"][1] == 2 * by_name["chats"][0] and by_name["pairs"][1] <= 5 and by_name["in all"][1:] == (count, 4)
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in one for one in log)


def test_batches_of_a_number_of_conversations(folder, tmp_path):
    """As `mpo sft --help` has it: the budgets of tokens are not for them."""
    more = ["trainer.batching=conversations", "trainer.per_device_train_batch_size=2", "trainer.global_batch_size=4"]
    config = composed([*words(folder, tmp_path / "run", rows=False), *more])
    args = TrainJob.from_config(config).planned_arguments()
    assert (args.max_tokens_per_batch, args.max_tiles_per_batch, args.gradient_accumulation_steps) == (None, None, 2)


def test_a_run_folder_without_a_model(folder, tmp_path, capsys):
    """A stage that was interrupted: its checkpoint is named."""
    (tmp_path / "unfinished").mkdir()
    shutil.copytree(folder / "joined", tmp_path / "unfinished" / "checkpoint-4")
    assert main(["sft", *words(folder, tmp_path / "run"), f"model.name_or_path={tmp_path / 'unfinished'}"]) == 2
    assert f"{tmp_path}/unfinished has no config.json" in (error := capsys.readouterr().err) and "checkpoint-4" in error


@pytest.mark.slow
def test_two_ranks_train_as_one_process(folder, tmp_path, interpreter):
    """A step has two packed rows in both. `mpo sft` starts the ranks. SGD, as AdamW's first steps magnify what sums round."""
    same = ["trainer.max_steps=3", "trainer.optim=sgd", "trainer.learning_rate=0.1"]
    assert main(["sft", *words(folder, tmp_path / "1", *same)]) == 0
    launch = [interpreter, "-m", "mpo", "sft", *words(folder, tmp_path / "2", *same, "launch.nproc_per_node=2")]
    done = subprocess.run(launch, env={**os.environ, "PYTHON_EXEC": interpreter}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_file(tmp_path / ranks / "model.safetensors") for ranks in "12")
    assert difference(one, load_file(folder / "joined" / "model.safetensors")) > 1e-3
    assert difference(one, two) < 1e-5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.loss_averag=token", "Did you mean 'loss_average'"),
        ("trainer.beta=0.1", "'beta' in trainer"),
        ("trainer.loss_average=tokens", "loss_average .*'tokens'"),
        ("trainer.train_on=7", "train_on .*7"),
        ("trainer.max_length=100", "max_length=100 .*max_tokens_per_batch"),
        ("trainer.oversized=drop", "oversized .*'drop'"),
        ("trainer.packing_strategy=wrapped", "packing_strategy"),
        ("trainer.batching=conversations", "max_tokens_per_batch"),
        ("trainer.gradient_accumulation_steps=2", "gradient_accumulation_steps .*global_batch_size=null"),
        ("launch.nproc_per_node=4", "global_batch_size=2 .*1 packed row x 4 ranks"),
        ("loss=dpo", "trainer.loss_average"),
        ("data.from_preferences=1", "data.from_preferences .*true or false"),
        ("data.from_preference=true", "Did you mean 'from_preferences'"),
        ("task=pretrain", "train, sft.*'pretrain'"),
        ("train_parts={vision: freeze, projector: freeze, language: freeze, head: freeze}", "train_parts"),
        ("launch=fsdp2", "launch=fsdp2.* launch=ddp"),
        ("peft.r=8", "peft.r needs peft=lora"),
        ("drop_path=1", "drop_path .*1; got 1"),
        ("trainer.parallelism_config={cp_size: 2}", "parallelism_config"),
    ],
)
def test_refusals_before_anything_loads(folder, tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        TrainJob.from_config(composed([*words(folder, tmp_path / "run", override), "model.name_or_path=/nowhere"]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.eval_path=b.jsonl", "samples.count=0"], "data.eval_path .*eval_strategy=no"),
        (["data.eval_path=b.jsonl", "samples.path=c.jsonl"], "data.eval_path .*eval_strategy=no"),
        (["peft=lora", "train_parts.language=lora", "train_parts.projector=train"], "train_parts.projector=train.*no such part"),
        (["peft=lora", "train_parts.language=lora", "train_parts.vision=lora"], "train_parts.vision=lora.*no such part"),
    ],
)
def test_what_would_be_ignored(folder, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        TrainJob.from_config(composed([*words(folder, tmp_path / "run", *overrides), f"model.name_or_path={folder / 'text'}"]))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sft", "model=internvl2_5_8b"], ("method=internvl2_5 ", "mpo train", "method=internvl2_5_stage2")),
        (["sft", "experiment=internvl3_1b_lora"], ("method=internvl3 ", "mpo train", "method=none")),
        (["train", "method=internvl2_5_stage2"], ("method=internvl2_5_stage2 ", "mpo sft", "method=internvl3_5")),
        (["sft", "method=internvl2_5_stage3"], ("'internvl2_5_stage2'",)),
        (["sft", "task=train"], ("task=train", "mpo sft")),
    ],
)
def test_a_method_of_the_other_command(arguments, named, capsys):
    assert main([*arguments, "data.path=x"]) == 2
    error = capsys.readouterr().err
    assert all(name in error for name in named) and "Traceback" not in error


def test_experiments_with_a_method_of_this_command(capsys):
    """As --help says of them."""
    for name in ("internvl3_1b_lora", "small_gpu_24gb"):
        assert composed(["method=none", f"experiment={name}"])["model"]["name_or_path"].startswith("OpenGVLab/InternVL3-")
    assert main(["sft", "--help"]) == 0
    assert re.search(r"each\s+with method=", capsys.readouterr().out)


def test_records_that_do_not_fit(folder, tmp_path, capsys):
    """Before the first step: the longest is named, and what makes it fit; in its own row it is trained."""
    small = ["trainer.max_tokens_per_batch=20", "trainer.max_steps=1"]
    assert main(["sft", *words(folder, tmp_path / "run", *small)]) == 2
    error = capsys.readouterr().err
    assert (
        "max_tokens_per_batch=20" in error and "12 of 12" in error and "oversized=own_row" in error and "completions" not in error
    )
    assert main(["sft", *words(folder, tmp_path / "own", *small, "trainer.oversized=own_row")]) == 0


def test_help(capsys):
    """It lists the groups and methods of this command alone, and the stages one after another."""
    assert main(["sft", "--help"]) == 0
    said = capsys.readouterr().out
    for text in ("internvl2_5_stage2, mmfuser_stage1, mmfuser_stage2, none", "mpo join", "loss_average: square"):
        assert text in said
    assert not re.search(r"^loss:|bco|pairs, ", said.split("The configuration")[0], re.MULTILINE)


STAGES = {  # learning rate, packed rows a step, weight decay, warm-up, epochs, drop path; FACTS of table 3
    "stage1": {"8b": (2e-4, 512, 0.05, 100, 1, 0.0), "1b": (2e-4, 512, 0.01, 100, 1, 0.0), "26b": (2e-4, 512, 0.05, 100, 1, 0.0)},
    "stage1_5": {"8b": (1e-5, 1024, 0.05, 100, 1, 0.1), "26b": (1e-5, 1024, 0.05, 100, 1, 0.4)},
    "stage2": {
        "1b": (4e-5, 512, 0.01, 0.03, 4, 0.1),
        "2b": (4e-5, 512, 0.01, 0.03, 4, 0.1),
        "4b": (4e-5, 512, 0.01, 0.03, 2, 0.1),
        "8b": (4e-5, 512, 0.05, 0.03, 1, 0.1),
        "26b": (2e-5, 512, 0.05, 0.03, 1, 0.4),
        "38b": (2e-5, 512, 0.05, 0.03, 1, 0.4),
        "78b": (2e-5, 512, 0.05, 0.03, 1, 0.4),
    },
}


@pytest.mark.parametrize("size, fuser", [("7b", None), ("13b", 1e-4)])
def test_numbers_of_mmfuser(size, fuser, tmp_path):
    """The official scripts (scripts/mmfuser): 32 and 16 conversations on each of 8 GPUs; only 13B has a rate for the fuser."""
    stages = ((1, 1e-3, 256, "freeze", "plain", fuser), (2, 2e-5, 128, "train", "vicuna", None))
    for stage, rate, batch, language, template, own in stages:
        chosen = [f"model=llava1_5_vicuna{size}", f"method=mmfuser_stage{stage}", "data.path=x", f"run_dir={tmp_path}"]
        job = TrainJob.from_config(composed([*chosen, "dry_run=true", "trainer.use_cpu=true"]))
        args = job.planned_arguments()
        assert args.gradient_accumulation_steps * args.per_device_train_batch_size == batch
        assert (args.learning_rate, args.weight_decay, args.warmup_steps, args.num_train_epochs) == (rate, 0, 0.03, 1)
        assert (args.lr_scheduler_type, args.loss_average, args.fuser_learning_rate) == ("cosine", "token", own)
        parts = {"vision": "freeze", "fuser": "train", "projector": "train", "language": language, "head": language}
        assert (job.parts(), job.chat_template) == (parts, template)
        assert job.fuser["layers"] == (4 if stage == 1 else None)


def test_concatenated_layers_of_13b_have_no_rate(tmp_path, capsys):
    """The fuser's learning rate is in the recipe: the message says how to take it out, before anything is loaded."""
    LlavaConfig().save_pretrained(tmp_path / "base")
    chosen = ["model=llava1_5_vicuna13b", "method=mmfuser_stage1", "data.path=x", f"run_dir={tmp_path / 'run'}", "fuser.layers=2"]
    chosen += [f"model.name_or_path={tmp_path / 'base'}", "fuser.fusion=concat", "trainer.use_cpu=true"]
    assert main(["sft", *chosen]) == 2
    assert "lr.fuser=0.0001 has no effect" in capsys.readouterr().err
    TrainJob.from_config(composed([*chosen, "lr.fuser=null"]))


@pytest.mark.parametrize("stage", STAGES)
def test_numbers_of_the_stages(stage, tmp_path):
    """Table 3 of the paper and the official scripts, for each size."""
    for size, (rate, rows, decay, warmup, epochs, drop_path) in STAGES[stage].items():
        chosen = [f"model=internvl2_5_{size}", f"method=internvl2_5_{stage}", "data.path=x", f"run_dir={tmp_path}", "dry_run=true"]
        config = composed([*chosen, "trainer.use_cpu=true"])
        job = TrainJob.from_config({**config, "model": {**config["model"], "name_or_path": "somewhere"}})
        args = job.planned_arguments()
        found = (args.learning_rate, args.gradient_accumulation_steps, args.weight_decay, args.warmup_steps, args.num_train_epochs)
        assert (*found, args.vision_drop_path) == (rate, rows, decay, warmup, epochs, drop_path)
        assert (args.max_tokens_per_batch, args.max_tiles_per_batch, args.loss_average) == (16384, 48, "square")
        assert args.lr_scheduler_type == "cosine" and job.model["max_tiles"] == 12
