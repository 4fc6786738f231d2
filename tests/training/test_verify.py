"""`verify_first_batch`: one comparison of packed with padded rows in training, and a step that does not notice."""

import pytest
import torch
from small_runs import difference, small_run

from mpo.batching.randomness import without_dropout


def reports(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("verify_first_batch: ")]


def apart(report: str) -> tuple[float, float]:
    """Log-probs in nats, gradients relative to their norm."""
    return float(report.split("differ by at most ")[1].split()[0]), float(report.split("gradients by ")[1].split()[0])


WAYS = {
    "full": {"kind": "mixed"},
    "workers, several epochs": {"dataloader_num_workers": 2, "num_train_epochs": 2},
    "persistent workers": {"dataloader_num_workers": 2, "num_train_epochs": 2, "dataloader_persistent_workers": True},
    "accumulated": {"gradient_accumulation_steps": 2},
    "cached": {"reference": "cached"},
    "evaluated first": {"eval_pairs": 2, "eval_on_start": True},
    "evaluated by workers": {"eval_pairs": 2, "eval_on_start": True, "eval_strategy": "steps", "dataloader_num_workers": 1},
    "dropout of adapters": {"kind": "lora", "lora_dropout": 0.3},
    "drop path": {"vision_drop_path": 0.4},
    "checkpointing": {"gradient_checkpointing": True, "vision_drop_path": 0.4},
    "planned": {"group_same_prompt": 2},
    "stream": {"stream": True, "max_steps": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_compared_once(tmp_path, caplog, way):
    settings = dict(WAYS[way])
    if settings.get("reference") == "cached":
        settings["reference_cache"] = str(tmp_path / "cache")
    small_run(tmp_path, verify_first_batch=True, **settings).train()
    (report,) = reports(caplog)
    log_probs, gradients = apart(report)
    assert log_probs < 1e-3 and gradients < 1e-4, report


def test_not_compared_unasked_or_outside_of_training(tmp_path, caplog):
    small_run(tmp_path, max_steps=1).train()
    small_run(tmp_path, eval_pairs=2, verify_first_batch=True).evaluate()
    assert not reports(caplog)


def test_compared_in_a_resumed_stream(tmp_path, caplog):
    """Its first batches are made and skipped."""
    settings = {"stream": True, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    small_run(tmp_path, **settings).train()
    small_run(tmp_path, verify_first_batch=True, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(reports(caplog)) == 1


@pytest.mark.parametrize("kind", [{"kind": "lora", "lora_dropout": 0.3}, {"vision_drop_path": 0.4}], ids=str)
def test_training_does_not_notice(tmp_path, kind):
    """The same weights and logs to the last bit, random draws of dropout and drop path included."""
    runs = []
    for verify in (False, True):
        torch.manual_seed(0)  # of the adapter's start
        runs.append(small_run(tmp_path, max_steps=2, verify_first_batch=verify, **kind))
        runs[-1].train()
    plain, verified = (trainer.model.state_dict() for trainer in runs)
    assert difference(plain, verified) == 0.0
    assert runs[0].state.log_history[0]["loss"] == runs[1].state.log_history[0]["loss"]


def test_without_dropout_puts_everything_back():
    model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 4), torch.nn.Dropout(0.25))
    model[1].attention_dropout = 0.1
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on the way"), without_dropout(model, torch.device("cpu")):
        assert (model[0].p, model[1].attention_dropout, model[2].p) == (0.0, 0.0, 0.0)
        assert torch.equal(model(torch.ones(2, 4)), model[1](torch.ones(2, 4)))
        torch.rand(3)
        raise RuntimeError("on the way")
    assert (model[0].p, model[1].attention_dropout, model[2].p) == (0.5, 0.1, 0.25) and model.training
    assert torch.equal(state, torch.get_rng_state())


def test_rows_that_are_padded_after_all(tmp_path, caplog):
    """It says so, instead of comparing padded rows with themselves."""
    small_run(tmp_path, verify_first_batch=True, packed_attention="segments", pad_to_multiple_of=8, max_steps=1).train()
    (warning,) = [record.message for record in caplog.records if record.message.startswith("Rows are padded")]
    assert "verify_first_batch has no effect" in warning and "packed_attention has no effect" in warning
    assert not reports(caplog)
