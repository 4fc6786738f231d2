"""A run that is killed with kill -9 and resumed ends bitwise where one that was left alone does."""

import functools

import pytest
import torch
from small_runs import KillAt, difference, in_fork, kill_while_saving, record, small_run

from mpo.training.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow

# Nine pairs, two at a time, accumulated by two: three steps an epoch, the last with one pair. Two epochs, logged every second
# step and saved every third or fourth, so that windows straddle checkpoints.
RAGGED = {"pairs": 9, "gradient_accumulation_steps": 2, "num_train_epochs": 2, "save_strategy": "steps", "logging_steps": 2}
CASES = {
    "first epoch": ({**RAGGED, "save_steps": 1}, "step", 2),
    "epoch boundary": ({**RAGGED, "save_steps": 3}, "step", 4),
    "second epoch": ({**RAGGED, "save_steps": 4}, "step", 5),
    "mid-accumulation": ({**RAGGED, "save_steps": 1}, "micro", 4),
    "window straddles the checkpoint": ({**RAGGED, "save_steps": 1, "logging_steps": 4}, "step", 3),
    "nothing saved yet": ({**RAGGED, "save_steps": 4}, "step", 2),
    "half-written checkpoint": ({**RAGGED, "save_steps": 2}, "saving", 4),
    "workers": ({**RAGGED, "save_steps": 2, "dataloader_num_workers": 2}, "step", 5),
    "token budget": ({**RAGGED, "save_steps": 2, "batching": "tokens", "max_tokens_per_batch": 180}, "step", 3),
    "stream with workers": ({**RAGGED, "save_steps": 2, "stream": True, "max_steps": 6, "dataloader_num_workers": 2}, "step", 5),
    "stream": ({**RAGGED, "save_steps": 2, "stream": True, "max_steps": 6}, "step", 5),
    "moving reference": ({**RAGGED, "save_steps": 2, "sync_ref_model": True, "ref_model_sync_steps": 1}, "step", 3),
    "evaluation between": ({**RAGGED, "save_steps": 2, "eval_pairs": 3, "eval_strategy": "steps", "eval_steps": 1}, "step", 3),
}


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """The end of a run that nobody kills. Cases that differ in their checkpoints alone share it."""

    @functools.cache
    def end(settings: frozenset) -> dict:
        folder = tmp_path_factory.mktemp("alone")
        trainer = small_run(folder, **{**dict(settings), "save_strategy": "no"})
        trainer.train()
        record(trainer, folder / "end.pt")
        return torch.load(folder / "end.pt")

    return lambda settings: end(frozenset(item for item in settings.items() if item[0] != "save_steps"))


def _killed(folder, settings, moment, number):
    if moment == "saving":
        kill_while_saving(number)
    small_run(folder, **settings, callbacks=[KillAt(moment, number)]).train()


def _resumed(folder, settings):
    trainer = small_run(folder, **settings)
    trainer.train(resume_from_checkpoint=latest_checkpoint(folder))
    record(trainer, folder / "end.pt")


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "full") for case in CASES]
    + [(case, kind) for case in ("mid-accumulation", "second epoch", "workers") for kind in ("lora", "text")],
)
def test_killed_and_resumed_is_bitwise_the_same(left_alone, tmp_path, case, kind, record_property):
    settings, moment, number = CASES[case]
    settings = {**settings, "kind": kind}
    assert in_fork(lambda: _killed(tmp_path, settings, moment, number)) == -9
    _resumed(tmp_path, settings)
    first, second = left_alone(settings), torch.load(tmp_path / "end.pt")
    differences = {part: difference(first[part], second[part]) for part in first}
    record_property("difference", (f"killed and resumed: {case}, {kind}", max(differences.values())))
    assert differences == dict.fromkeys(first, 0.0)
    assert any(log.get("loss") for log in second["logs"])
