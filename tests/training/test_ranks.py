"""However a step's pairs are split over ranks and micro-batches, the weights are the same, and no pair counts twice."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from small_runs import difference, record, small_run

# Eight pairs a step. Of 13 the second step has five, of 9 one: then a rank is left with repeated pairs alone.
STEP = {"learning_rate": 5e-6, "num_train_epochs": 2, "warmup_steps": 0, "reward_shift": "none", "max_grad_norm": 0.0}
SPLITS = {
    "8 x 1": {"per_device_train_batch_size": 8},
    "4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "1 x 8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
}
TWO_RANKS = {
    "4 x 1 x 2 ranks": {"per_device_train_batch_size": 4},
    "2 x 2 x 2 ranks": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
RUNS = {
    f"{pairs} pairs, {optim}": {**STEP, "pairs": pairs, "optim": optim}
    for pairs, optim in ((16, "adamw_torch"), (13, "sgd"), (13, "adamw_torch"), (9, "sgd"))
}
WITH_DELTA = {
    "pairs": 13,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "warmup_steps": 0,
    "eval_pairs": 7,
    "per_device_eval_batch_size": 2,
    "logging_steps": 3,
}
STREAM = {**STEP, "pairs": 13, "stream": True, "max_steps": 4, "optim": "sgd", "eval_pairs": 5, "per_device_eval_batch_size": 2}
MIXED = {**STEP, "pairs": 9, "kind": "mixed", "optim": "sgd", "gradient_checkpointing": True}
TEXT = {**MIXED, "kind": "tokenizer"}
RESUMED = {**WITH_DELTA, "save_strategy": "steps", "save_steps": 3}
DROPPED = {**WITH_DELTA, "eval_pairs": 10, "dataloader_drop_last": True, "save_strategy": "steps", "save_steps": 3}
PREDICTED = {"pairs": 4, "kind": "mixed", "max_steps": 1, "eval_pairs": 5, "per_device_eval_batch_size": 1, "predict": True}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Results of all two-rank runs, from one group of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    scenarios = {f"{run}, {split}": {**RUNS[run], **TWO_RANKS[split]} for run in RUNS for split in TWO_RANKS}
    scenarios |= {"tokens": {**WITH_DELTA, "batching": "tokens", "max_tokens_per_batch": 200}}
    scenarios |= {"delta": WITH_DELTA, "stream": {**STREAM, **TWO_RANKS["2 x 2 x 2 ranks"]}, "saved": RESUMED}
    scenarios |= {"images on some ranks": {**MIXED, **TWO_RANKS["2 x 2 x 2 ranks"]}}
    scenarios |= {"a tokenizer": {**TEXT, **TWO_RANKS["2 x 2 x 2 ranks"]}}
    scenarios |= {"resumed": {**RESUMED, "save_strategy": "no", "resume": "saved/checkpoint-3"}}
    scenarios |= {"finished": {**RESUMED, "save_strategy": "no", "resume": "saved/checkpoint-4"}}
    scenarios |= {"dropped": DROPPED, "dropped, resumed": {**DROPPED, "save_strategy": "no", "resume": "dropped/checkpoint-3"}}
    scenarios |= {"predicted": PREDICTED, "predicted, stream": {**PREDICTED, "stream": True, "dataloader_num_workers": 2}}
    run_on_ranks(folder, scenarios)
    return folder


def one_process(tmp_path, settings) -> dict:
    trainer = small_run(tmp_path, **settings)
    trainer.train()
    record(trainer, tmp_path / "end.pt")
    return {**torch.load(tmp_path / "end.pt"), "trainer": trainer}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    return one_process(tmp_path_factory.mktemp("alone"), {**WITH_DELTA, "per_device_train_batch_size": 4})


@pytest.mark.parametrize("run", RUNS)
def test_weights_do_not_depend_on_the_split(two_ranks, tmp_path, run, record_property):
    ends = {split: one_process(tmp_path / split, {**RUNS[run], **SPLITS[split]}) for split in SPLITS}
    ends |= {split: torch.load(two_ranks / f"{run}, {split}.pt") for split in TWO_RANKS}
    start = small_run(tmp_path / "start").model.state_dict()
    assert difference(start, ends["8 x 1"]["weights"]) > 1e-6  # weights were trained
    for split, end in ends.items():
        apart = difference(ends["8 x 1"]["weights"], end["weights"])
        record_property("difference", (f"{run}: {split}", apart))
        assert apart < 1e-6, split


def test_a_rank_without_images_keeps_nobody_waiting(two_ranks, tmp_path):
    """With gradient checkpointing DDP looks for no unused parameters: a tower that does not run on a rank is an error or a hang."""
    end = one_process(tmp_path, {**MIXED, **SPLITS["4 x 2"]})
    assert difference(torch.load(two_ranks / "images on some ranks.pt")["weights"], end["weights"]) < 1e-6


def test_a_model_that_sees_is_trained_on_text_with_a_tokenizer(two_ranks, tmp_path):
    """On two ranks as on one; the vision tower stays as it was on all of them."""
    end = one_process(tmp_path, {**TEXT, **SPLITS["4 x 2"]})
    start = small_run(tmp_path / "start").model.state_dict()
    weights = torch.load(two_ranks / "a tokenizer.pt")["weights"]
    assert difference(weights, end["weights"]) < 1e-6
    assert all(torch.equal(weights[name], start[name]) for name in start if "vision_tower" in name)


def test_batches_by_tokens_count_every_pair_once(two_ranks):
    ranks = [json.loads((two_ranks / f"tokens-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == {**ranks[1], "evaluation": ranks[0]["evaluation"]}
    assert ranks[0]["rewards_seen"] == 2 * 2 * 13


@pytest.mark.parametrize("name", ["delta", "saved"])
def test_delta_is_the_mean_of_all_rewards_on_every_rank(two_ranks, alone, name):
    ranks = [json.loads((two_ranks / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["delta"] == ranks[1]["delta"] != 0
    assert ranks[0]["rewards_seen"] == 2 * 2 * 13  # two rewards a pair, two epochs: none twice
    assert ranks[0]["fingerprint"] == ranks[1]["fingerprint"]
    # One process has micro-batches of four, two ranks have two each: the same order of updates.
    trainer = alone["trainer"]
    assert ranks[0]["delta"] == pytest.approx(trainer.mixture.reward_shift.value.item(), rel=1e-4)
    first, again = ranks[0]["evaluation"]
    assert {k: v for k, v in first.items() if "second" not in k and "runtime" not in k} == {
        k: v for k, v in again.items() if "second" not in k and "runtime" not in k
    }
    metrics = trainer.evaluate()
    for key in ("eval_loss", "eval_loss/sft", "eval_rewards/margins", "eval_completion_tokens/chosen"):
        assert first[key] == pytest.approx(metrics[key], rel=1e-4), key


def test_logs_are_means_over_all_ranks(two_ranks, alone):
    logs = torch.load(two_ranks / "delta.pt")["logs"]
    mine = alone["trainer"].state.log_history
    assert len(logs) > 1
    for theirs, ours in zip(logs, mine, strict=False):
        for key in ("loss", "loss/sft", "rewards/margins", "train_loss", "completion_tokens/rejected"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4), key


def test_a_run_goes_on_under_the_same_and_under_other_numbers_of_ranks(two_ranks, tmp_path):
    """Thirteen pairs, eight a step: checkpoint 3 is in the middle of the second epoch, before the ragged step."""
    straight, resumed = (torch.load(two_ranks / f"{name}.pt") for name in ("saved", "resumed"))
    assert difference(straight, resumed) == 0
    alone = small_run(tmp_path, **{**WITH_DELTA, "per_device_train_batch_size": 4})
    alone.train(resume_from_checkpoint=str(two_ranks / "saved" / "checkpoint-3"))
    record(alone, tmp_path / "end.pt")
    end = torch.load(tmp_path / "end.pt")
    assert end["logs"][-1]["step"] == 4
    assert difference(straight["weights"], end["weights"]) < 1e-5  # at a learning rate of 1e-3
    assert end["delta"]["count"] == straight["delta"]["count"]
    for logs in zip(*([log["loss"] for log in run["logs"] if "loss" in log] for run in (straight, end)), strict=True):
        assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_a_finished_run_is_resumed_by_all_ranks(two_ranks):
    """Logged at step 3, ended at step 4: the open window is rank 0's after the resume, and all ranks read it."""
    ranks = [json.loads((two_ranks / f"finished-rank{rank}.json").read_text()) for rank in (0, 1)]
    saved, finished = (torch.load(two_ranks / f"{name}.pt") for name in ("saved", "finished"))
    assert [rank["steps"] for rank in ranks] == [4, 4]
    assert difference(saved["weights"], finished["weights"]) == 0
    losses = [next(log["train_loss"] for log in run["logs"] if "train_loss" in log) for run in (saved, finished)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("name", ["dropped", "dropped, resumed"])
def test_with_drop_last_every_pair_that_is_computed_counts(two_ranks, tmp_path, name):
    """Of 13 pairs, four at once on two ranks, 12 are left, nothing is repeated; of 10 to evaluate 8 are."""
    ranks = [json.loads((two_ranks / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["rewards_seen"] == ranks[1]["rewards_seen"] == 2 * 2 * 12
    straight, end = (torch.load(two_ranks / f"{which}.pt") for which in ("dropped", name))
    assert difference(straight, end) == 0
    alone = one_process(tmp_path, {**DROPPED, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4})["trainer"]
    metrics = alone.evaluate(alone.eval_dataset.select(range(8)))
    for key in ("eval_loss", "eval_loss/sft", "eval_rewards/margins", "eval_completion_tokens/chosen"):
        assert ranks[0]["evaluation"][0][key] == pytest.approx(metrics[key], rel=1e-4), key


@pytest.mark.parametrize("name", ["predicted", "predicted, stream"])
def test_predictions_of_two_ranks_are_in_record_order(two_ranks, tmp_path, name):
    """Five records on two ranks: the last batch has a repeated one. Every second record has no image and gets a blank one."""
    alone = small_run(tmp_path, **{name: value for name, value in PREDICTED.items() if name != "predict"})
    expected = alone.predict(alone.eval_dataset).label_ids
    for rank in (0, 1):
        rows = json.loads((two_ranks / f"{name}-rank{rank}.json").read_text())["predicted"]
        assert len(rows) == 10
        for row, label in zip(rows, expected, strict=True):
            assert [token for token in row if token >= 0][: len(label)] == [token for token in label if token >= 0][: len(row)]


def test_streams_on_two_ranks(two_ranks, tmp_path):
    end = one_process(tmp_path, {**STREAM, **SPLITS["4 x 2"]})
    assert difference(torch.load(two_ranks / "stream.pt")["weights"], end["weights"]) < 1e-6
    metrics = end["trainer"].evaluate()
    first, _ = json.loads((two_ranks / "stream-rank0.json").read_text())["evaluation"]
    assert first["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)
