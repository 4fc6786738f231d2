"""`mpo train data=mmpr data.meta=...`: a run on a small folder in MMPR's form, as it is downloaded, and one on a stream."""

import json
import re

import pytest
from datasets import Dataset, DatasetDict
from small_runs import write_job
from support import make_image

from mpo.commands import main
from mpo.data import load_preferences


@pytest.fixture
def arguments(tmp_path):
    settings = [setting for setting in write_job(tmp_path, pairs=6) if not setting.startswith("data.path=")]
    return [*settings, f"run_dir={tmp_path / 'run'}", "trainer.max_steps=2", "trainer.global_batch_size=2"]


@pytest.fixture
def meta(tmp_path):
    """Two sources: four pairs about images, of which half are used, and two pairs of text, used twice."""
    home = tmp_path / "MMPR-v1.2"
    for folder in ("annotations", "images/cats"):
        (home / folder).mkdir(parents=True)
    for number in range(4):
        make_image(number).save(home / "images" / "cats" / f"{number}.png")
    completions = {"chosen": "It is 5. Final answer: 5", "rejected": "It is not that, I think."}
    sources = {
        "cats_pairs_vqa_correctness_rules": [
            {"image": f"{number}.png", "question": f"<image>\nWhat is {number}?", **completions, "answer_gt": "5"}
            for number in range(4)
        ],
        "text_pairs_vqa_format_rules": [{"question": f"What is 2 plus {number}?", **completions} for number in range(2)],
    }
    for name, lines in sources.items():
        (home / "annotations" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = {
        name: {
            "root": "MMPR-v1.2/images/cats",
            "annotation": f"MMPR-v1.2/annotations/{name}.jsonl",
            "data_augment": False,
            "repeat_time": repeat_time,
            "length": len(sources[name]),
        }
        for name, repeat_time in zip(sources, (0.5, 2), strict=True)
    }
    entries["cats_pairs_vqa_correctness_rules"]["max_dynamic_patch"] = 2
    (home / "meta.json").write_text(json.dumps(entries))
    return home / "meta.json"


def logged(tmp_path):
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    return [log for log in state["log_history"] if "loss" in log]


def test_a_run_on_mmpr(arguments, meta, tmp_path):
    """Six pairs in batches of two make an epoch of three steps; both steps are logged, and the model is saved."""
    assert main(["train", *arguments, "data=mmpr", f"data.meta={meta}"]) == 0
    assert [log["step"] for log in logged(tmp_path)] == [1, 2]
    assert logged(tmp_path)[0]["epoch"] == pytest.approx(1 / 3)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_dry_run_on_mmpr(arguments, meta, capsys):
    assert main(["train", *arguments, "data=mmpr", f"data.meta={meta}", "dry_run=true"]) == 0
    assert "6 pairs" in " ".join(capsys.readouterr().out.split())


def test_what_is_wrong_with_a_meta(arguments, meta, capsys):
    assert main(["train", *arguments, "data=mmpr"]) == 2
    assert "data.meta=..." in capsys.readouterr().err
    annotation = meta.parent / "annotations" / "text_pairs_vqa_format_rules.jsonl"
    annotation.write_text(annotation.read_text().splitlines()[0])
    assert main(["train", *arguments, "data=mmpr", f"data.meta={meta}"]) == 2
    assert re.search(r"\b1 lines.*'length'.*\b2\b", capsys.readouterr().err)


def test_a_run_on_a_stream(arguments, tmp_path):
    """Pairs are read during training; a bad record is skipped and listed in the run folder."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(pairs.read_text() + '\n{"image": "none.png", "question": "?", "chosen": "A", "rejected": "B"}\n')
    settings = [
        "data.streaming=true",
        "data.on_bad_record=skip",
        "trainer.max_steps=4",
    ]  # 8 pairs: includes the bad one
    assert main(["train", *arguments, f"data.path={pairs}", *settings]) == 0
    assert [log["step"] for log in logged(tmp_path)] == [1, 2, 3, 4]
    (bad,) = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
    assert json.loads(bad)["where"] == f"{pairs}:7"


def test_skipped_by_the_loader_and_in_training(arguments, tmp_path):
    """A missing image and one that cannot be decoded are in one list, which a new run replaces and a resumed run extends."""
    pairs, listed = tmp_path / "pairs.jsonl", tmp_path / "run" / "bad_records.jsonl"
    pairs.write_text(pairs.read_text() + '\n{"image": "none.png", "question": "?", "chosen": "A", "rejected": "B"}\n')
    (tmp_path / "2.png").write_bytes(b"no image")
    listed.parent.mkdir()
    listed.write_text('{"where": "of an earlier run", "reason": "?"}\n')
    settings = ["data.on_bad_record=skip", "data.max_bad_fraction=0.4", "trainer.save_strategy=steps", "trainer.save_steps=3"]
    for steps in (3, 6):
        assert main(["train", *arguments, f"data.path={pairs}", *settings, f"trainer.max_steps={steps}"]) == 0
        read, trained = map(json.loads, listed.read_text().splitlines())
        assert read["where"] == f"{pairs}:7" and "data" not in read
        assert trained["data"] == "train" and "not an image" in trained["reason"]


def test_skipping_is_set_with_the_data(arguments, tmp_path, capsys):
    arguments = [*arguments, f"data.path={tmp_path / 'pairs.jsonl'}"]
    assert main(["train", *arguments, "+trainer.on_bad_record=skip"]) == 2
    assert re.search("trainer.on_bad_record .* data.on_bad_record", capsys.readouterr().err)
    assert main(["train", *arguments, "data.max_bad_fraction=0.2"]) == 2
    assert re.search("max_bad_fraction.* on_bad_record='skip'", capsys.readouterr().err)


def test_evaluation_has_its_own_split_and_format(arguments, tmp_path, capsys):
    arguments = [*arguments, f"data.path={tmp_path / 'pairs.jsonl'}"]
    lines = [{"prompt": f"What is {number}?", "chosen": "A cat.", "rejected": "A dog."} for number in range(3)]
    DatasetDict({"test": Dataset.from_list(lines)}).save_to_disk(tmp_path / "eval")
    evaluated = [
        f"data.eval_path={tmp_path / 'eval'}",
        "data.eval_split=test",
        "trainer.eval_strategy=steps",
        "trainer.eval_steps=2",
    ]
    assert main(["train", *arguments, *evaluated, "data.eval_format=trl"]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert sum("eval_loss" in log for log in state["log_history"]) == 1
    arguments = [*arguments, f"run_dir={tmp_path / 'other'}"]
    assert main(["train", *arguments, *evaluated, "data.eval_format=rlhf_v"]) == 2
    assert re.search("eval:1: 'text' .*null", capsys.readouterr().err)
    assert main(["train", *arguments, "data.eval_split=test"]) == 2
    assert "data.eval_split" in capsys.readouterr().err


def test_data_keys_are_those_of_load_preferences(arguments, meta, capsys):
    assert main(["train", *arguments, "data=mmpr", f"data.meta={meta}", "data.on_bad_recrd=skip"]) == 2
    assert "'on_bad_recrd' in data. Did you mean 'on_bad_record'?" in capsys.readouterr().err


@pytest.fixture
def mixture(meta, tmp_path):
    """The same sources as a mixture: images once and texts twice, a third of the pairs for evaluation."""
    folder = meta.parent
    (folder / "mixture.yaml").write_text(
        "sources:\n"
        "  - {path: annotations/cats_pairs_vqa_correctness_rules.jsonl, image_root: images/cats, tiles: {max: 2}}\n"
        "  - {path: annotations/text_pairs_vqa_format_rules.jsonl, repeat_time: 2}\n"
        "eval_size: 2\n"
    )
    return folder / "mixture.yaml"


def test_a_run_on_a_mixture(arguments, mixture, tmp_path):
    """The run evaluates on the evaluation part of the mixture."""
    settings = ["data=mixture", f"data.mix={mixture}", "trainer.eval_strategy=steps", "trainer.eval_steps=2"]
    assert main(["train", *arguments, *settings]) == 0
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert sum("eval_loss" in log for log in state["log_history"]) == 1
    train, eval_part = (load_preferences(mixture, split=split) for split in ("train", "eval"))
    assert len(eval_part) == 2 and not set(train["prompt_id"]) & set(eval_part["prompt_id"])
    texts = sum("text" in source for source in eval_part["source"])
    assert len(train) == (4 - (2 - texts)) + 2 * (2 - texts)


def test_what_is_wrong_with_a_mixture(arguments, mixture, capsys):
    assert main(["train", *arguments, "data=mixture"]) == 2
    assert "data.mix=..." in capsys.readouterr().err
    mixture.write_text(mixture.read_text().replace("repeat_time", "repeat_tim"))
    assert main(["train", *arguments, "data=mixture", f"data.mix={mixture}"]) == 2
    assert re.search("'repeat_tim'.* repeat_time", capsys.readouterr().err)
