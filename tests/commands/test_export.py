"""`mpo export`: from a run folder to a folder to serve; its output and its errors."""

import json

import pytest
from official_checkpoints import write_official
from support import make_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mpo.commands import main
from mpo.generation.generator import Request
from mpo.generation.local import LocalGenerator


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for index in range(4):
        make_image(index).save(folder / f"{index}.png")
        completions = {"chosen": f"It is {index}.", "rejected": f"It is not {index}, I think."}
        lines.append(json.dumps({"image": f"{index}.png", "question": "What is it?", **completions}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = write_official(tmp_path_factory.mktemp("official") / "official", "qwen2")
    (folder / "modeling_internvl_chat.py").write_text("# code\n")
    return folder


def train(official, pairs, run, *choices) -> None:
    settings = [
        f"model.name_or_path={official}",
        f"data.path={pairs}",
        f"run_dir={run}",
        "trainer.global_batch_size=2",
        "trainer.learning_rate=1e-2",
        "trainer.max_steps=2",
        "trainer.lr_scheduler_type=constant",
        "trainer.use_cpu=true",
        "trainer.dataloader_num_workers=0",
    ]
    assert main(["train", *settings, *choices]) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory, official, pairs):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(official, pairs, folder, "peft=lora", "train_parts.language=lora", "train_parts.projector=train")
    return folder


def test_a_run_is_served(run, official, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "float32", "--shard-gb", "0.0001"]) == 0
    said = capsys.readouterr().out
    files = len(list((tmp_path / "out").glob("*.safetensors")))
    assert files > 1
    assert f"tensors in transformers' format, float32, 0.00 GB in {files} files" in said
    assert f"The adapter is merged into {official}." in said
    assert "Logits differ from the trained model's by" in said and "The adapter changes the base model's logits by" in said
    assert "Both models respond " in said
    assert f"vllm serve {tmp_path / 'out'}" in said
    generator = LocalGenerator(
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    )
    (responses,) = generator.generate([Request.ask("What is it?", images=[make_image(0)])], temperature=0, max_new_tokens=4)
    assert len(responses) == 1


def test_the_official_form(run, official, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--output-format", "official", "--dtype", "bfloat16"]) == 0
    said = capsys.readouterr().out
    assert "in the official format, bfloat16" in said and "Logits of both formats agree to" in said
    assert "times the effect of rounding to bfloat16" in said
    assert f"lmdeploy serve api_server {tmp_path / 'out'}" in said and "--trust-remote-code" in said
    assert "Python files" not in said
    (official / "modeling_internvl_chat.py").rename(tmp_path / "modeling_internvl_chat.py")
    try:
        assert main(["export", str(run), str(tmp_path / "without"), "--output-format", "official", "--no-check"]) == 0
    finally:
        (tmp_path / "modeling_internvl_chat.py").rename(official / "modeling_internvl_chat.py")
    said = capsys.readouterr().out
    assert "Python files" in said and "--like DIR" in said
    assert "was not checked" in said


def test_json(run, official, tmp_path, capfd):
    """Of export and convert: one document and nothing else."""
    assert main(["export", str(run), str(tmp_path / "out"), "--no-check", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["form"], found["base"], found["comparison"], found["qlora"]) == ("transformers", str(official), None, False)
    assert main(["convert", str(official), str(tmp_path / "hf"), "--no-check", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["form"], found["folder"], found["difference"]) == ("transformers", str(tmp_path / "hf"), None)


@pytest.mark.slow
def test_a_qlora_run(official, pairs, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    train(official, pairs, tmp_path / "run", "peft=qlora", "peft.r=2", "trainer.save_steps=1")
    for number, source in enumerate((tmp_path / "run", tmp_path / "run" / "checkpoint-1")):
        capsys.readouterr()
        assert main(["export", str(source), str(tmp_path / f"out-{number}")]) == 0
        assert "4-bit weights" in capsys.readouterr().out


def test_less_than_rounding(official, pairs, tmp_path, capsys):
    """A change smaller than the rounding to bfloat16 gives a warning."""
    train(official, pairs, tmp_path / "run", "peft=lora", "trainer.learning_rate=1e-7")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert "rounding to bfloat16 changes them more" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    assert "changes them more" not in capsys.readouterr().out


def test_a_mistake_is_one_message(run, tmp_path, capsys):
    assert main(["export", str(run), str(run)]) == 2
    assert "mpo: error:" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", str(run), str(tmp_path / "out"), "--dtype", "int4"])
    assert "invalid choice: 'int4'" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = capsys.readouterr().out
    assert "RUN_OR_CHECKPOINT TARGET" in said and "A QLoRA adapter is merged into the base model's original weights" in said
