"""A loss or gradient that is not finite: nothing is applied from there on, nothing is saved, and the records are named."""

import pytest
import torch
from small_runs import small_run
from transformers import TrainerCallback


class Poison(TrainerCallback):
    """From `step` on, makes the forward pass give NaN: once, for one record's batch."""

    def __init__(self, step: int, hook):
        self.step, self.hook = step, hook

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.hook(model)


class Remember(TrainerCallback):
    """Keeps the weights as they were after `step`."""

    def __init__(self, step: int):
        self.step, self.weights = step, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.weights = {name: value.clone() for name, value in model.state_dict().items()}


def nan_loss(model):
    """The next forward pass multiplies its input embeddings by NaN."""

    def poison(module, args, output):
        handle.remove()
        return output * float("nan")

    handle = model.get_input_embeddings().register_forward_hook(poison)


def nan_gradient(model):
    """The loss stays finite; a gradient does not."""
    weight = next(p for n, p in model.named_parameters() if "q_proj.weight" in n and "language_model" in n)

    def poison(gradient):
        handle.remove()
        return gradient * float("inf")

    handle = weight.register_hook(poison)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
@pytest.mark.parametrize("poison", [nan_loss, nan_gradient])
def test_the_step_is_not_applied_and_the_run_stops(tmp_path, optim, poison):
    """Step 3 is bad; it is found at step 4, which logs, before the checkpoint of step 4 is written."""
    remember = Remember(2)
    settings = {"pairs": 16, "logging_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": optim}
    trainer = small_run(tmp_path, **settings, callbacks=[Poison(3, poison), remember])
    with pytest.raises(FloatingPointError, match=r"step 3 .*not finite.*'pair-\d+', record 'pair-\d+'"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(torch.equal(value, remember.weights[name]) for name, value in trainer.model.state_dict().items())
    assert torch.isfinite(trainer.mixture.reward_shift.value)


def test_only_the_micro_batch_at_fault_is_named(tmp_path):
    trainer = small_run(tmp_path, pairs=8, gradient_accumulation_steps=2, callbacks=[Poison(1, nan_loss)])
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert str(error.value).count("'pair-") == 2  # of four in the step


def test_the_last_step_is_checked_too(tmp_path):
    """It neither logs nor saves."""
    trainer = small_run(tmp_path, pairs=6, logging_steps=100, callbacks=[Poison(3, nan_loss)])
    with pytest.raises(FloatingPointError, match="step 3"):
        trainer.train()


def test_a_bad_start_is_found_before_evaluation_picks_a_best_model(tmp_path):
    settings = {"pairs": 8, "eval_pairs": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best"}
    trainer = small_run(tmp_path, **settings, metric_for_best_model="loss", logging_steps=100, callbacks=[Poison(1, nan_loss)])
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_fused_optimiser_is_gated_on_the_device():
    """As under torch's gradient scaler: the step and the moments stay as they were, and the next good step moves them."""
    from mpo.training.finite import FiniteGuard

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = FiniteGuard()
    for step, (gradient, moves) in enumerate([(1.0, True), (float("nan"), False), (1.0, False)], start=1):
        before = weight.detach().clone()
        weight.grad = torch.full((3,), gradient)
        guard.see_loss(step, [f"record {step}"], torch.tensor(0.5))
        guard.see_gradients(weight.grad.norm())
        guard.gate(optimizer, guard.is_bad())
        optimizer.step()
        assert (not torch.equal(before, weight)) == moves
    assert optimizer.state[weight]["step"] == 1
    with pytest.raises(FloatingPointError, match="gradient norm .*step 2 .*record 2"):
        guard.check()
    guard.check()  # a new window


def test_overflow_under_fp16_scaling_is_no_error(tmp_path):
    """The gradient scaler skips such a step itself and halves its scale."""
    trainer = small_run(tmp_path, pairs=4, callbacks=[Poison(1, nan_gradient)], optim="adamw_torch")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.accelerator.native_amp = True
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(value).all() for value in trainer.model.state_dict().values())
