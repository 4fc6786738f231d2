"""A record that cannot be used: it stops the run, or is skipped, listed and counted once, and not replaced by another."""

import json

import pytest
import torch
from datasets import Dataset
from ranks import run_on_ranks
from small_runs import difference, record, small_run, with_bad_images
from support import completion_mask, image_pairs, make_image, messages

from mpo import MPOConfig
from mpo.batching.collator import PairCollator
from mpo.data.encoded import with_encoded_images
from mpo.encoding.costs import measure
from mpo.training.bad_records import BadRecords

SKIP = {"on_bad_record": "skip", "max_bad_fraction": 0.5}
ONE_STEP = {
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_grad_norm": 0.0,
    "reward_shift": "none",
}


def listed(folder) -> list[dict]:
    path = folder / "bad_records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def names(entries) -> list[str]:
    return sorted(entry["id"] for entry in entries)


# --- The collator


def rows(count: int = 3, bad=(1,)) -> list[dict]:
    named = image_pairs(count).add_column("id", [f"pair-{i}" for i in range(count)])
    return list(with_encoded_images(with_bad_images(named, bad)))


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_blank_pair_takes_the_place(processor, layout):
    """Of three records the second is bad: the others come first, in order, and the third pair does not count."""
    batch = PairCollator(processor, layout=layout, on_bad_record="skip")(rows())
    assert batch.kept == (0, 2) and batch.counted == 2
    assert len(batch.labelled.lengths) == 6
    assert batch.names[:2] == ("record 'pair-0'", "record 'pair-2'")
    (entry,) = batch.bad
    assert entry["id"] == "pair-1" and entry["where"] == "record 'pair-1'"
    assert entry["reason"].startswith("image 1 of 1: this file is not an image")
    good = PairCollator(processor, layout=layout)([rows()[0], rows()[2]])
    assert torch.equal(batch["pixel_values"], good["pixel_values"])
    assert batch.lengths[:, :2].tolist() == good.lengths.tolist()


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_batch_of_bad_records_alone(processor, layout):
    batch = PairCollator(processor, layout=layout, on_bad_record="skip")(rows(bad=(0, 1, 2)))
    assert batch.counted == 0 and batch.kept == () and len(batch.bad) == 3
    assert len(batch.labelled.lengths) == 6 and (batch.labelled.lengths > 0).all()
    assert "pixel_values" not in batch


BAD = {
    "image": {"images": [{"bytes": b"x", "path": None}]},
    "no completion": {"rejected": messages(" ", "assistant")},
    "equal completions": {"chosen": messages("a", "assistant"), "rejected": messages("a", "assistant")},
    "too long": {"prompt": messages("What is it? " * 90, "user")},
    "None": {"images": [None]},
    "limits": {"tiles": {"min": 3, "max": 2}},
    "places": {"images": [make_image(0), make_image(1)], "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
    "video": {"videos": ["no.mp4"]},
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_skipped(processor, what):
    good = {**image_pairs(1)[0], "id": "good"}
    settings = {"max_length": 200} if what == "too long" else {}
    with pytest.raises(ValueError, match="record 'bad'"):
        PairCollator(processor, **settings)([good, {**good, "id": "bad", **BAD[what]}])
    batch = PairCollator(processor, on_bad_record="skip", **settings)([{**good, "id": "bad", **BAD[what]}, good])
    assert batch.kept == (1,) and batch.counted == 1 and batch.bad[0]["id"] == "bad"


def test_what_is_no_records_fault_is_not_skipped(processor):
    """A tokenizer without an image token makes all records with images bad."""
    batch = PairCollator(processor.tokenizer, on_bad_record="skip")([image_pairs(1)[0]])
    assert batch.counted == 0 and "is a tokenizer" in batch.bad[0]["reason"]


def test_answers_are_cut_and_images_never(processor):
    """A completion beyond max_length is truncated and counted. A record whose image goes beyond it is refused."""
    row = image_pairs(1)[0]
    whole = PairCollator(processor)([row])
    prompt = int(completion_mask(whole)[0].argmax())
    batch = PairCollator(processor, max_length=prompt + 4)([row])
    assert batch.is_truncated.tolist() == [True, True]
    assert batch["input_ids"].shape[1] == prompt + 4
    image_token = processor.image_token_id
    assert (batch["input_ids"][0] == image_token).sum() == (whole["input_ids"][0] == image_token).sum()
    with pytest.raises(ValueError, match="image tokens included"):
        PairCollator(processor, max_length=prompt - 2)([row])


def test_measured_and_planned_as_next_to_nothing(processor):
    dataset = with_bad_images(image_pairs(3), [1])
    with pytest.raises(ValueError, match="not an image"):
        measure(dataset, processor)
    costs = measure(dataset, processor, on_bad_record="skip")
    assert costs.tokens()[1] == 3 and costs.tiles[1] == 0
    assert costs.tokens()[[0, 2]].tolist() == measure(image_pairs(3), processor).tokens()[[0, 2]].tolist()


# --- A run


@pytest.mark.parametrize("workers", [0, 1])
def test_by_default_it_stops_the_run(tmp_path, workers):
    with pytest.raises(ValueError, match="'pair-3': image 1 .*not an image"):
        small_run(tmp_path, bad=[3], dataloader_num_workers=workers).train()


def test_an_image_of_a_stream(tmp_path):
    with pytest.raises(ValueError, match="'pair-3': image 1 .*not an image"):
        small_run(tmp_path, bad=[3], stream=True, max_steps=4).train()


WAYS = {
    "one batch": {"per_device_train_batch_size": 8},
    "padded": {"per_device_train_batch_size": 8, "rows": "padded"},
    "micro-batches, one all bad": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "single pairs": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "workers": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "dataloader_num_workers": 2},
    "by tokens": {"batching": "tokens", "max_tokens_per_batch": 200, "gradient_accumulation_steps": 8},
    "stream": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "stream": True},
    "cached": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "reference": "cached"},
    "cached, single pairs": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "reference": "cached"},
    "checked against padded rows": {"per_device_train_batch_size": 8, "verify_first_batch": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_step_is_that_of_the_good_records(tmp_path, way):
    """Eight records of which two are bad move the weights as the six others alone do."""
    settings = dict(WAYS[way])
    if settings.get("reference") == "cached":
        settings["reference_cache"] = str(tmp_path / "cache")
    trainer = small_run(tmp_path / "skipping", bad=[2, 3], **ONE_STEP, **SKIP, **settings)
    trainer.train()
    good = small_run(tmp_path / "good", **ONE_STEP, per_device_train_batch_size=6)
    good.train_dataset = good.train_dataset.select([0, 1, 4, 5, 6, 7])
    good.train()
    weights, expected = trainer.model.state_dict(), good.model.state_dict()
    assert max((weights[name] - expected[name]).abs().max().item() for name in expected) < 1e-6
    log, other = trainer.state.log_history[0], good.state.log_history[0]
    assert log["loss"] == pytest.approx(other["loss"], abs=1e-5) and log["bad_records"] == 2
    assert log["logps/chosen"] == pytest.approx(other["logps/chosen"], abs=1e-3)
    assert names(listed(tmp_path / "skipping")) == ["pair-2", "pair-3"]
    assert not any("bad_records" in log for log in good.state.log_history)


def test_a_step_without_a_good_record_changes_nothing(tmp_path):
    """Its gradients are zero; weight decay, which does not depend on records, is off here."""
    trainer = small_run(tmp_path, pairs=2, bad=[0, 1], weight_decay=0.0, **{**ONE_STEP, **SKIP, "max_bad_fraction": 0.99})
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match="2 of the 2 train records"):
        trainer.train()
    assert difference(before, dict(trainer.model.state_dict())) == 0.0


@pytest.mark.parametrize("shift", ["running_mean", "none"])
def test_counted_once_over_epochs(tmp_path, shift):
    trainer = small_run(tmp_path, bad=[2, 5], num_train_epochs=3, reward_shift=shift, **SKIP)
    trainer.train()
    entries = listed(tmp_path)
    assert names(entries) == ["pair-2", "pair-5"]
    assert all(entry["data"] == "train" and entry["epoch"] == 0 and 1 <= entry["step"] <= 4 for entry in entries)
    assert trainer.state.log_history[-2]["bad_records"] == 2
    if shift == "running_mean":
        assert trainer.mixture.reward_shift.count == 2 * 6 * 3


def test_evaluation(tmp_path):
    trainer = small_run(tmp_path, eval_pairs=5, bad=[1], per_device_eval_batch_size=2, **SKIP)
    found, again = trainer.evaluate(), trainer.evaluate()
    good = small_run(tmp_path / "good", eval_pairs=5)
    expected = good.evaluate(good.eval_dataset.select([0, 2, 3, 4]))
    assert found["eval_loss"] == again["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert found["eval_bad_records"] == again["eval_bad_records"] == 1
    (entry,) = listed(tmp_path)
    assert entry["data"] == "eval" and "not an image" in entry["reason"]


def test_too_many_stop_the_run_before_it_saves(tmp_path):
    """Two of eight are 25 %: more than 20, less than 30."""
    settings = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 4, "on_bad_record": "skip", "bad": [0, 5]}
    with pytest.raises(ValueError, match=r"2 of .*8 train records .*max_bad_fraction=0.2 .*bad_records.jsonl.*'pair-"):
        small_run(tmp_path / "a", max_bad_fraction=0.2, **settings).train()
    assert not list((tmp_path / "a").glob("checkpoint-*")) and len(listed(tmp_path / "a")) == 2
    trainer = small_run(tmp_path / "b", max_bad_fraction=0.3, **settings)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_share_of_few_records_is_not_judged(tmp_path):
    bad = BadRecords(tmp_path, most=0.01, writes=True)
    entry = {"id": "a", "where": "record 'a'", "reason": "no image.", "key": "1"}
    bad.see("train", 2, [entry], step=1)
    bad.settle({"train": 10_000})
    bad.see("train", 2, [{**entry, "key": "2"}], step=2)
    with pytest.raises(ValueError, match="2 of the 4 train records"):
        bad.settle({"train": 10_000})
    assert bad.count("train") == 2 and bad.count("eval") == 0
    strict = BadRecords(tmp_path, most=0.0, writes=False)
    strict.see("train", 2, [entry], step=1)
    with pytest.raises(ValueError, match="1 of the 2 train records"):
        strict.settle({})


def test_lines_of_others_stay(tmp_path):
    """What the loader listed, twice where two ranks said it; a new run and a resumed one drop or restore our own lines alone."""
    path, theirs = tmp_path / "bad_records.jsonl", '{"where": "pairs.jsonl:3", "reason": "no image."}'
    path.write_text(f"{theirs}\n{theirs}\n")
    bad = BadRecords(tmp_path, most=0.5, writes=True)
    bad.clear()
    bad.see("train", 9, [{"id": "a", "where": "record 'a'", "reason": "no image.", "key": "1"}], step=1)
    bad.settle({"train": 9})
    state, whole = bad.state(), path.read_text()
    assert [entry["where"] for entry in listed(tmp_path)] == ["pairs.jsonl:3", "record 'a'"]
    assert [list(entry)[:2] for entry in listed(tmp_path)] == [["where", "reason"]] * 2
    bad.see("train", 9, [{"id": "b", "where": "record 'b'", "reason": "no image.", "key": "2"}], step=2)
    bad.settle({"train": 9})
    assert len(listed(tmp_path)) == 3
    resumed = BadRecords(tmp_path, most=0.5, writes=True)
    resumed.restore(state)
    assert path.read_text() == whole
    resumed.clear()
    assert path.read_text() == f"{theirs}\n"


def test_resumed_nothing_is_counted_twice(tmp_path):
    """Killed after step 3 of 4 x 2, resumed from step 2: list, counts and weights are those of a run left alone."""
    settings = {"bad": [0, 1, 6], "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, **SKIP}
    whole = small_run(tmp_path / "whole", **settings)
    whole.train()
    record(whole, tmp_path / "whole.pt")

    class Stop(Exception):
        pass

    killed = small_run(tmp_path / "killed", **settings)
    step = killed.training_step

    def dying(*args, **kwargs):
        if killed.state.global_step == 3:
            raise Stop
        return step(*args, **kwargs)

    killed.training_step = dying
    with pytest.raises(Stop):
        killed.train()
    resumed = small_run(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    record(resumed, tmp_path / "resumed.pt")
    ends = [torch.load(tmp_path / f"{name}.pt") for name in ("whole", "resumed")]
    assert difference(ends[0], ends[1]) == 0.0
    assert listed(tmp_path / "killed") == listed(tmp_path / "whole") and len(listed(tmp_path / "whole")) == 3


def test_a_fresh_run_begins_a_fresh_list(tmp_path):
    small_run(tmp_path, bad=[1], max_steps=4, **SKIP).train()
    assert names(listed(tmp_path)) == ["pair-1"]
    small_run(tmp_path, max_steps=4, **SKIP).train()
    assert listed(tmp_path) == []


@pytest.mark.parametrize("kind", ["lora", "text", "mixed"])
def test_other_models_and_records(tmp_path, kind):
    trainer = small_run(tmp_path, kind=kind, max_steps=4, **SKIP)
    rows = trainer.train_dataset.to_list()
    rows[2]["rejected"] = messages("", "assistant")
    trainer.train_dataset = Dataset.from_list(rows, features=trainer.train_dataset.features)
    trainer.train()
    assert names(listed(tmp_path)) == ["pair-2"]


@pytest.mark.slow
def test_on_two_ranks(tmp_path):
    """Nine records, two bad, one rank left with repeated pairs at the end: weights, list and counts of one process."""
    settings = {
        "pairs": 9,
        "bad": [1, 4],
        "eval_pairs": 5,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 5e-6,
        "warmup_steps": 0,
        "reward_shift": "none",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        **SKIP,
    }
    run_on_ranks(
        tmp_path,
        {
            "two": {**settings, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            "tokens": {**settings, "batching": "tokens", "max_tokens_per_batch": 200},
        },
    )
    one = small_run(tmp_path / "one", **settings, per_device_train_batch_size=8)
    one.train()
    expected = [one.evaluate(), one.evaluate()]
    record(one, tmp_path / "one.pt")
    ends = [torch.load(tmp_path / f"{name}.pt") for name in ("one", "two")]
    assert difference(ends[0]["weights"], ends[1]["weights"]) < 1e-7
    for name in ("one", "two", "tokens"):
        entries = listed(tmp_path / name)
        assert names(entry for entry in entries if entry["data"] == "train") == ["pair-1", "pair-4"]
        assert sum(entry["data"] == "eval" for entry in entries) == 2
    for rank in range(2):
        found = json.loads((tmp_path / f"two-rank{rank}.json").read_text())["evaluation"]
        assert found[0]["eval_loss"] == pytest.approx(expected[0]["eval_loss"], abs=1e-5)
        assert found[1]["eval_bad_records"] == expected[1]["eval_bad_records"] == 2


# --- Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_bad_record": "replace"}, "on_bad_record.*'raise', 'skip'.*'replace'"),
        ({"max_bad_fraction": 0.1}, "needs on_bad_record='skip'"),
        ({"on_bad_record": "skip", "max_bad_fraction": 1.0}, "max_bad_fraction.*1.0"),
        ({"on_bad_record": "skip", "max_bad_fraction": -0.1}, "max_bad_fraction.*-0.1"),
    ],
)
def test_settings(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MPOConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
