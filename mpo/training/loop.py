"""The training loop that trainers of pairs and of conversations share: what is logged, and how a run starts and stops."""

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_utils import TrainOutput

from mpo.batching.attention import usual_attention
from mpo.batching.batch import Batch
from mpo.training.bad_records import BadRecords
from mpo.training.checkpoint import complete_checkpoint
from mpo.training.content import content_of
from mpo.training.evaluating import Evaluates
from mpo.training.finite import FiniteGuard
from mpo.training.loading import LoadsBatches
from mpo.training.metrics import Fraction, Meter
from mpo.training.model_card import extend_card
from mpo.training.resuming import PLAN, Resumes
from mpo.training.same_run import check_same_run, description
from mpo.training.samples.callback import UsesTrainer
from mpo.training.start import adds_router_loss

logger = logging.getLogger(__name__)


class Loop(LoadsBatches, Evaluates, Resumes):
    """Run the loop of a TRL trainer, which comes after this class among the bases, with steps that are the mean over records.

    A trainer adds its loss, in `_loss`, and calls `_start_loop` at the end of its construction. Its arguments are a
    `mpo.training.loop_config.LoopConfig`.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the records of the whole step
    unit = "pairs"  # what a record is, in the names of metrics
    in_card: ClassVar[tuple[str, ...]]  # settings in the model card

    layout: str

    def _start_loop(self) -> None:
        """Set up the loop's state, once the accelerator exists. Raises ValueError for a router loss without router logits."""
        self.aux_loss_enabled = adds_router_loss(self.model.config, self.args)
        self._meters = {"train": Meter(), "eval": Meter()}
        self._whole_run = [0.0, 0.0]  # sum of losses, and of their weights
        self._trained_records = 0.0  # since `train` was called
        self._guard = FiniteGuard(self._over_ranks if self.accelerator.num_processes > 1 else None)
        self._mean_sqrt_tokens: Tensor | None = None
        self._scale_before: float | None = None
        self._evaluated = "eval"  # prefix of the metrics of the data set in evaluation
        self._evaluated_records = 0
        # The batch in evaluation: number of records, of completions per record, and of records that count on each rank.
        self._rows: tuple[int, int, list[int]] | None = None
        self._loss_is_next = False  # whether `evaluation_loop` gathers losses next
        self._sampler = None
        self._epoch = torch.zeros((), dtype=torch.int64)  # data loader workers read it
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._content: str | None = None  # of the training set, read when training begins
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        self._description = description(unwrapped, self.args, self.processing_class, self.optimizer)
        self._bad_records: BadRecords | None = None
        if self.args.on_bad_record == "skip":
            writes = self.is_world_process_zero()
            self._bad_records = BadRecords(self.args.output_dir, most=self.args.max_bad_fraction, writes=writes)

    def _flush_references(self) -> None:
        """Write the reference log-probs that are still in memory."""

    def _before_step(self) -> None:
        """Keep what `_undo_step` restores. Called before the first micro-batch of a step."""

    def _undo_step(self, skipped: Tensor) -> None:
        """Restore what the step's forward passes changed, if `skipped`, a boolean scalar."""

    # --- Loss

    def _loss(
        self, outputs: Any, batch: Batch, counted: int, step: Tensor | None
    ) -> tuple[Tensor, float | Tensor, Mapping[str, Fraction]]:
        """Compute the loss of `counted` records, a factor for its gradient, and metrics; `step`: from `_step_denominator`."""
        raise NotImplementedError

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        """Compute the loss of a micro-batch: its part of the mean over the records of the whole step, or in evaluation its mean.

        Args:
            return_outputs: also return the model's outputs (with logits, from a second forward pass).
            num_items_in_batch: weights of the records of the optimizer step, summed over all micro-batches and ranks: of pairs
                their number, of conversations that of `PackedSFTConfig.weights`.
        """
        training = self.model.training
        if training:
            self._verify(inputs)
        outputs = self._outputs(model, inputs, **({"output_router_logits": True} if self.aux_loss_enabled else {}))
        counted = self._counted(inputs) if not training else inputs.size if inputs.counted is None else inputs.counted
        loss, factor, metrics = self._loss(outputs, inputs, counted, num_items_in_batch if training else None)
        self._meters["train" if training else "eval"].add(metrics)
        if training:
            self._guard.see_loss(self.state.global_step + 1, inputs.names, loss)
        if not return_outputs:
            return loss * factor
        with torch.no_grad():
            return loss * factor, model(**inputs.model_inputs, use_cache=False)

    # --- Values that are not finite

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Keep the optimizer from a step that is not finite. (In fp16 the GradScaler handles overflowing gradients.)"""
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):  # FSDP2
            norm = norm.full_tensor()
        if not self.is_deepspeed_enabled:
            scaled = self.accelerator.scaler is not None
            if scaled:
                self._scale_before = self.accelerator.scaler.get_scale()
            else:
                self._guard.see_gradients(norm)
            bad = self._guard.is_bad()
            optimizer: Any = self.optimizer
            self._guard.gate(getattr(optimizer, "optimizer", optimizer), bad, on_device=not scaled)
            self._undo_step(bad)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The GradScaler lowers its scale when it skips a step. With a fused optimizer accelerate does not notice.
        scaler = self.accelerator.scaler
        is_lower = scaler is not None and self._scale_before is not None and scaler.get_scale() < self._scale_before
        if is_lower or self.accelerator.optimizer_step_was_skipped:
            self._undo_step(torch.tensor(True))
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._guard.check()
            self._settle_bad_records()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # --- Logs

    def _read_meter(self, mode: str) -> dict[str, float]:
        meter = self._meters[mode]
        seconds, waited = meter.seconds, meter.waited
        window = meter.read(self._over_ranks)
        if not window:
            return {}
        tokens, records = window.pop("tokens")
        if mode == "eval":
            self._evaluated_records = int(records)
        tokens /= self._tp_size  # tensor-parallel ranks get the same batch
        metrics = {name: total / count for name, (total, count) in window.items() if count}
        metrics["tokens_per_second"] = tokens / seconds
        metrics[f"{self.unit}_per_second"] = records / seconds
        if mode == "train":
            metrics["data_wait"] = waited / seconds  # rank 0's; the GPU may still have been busy
        if mode == "train":
            self._whole_run = [total + new for total, new in zip(self._whole_run, window["loss"], strict=True)]
            self._trained_records += records
            self._total_train_tokens += int(tokens)
            metrics["num_tokens"] = self._total_train_tokens
        return metrics

    def _over_ranks(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means over the records of this logging window and all ranks."""
        if "loss" in logs:  # a training window, not an evaluation
            logs = {**logs, **self._read_meter("train")}
            if self._bad_records is not None:
                logs["bad_records"] = self._bad_records.count("train")
        if "train_loss" in logs:  # the summary at the end, which `train` returns
            self._read_meter("train")
            total, weight = self._whole_run
            logs["train_loss"] = total / max(weight, 1)
            # transformers multiplies steps by a fixed batch size
            logs["train_samples_per_second"] = round(self._trained_records / max(logs["train_runtime"], 1e-4), 3)
        super().log(logs, start_time)

    @contextlib.contextmanager
    def _not_counted(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._meters["train"].pause(time.perf_counter() - start)

    @contextlib.contextmanager
    def generating(self) -> Iterator[tuple[nn.Module, bool]]:
        """Prepare the policy for `generate`; yields it, and whether its weights are sharded, so that all ranks must call it."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        sharded = self.accelerator.num_processes > 1 and (not self._holds_whole_model() or self._tp_size > 1)
        plain = torch.compiler.set_stance("force_eager")  # otherwise every length of the KV cache might be compiled
        with self._not_counted(), usual_attention(model), self.accelerator.autocast(), plain:
            yield model, sharded

    # --- Training

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the policy.

        Args:
            resume_from_checkpoint: True to resume from the newest complete checkpoint in ``output_dir``, or the folder of a
                checkpoint.
            args: see transformers' `Trainer.train`.

        Returns:
            steps, metrics and the loss: the mean over all records of the run, including those before it was resumed.

        Raises:
            ValueError: when there is no complete checkpoint to resume from, a file of it is truncated, or the run that wrote it had
                other settings (`mpo.training.same_run`) or other records (`mpo.training.content`).
            FloatingPointError: when a loss or gradient was not finite.
        """
        self._check_features()
        self._content = content_of(self.train_dataset) if self.train_dataset is not None else None
        if resume_from_checkpoint:
            asked = None if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = complete_checkpoint(self.args.output_dir, asked)
            order = {} if self.args.ignore_data_skip else {name: value for name, value in self._order().items() if name != PLAN}
            check_same_run(resume_from_checkpoint, self._description, order)
        self._meters["train"].clear()
        self._guard.clear()
        self._whole_run, self._trained_records = [0.0, 0.0], 0.0
        if self._bad_records is not None and not resume_from_checkpoint:
            self._bad_records.clear()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, UsesTrainer):
                callback.trainer = self
        with self._attention():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _loss_in_card(self) -> Mapping[str, float] | str:
        raise NotImplementedError

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, with the loss, the data and this library's version."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir, "README.md")
        if self.is_world_process_zero() and path.exists():
            settings = {name: getattr(self.args, name) for name in self.in_card}
            settings["preference pairs" if self.unit == "pairs" else self.unit] = self._order()[f"{self.unit} in the data set"]
            path.write_text(extend_card(path.read_text(), self._loss_in_card(), settings))

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Make the schedule of the learning rate, as transformers' `Trainer` does, and warn when it is all warm-up."""
        if (reason := self.args.only_warms_up(num_training_steps)) is not None and self.lr_scheduler is None:
            logger.warning(reason)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._guard.check()
        self._settle_bad_records()
        self._flush_references()
        return super()._finalize_training(*args, **kwargs)
