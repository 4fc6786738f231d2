"""Accuracy on questions, measured with each evaluation."""

import pytest
import torch
from small_runs import small_run
from support import make_image

from mpo.schema import Question
from mpo.training.samples.accuracy import MeasureAccuracy


def questions(truth):
    return [
        Question([{"role": "user", "content": f"What is in image {place}?"}], [make_image(place // 2)], [truth], id=f"q{place}")
        for place in range(4)
    ]


def run(folder, callbacks):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"metric_for_best_model": "accuracy", "greater_is_better": True} if callbacks else {}
    trainer = small_run(folder, eval_pairs=4, callbacks=callbacks, **settings, **best)
    trainer.train()
    return trainer


def test_accuracy_is_logged_and_chooses_the_best_checkpoint(tmp_path):
    callback = MeasureAccuracy(questions("no such answer"), max_new_tokens=3)
    trainer = run(tmp_path / "with", [callback])
    logs = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert {entry["step"] for entry in logs} == {2, 4}
    assert all(entry["eval_accuracy"] == entry["eval_accuracy_low"] == 0 < entry["eval_accuracy_high"] < 1 for entry in logs)
    assert trainer.state.best_metric == 0 and trainer.state.best_global_step == 2
    plain = run(tmp_path / "without", [])
    for one, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_right_responses_count(tmp_path, monkeypatch):
    """The ground truth is what the model says: all four are right, over two images."""
    callback = MeasureAccuracy(questions("anything"), max_new_tokens=3)
    said = []
    monkeypatch.setattr("mpo.training.samples.accuracy.verify", lambda text, question: said.append(text) or Right)
    trainer = run(tmp_path, [callback])
    [first, *_] = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(said) == 8 and first["eval_accuracy"] == 1 and first["eval_accuracy_low"] == pytest.approx(0.342, abs=1e-3)


class Right:
    correct = True


def test_questions_without_a_ground_truth_are_refused():
    with pytest.raises(ValueError, match="'q0'"):
        MeasureAccuracy([Question([], id="q0")])


@pytest.mark.parametrize("wrong", [{"mode": "both"}, {"max_new_tokens": 0}])
def test_what_could_not_be_asked_is_refused_before_training(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        MeasureAccuracy(questions("red"), **wrong)
