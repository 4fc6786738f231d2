"""Save checkpoints that a run resumes from bitwise, and resume from them."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from accelerate.utils import is_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer_callback import ExportableState

from mpo.training.checkpoint import (
    begin_checkpoint,
    check_adapter,
    finish_checkpoint,
    flush_to_disk,
    load_state,
    load_weights,
    save_state,
)
from mpo.training.same_run import check_same_run

PLAN = "plan of batches"


class Resumes(Trainer):  # type: ignore[misc]
    """Save and restore everything that the rest of a run depends on."""

    unit: str
    _start_identity: str | None = None  # of the weights that a checkpoint does not hold

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        with self._not_counted():
            self._flush_references()
            if self.args.should_save:
                begin_checkpoint(folder)
            self.accelerator.wait_for_everyone()  # no rank may write into a folder that counts as complete
            state = self._state()
            if self.args.should_save:
                save_state(folder, {**state, "run": self._description})
                self._save_more(folder)
            self.state.save_to_json = partial(finish_checkpoint, self.state)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                del self.state.save_to_json

    def _save_more(self, folder: str) -> None:
        """Save what else belongs to a checkpoint, on the rank that saves. It counts as complete afterwards only."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        flush_to_disk(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_callback_state(self) -> None:
        """Restore the state of callbacks (early stopping's patience), not their settings, which transformers may restore too."""
        states = self.state.stateful_callbacks
        if self.args.restore_callback_states_from_checkpoint:
            super()._load_callback_state()
        stateful = [callback for callback in self.callback_handler.callbacks if isinstance(callback, ExportableState)]
        for callback in stateful:
            name = type(callback).__name__
            if name not in states:  # new in this run; transformers' saving expects an entry
                states[name] = callback.state()
            elif not self.args.restore_callback_states_from_checkpoint:
                same = [other for other in stateful if type(other).__name__ == name]
                saved = states[name] if isinstance(states[name], list) else [states[name]]
                for state in saved[same.index(callback) :][:1]:
                    for attribute, value in state.get("attributes", {}).items():
                        setattr(callback, attribute, value)

    def _state(self) -> dict[str, Any]:
        return {
            "num_tokens": self._total_train_tokens,
            "window": self._meters["train"].state(self._over_ranks),
            "whole_run": self._whole_run,
            "order": self._order(),
            "start": self._start_identity,
            "bad_records": None if self._bad_records is None else self._bad_records.state(),
        }

    def _order(self) -> dict[str, Any]:
        sized = hasattr(self.train_dataset, "__len__")
        return {
            f"{self.unit} in the data set": len(self.train_dataset) if sized else None,
            "content of the data set": self._content,
            f"{self.unit} per step": self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            "seed": self.args.order_seed,
            PLAN: None if self._sampler is None else self._sampler.identity,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._restore_state(load_state(checkpoint), checkpoint)
            self._set_rates()

    def _set_rates(self) -> None:
        """Set the learning rates of the next step to those of this run's schedule, whose length may have changed."""
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        if isinstance(schedule, LambdaLR):
            rates = [
                base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            ]
            for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates

    def _restore_state(self, state: dict[str, Any], checkpoint: str) -> None:
        if not self.args.ignore_data_skip:
            check_same_run(checkpoint, {}, {PLAN: self._order()[PLAN]})  # not known earlier
        self._total_train_tokens = state["num_tokens"]
        self._whole_run = state["whole_run"]
        if self._bad_records is not None and state.get("bad_records"):
            self._bad_records.restore(state["bad_records"])
        # Rank 0 gets the sums of all ranks, the others zeros, since all take part in the next reading.
        self._meters["train"].restore(state["window"], share=float(self.accelerator.process_index == 0))

    def _check_identity(self, checkpoint: str) -> None:
        """Refuse a model with other weights, where a checkpoint does not hold them, than the run started from."""
        saved = load_state(checkpoint).get("start")
        if saved is not None and saved != self._start_identity and self.accelerator.process_index == 0:
            raise ValueError(
                f"The run that wrote {checkpoint} started from another model than the one passed here, and a checkpoint does not "
                "hold it (the reference, or the weights that are not trained). Pass the model that the run started from, not its "
                "checkpoint, and resume."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_identity(resume_from_checkpoint)
        self._load(resume_from_checkpoint, partial(super()._load_from_checkpoint, resume_from_checkpoint, model))

    def _load_best_model(self) -> None:
        self._load(self.state.best_model_checkpoint, super()._load_best_model)

    def _load(self, checkpoint: str, with_transformers: Callable[[], None]) -> None:
        """Load the weights strictly where this process holds all of them; adapters by peft, once they are checked."""
        if self._holds_whole_model() and not is_peft_model(self.model):
            return load_weights(self.model, checkpoint)
        if self._holds_whole_model():
            check_adapter(self.model, checkpoint)
        return with_transformers()

    def _holds_whole_model(self) -> bool:
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
