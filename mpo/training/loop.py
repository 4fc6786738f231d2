"""The training loop: which pairs count, what is logged, and how a run stops and resumes.

Private names of TRL and transformers that this file uses, checked on TRL 1.16.0 and transformers 5.17.0, 5.23.0 and 5.24.0:
`DPOTrainer._tp_size`, `_total_train_tokens`; `Trainer._get_num_items_in_batch`, `_get_grad_norm`, `_run_epoch`,
`_maybe_log_save_evaluate`, `_finalize_training`, `_get_dataloader`, `_remove_unused_columns`, `_train_batch_size`,
`_load_from_checkpoint`, `_load_best_model`, `_load_optimizer_and_scheduler`, `_load_callback_state`, `_save_checkpoint`,
`_save_rng_state`, `_get_output_dir`, `_get_eval_sampler`. It also relies on `evaluation_loop` gathering each batch's losses first,
then its rows. `mpo.training.mpo` says which other files use private names.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model, recursively_apply
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import DPOTrainer

from mpo.batching.attention import usual_attention
from mpo.batching.indexed import IndexedRecords
from mpo.batching.sampler import PairBatchSampler
from mpo.batching.streams import FilledStream, RepeatedStream
from mpo.data.encoded import with_encoded_images
from mpo.encoding.costs import measure
from mpo.losses import SFT, Mixture
from mpo.losses.quality import RewardShift
from mpo.training.bad_records import BadRecords
from mpo.training.checkpoint import (
    begin_checkpoint,
    check_adapter,
    complete_checkpoint,
    finish_checkpoint,
    flush_to_disk,
    load_state,
    load_weights,
    save_state,
)
from mpo.training.config import MPOConfig
from mpo.training.content import content_of
from mpo.training.finite import FiniteGuard
from mpo.training.metrics import Meter
from mpo.training.model_card import extend_card
from mpo.training.reference.cache import ReferenceCache
from mpo.training.resume import check_same_run, description
from mpo.training.samples.callback import SampleResponses
from mpo.training.start import fingerprint_of

logger = logging.getLogger(__name__)

PLAN = "plan of batches"
REFERENCE = "reference"  # folder of a checkpoint, for a reference that sync_ref_model updates


class PairLoop(DPOTrainer):  # type: ignore[misc]
    """Run DPOTrainer's loop with steps that are the mean over their pairs. `MPOTrainer` adds the loss."""

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole step

    args: MPOConfig
    mixture: Mixture
    data_collator: Any
    _collator_is_ours: bool
    layout: str

    def _start_loop(self) -> None:
        """Set up the state of the loop, once the accelerator exists.

        Raises:
            ValueError: for the router loss of a model that does not return router logits.
        """
        if self.aux_loss_enabled and self.model.config.model_type == "internvl":  # transformers 5.17 to 5.24
            raise ValueError(
                f"router_aux_loss_coef={self.router_aux_loss_coef:g} (default: the model's config) adds the router loss, and "
                "transformers' InternVL does not return router logits. Set router_aux_loss_coef=0."
            )
        self._meters = {"train": Meter(), "eval": Meter()}
        self._whole_run = [0.0, 0.0]  # sum of losses, number of pairs
        self._guard = FiniteGuard(self._over_ranks if self.accelerator.num_processes > 1 else None)
        self._mean_sqrt_tokens: Tensor | None = None
        self._shift_before: dict[str, Tensor] | None = None
        self._scale_before: float | None = None
        self._evaluated = "eval"  # prefix of the metrics of the data set in evaluation
        self._pairs_evaluated = 0
        self._is_reference: bool | None = None  # whether the policy is the reference, in this evaluation
        self._rows: tuple[int, list[int]] | None = (
            None  # batch in evaluation: number of pairs, and of those that count on each rank
        )
        self._loss_is_next = False  # whether `evaluation_loop` gathers losses next
        self._sampler: PairBatchSampler | None = None
        self._epoch = torch.zeros((), dtype=torch.int64)  # data loader workers read it
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._content: str | None = None  # of the training set, read when training begins
        unwrapped: Any = self.accelerator.unwrap_model(self.model)
        self._description = description(unwrapped, self.args, self.processing_class, self.optimizer)
        self._bad_records: BadRecords | None = None
        if self.args.on_bad_record == "skip":
            writes = self.is_world_process_zero()
            self._bad_records = BadRecords(self.args.output_dir, most=self.args.max_bad_fraction, writes=writes)

    @property
    def _shift(self) -> RewardShift | None:
        return self.mixture.reward_shift

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        """Set the models' attention for training and evaluation."""
        return contextlib.nullcontext()

    def _flush_references(self) -> None:
        """Write the reference log-probs that are still in memory."""

    # --- Batches

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep images encoded and repeat training streams. In evaluation, give every rank the same number of batches.

        Rows are padded where logits are needed, since logits of packed rows cannot be attributed to records.
        """
        if self._collator_is_ours:
            dataset = with_encoded_images(dataset)
        ranks = self.accelerator.num_processes
        if isinstance(dataset, IterableDataset):
            block = kwargs["batch_size"] * ranks
            is_training = kwargs.get("is_training")
            dataset = RepeatedStream(dataset, block) if is_training else FilledStream(dataset, block, fill=ranks > 1)

        if kwargs.get("is_training") and (self.args.batching == "tokens" or self.args.group_same_prompt > 1):
            if isinstance(dataset, IterableDataset):
                raise ValueError("A stream cannot be planned: use batching='pairs' and group_same_prompt=1, or a datasets.Dataset.")
            dataset = self._remove_unused_columns(dataset, description="training")  # otherwise they would be decoded
            self._sampler = self._plan(dataset)
            dataset, kwargs["sampler_fn"] = IndexedRecords(dataset, self._sampler, self._epoch), lambda _: self._sampler
        elif kwargs.get("is_training") and "augment" in (getattr(dataset, "column_names", None) or []):
            dataset = IndexedRecords(self._remove_unused_columns(dataset, description="training"), epoch=self._epoch)
        if kwargs.get("is_training") and self._sampler is None and self.args.dataloader_drop_last and hasattr(dataset, "__len__"):
            if len(dataset) < (needed := kwargs["batch_size"] * ranks):
                raise ValueError(
                    f"dataloader_drop_last=True drops all {len(dataset)} records: one batch of all ranks takes {needed} "
                    f"({kwargs['batch_size']} x {ranks}). Set it to False, or use smaller batches."
                )
        collator = self.data_collator
        try:
            if kwargs.get("is_training"):
                self.data_collator = self._training_collator()
            elif self._collator_is_ours and (self.compute_metrics is not None or kwargs.get("description") == "test"):
                self.data_collator = replace(self.data_collator, layout="padded")
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collator

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a data loader. With persistent workers transformers would return the first data set's for every data set."""
        if eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        options = {"description": "Evaluation", "batch_size": self.args.eval_batch_size, "sampler_fn": self._get_eval_sampler}
        return self._get_dataloader(dataset=eval_dataset, **options)

    def _whole_dataloader(self, dataset: Any) -> Any:
        """Return a data loader of all records of a data set, also with `dataloader_drop_last`."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return self.get_eval_dataloader(dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _training_collator(self) -> Any:
        """Return the collator of training batches. Evaluation and the reference cache use `data_collator`."""
        return self.data_collator

    def _plan(self, dataset: Any) -> PairBatchSampler:
        """Plan which pairs share a batch, on all ranks."""
        args = self.args
        by_tokens = args.batching == "tokens"
        with self.accelerator.main_process_first():  # the others find its measurements in the cache of datasets
            rules: dict[str, Any] = {
                "completion_end": args.completion_end,
                "tile_budget": args.tile_budget,
                "max_length": args.max_length,
            }
            rules["on_bad_record"] = args.on_bad_record
            costs = measure(dataset, self.processing_class, **rules)
        sampler = PairBatchSampler(
            costs,
            batching="tokens" if by_tokens else "pairs",
            pairs_per_batch=None if by_tokens else self._train_batch_size,
            max_tokens=args.max_tokens_per_batch,
            max_tiles=args.max_tiles_per_batch,
            group_same_prompt=args.group_same_prompt,
            micro_batches_per_step=args.gradient_accumulation_steps,
            world_size=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        if self.is_world_process_zero():
            logger.info(f"Batches: {sampler.report()}.")
        return sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step."""
        start = time.perf_counter()
        try:
            samples, pairs = super().get_batch_samples(epoch_iterator, num_batches, device)
            for batch in samples:
                self._see_bad_records("train", batch, step=self.state.global_step + 1, epoch=int(self._epoch))
            return samples, pairs
        except ValueError:
            raise  # its message says what to do
        except Exception as error:
            raise RuntimeError(
                f"Reading the batches of step {self.state.global_step + 1} from the training data failed: "
                f"{type(error).__name__}: {error}. No record was skipped. Fix the data set and resume from the last checkpoint."
            ) from error
        finally:
            self._meters["train"].wait(time.perf_counter() - start)

    def _run_epoch(self, *args: Any, epoch: int, **kwargs: Any) -> Any:
        """Set the epoch before the records are iterated. A resumed run that had ended takes no step."""
        stopped_early = kwargs["resume_from_checkpoint"] is not None and any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        if self.state.global_step >= self.state.max_steps or stopped_early:  # transformers would take one more step
            self.control.should_training_stop = True
            return None
        self._epoch.fill_(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def _counted(self, batch: dict[str, Any]) -> int:
        """Return how many of a batch's pairs count: the first ones. The rest are padding."""
        if "kept" in batch:  # bad records were removed: of the others, those in counting places count
            counting, kept = self._counting(batch), list(batch["kept"])
            return min(int(batch["counted"]), len([place for place in kept if place < counting]))
        return int(batch["counted"]) if "counted" in batch else self._counting(batch)

    def _counting(self, batch: dict[str, Any]) -> int:
        """Return how many places of a batch hold records that count: the first ones. The rest hold repeated records."""
        pairs = len(batch["labelled"].lengths) // 2
        state = self.accelerator.gradient_state
        ranks = self.accelerator.num_processes
        if ranks == 1 or not state.end_of_dataloader or isinstance(state.active_dataloader.dataset, IterableDataset):
            return pairs
        if self.args.dataloader_drop_last:  # the last incomplete batches are dropped, and nothing is repeated
            return pairs
        # The last batches of all ranks together hold the rest, rank 0's first. (`state.remainder` is lost in a resumed epoch.)
        rest = len(state.active_dataloader.dataset) % (pairs * ranks)
        return max(0, min(pairs, rest - int(self.accelerator.process_index) * pairs)) if rest else pairs

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """Return the pairs of an optimizer step over its micro-batches and all ranks, the denominator of its loss."""
        if not batch_samples:
            return None
        # Decided before the batches are used: later the data loader's end would be attributed to the first of them.
        if self._sampler is None:  # otherwise padding pairs have their own flag
            batch_samples[-1]["counted"] = self._counted(batch_samples[-1])
        chosen = [batch["labelled"].lengths.chunk(2)[0][: batch.get("counted")] for batch in batch_samples]
        lengths = torch.cat(chosen).to(device).float()
        shift = self._shift
        self._shift_before = None if shift is None else {name: value.clone() for name, value in shift.state_dict().items()}
        step = self._over_ranks(torch.stack([torch.ones_like(lengths).sum(), lengths.sqrt().sum()]))
        pairs = step[0].clamp_min(1)  # a step whose records are all bad has a loss of 0
        self._mean_sqrt_tokens = step[1] / pairs
        return pairs

    # --- Bad records

    def _see_bad_records(self, data: str, batch: dict[str, Any], **moment: Any) -> None:
        if self._bad_records is not None:
            bad = batch.get("bad", [])
            self._bad_records.see(data, batch.get("counted", len(batch["labelled"].lengths) // 2) + len(bad), bad, **moment)

    def _settle_bad_records(self, data: str = "train", dataset: Any = None) -> None:
        """List the bad records of all ranks, and stop the run if there are too many. Every rank must call it."""
        if self._bad_records is not None:
            dataset = self.train_dataset if data == "train" else dataset
            self._bad_records.settle({data: len(dataset) if hasattr(dataset, "__len__") else None})

    def _policy_is_reference(self, cache: ReferenceCache) -> bool:
        """Whether the policy still equals the reference of `cache`: before the first step, with the same weights and settings.

        Decided by content, once per evaluation: weights may have been loaded or changed since the trainer was made.
        """
        if self.model.training or self.state.global_step > 0 or not self._holds_whole_model() or is_peft_model(self.model):
            return False
        if self._is_reference is None:
            now = fingerprint_of(self.accelerator.unwrap_model(self.model), self.processing_class, self.args)
            self._is_reference = now.digest == cache.fingerprint.digest
        return self._is_reference

    # --- Evaluation of rows

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Evaluate a batch.

        Args:
            model: the policy.
            inputs: a batch of the collator. Its ``input_ids`` are reordered as the logits are.
            prediction_loss_only: return no logits.
            args: see transformers' `Trainer.prediction_step`.
            kwargs: likewise.

        Returns:
            the loss, and unless `prediction_loss_only` logits (2P, T, vocabulary) and input ids (2P, T): rows 2i and 2i + 1 are the
            chosen and the rejected completion of the batch's record i.

        Raises:
            ValueError: when logits of packed rows are needed.
        """
        self._see_bad_records(self._evaluated, inputs, step=self.state.global_step)
        if not prediction_loss_only and "segments" in inputs:
            raise ValueError(
                "Logits of packed rows cannot be attributed to records. Use `evaluate` or `predict`, which pad rows where logits "
                "are needed, or rows='padded'."
            )
        pairs, counted = len(inputs["labelled"].lengths) // 2, self._counted(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        self._rows = None
        if logits is None:
            return loss, None, None
        counts = self.accelerator.gather(torch.tensor([counted], device=self.accelerator.device)).tolist()
        self._rows, self._loss_is_next = (pairs, counts), True
        order = (
            torch.arange(2 * pairs, device=logits.device).view(2, pairs).T.flatten()
        )  # without rows that only hold a blank image
        inputs["input_ids"] = inputs["input_ids"][order.to(inputs["input_ids"].device)]
        return loss, logits[order], labels[order]

    def _gather_rows(self, values: Any) -> Any:
        """Gather a batch's losses (one per record) or rows (two per record) that count, over all ranks, in record order.

        transformers would count rows as records and drop some of an incomplete last batch.
        """
        if self._rows is None:
            return self.accelerator.gather(values)
        pairs, counts = self._rows
        if self._loss_is_next:
            values, self._loss_is_next, each = values[:1].repeat(pairs), False, 1
        else:
            each = 2
        places = [(rank * pairs + place) * each + row for rank, n in enumerate(counts) for place in range(n) for row in range(each)]
        return recursively_apply(lambda tensor: tensor[places], self.accelerator.gather(values))

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the logits of a data set's rows.

        Args:
            test_dataset: preference records.
            args: see transformers' `Trainer.predict`.
            kwargs: likewise.

        Returns:
            predictions (2 x records, T, vocabulary), label_ids (2 x records, T), the input ids of the same rows, and metrics. Rows
            2i and 2i + 1 are the chosen and the rejected completion of record i; bad records that were skipped have none.

        Raises:
            ValueError: when `dataloader_drop_last` would drop records.
        """
        batch = self.args.eval_batch_size * self.accelerator.num_processes
        if self.args.dataloader_drop_last and hasattr(test_dataset, "__len__") and len(test_dataset) % batch:
            raise ValueError(
                f"dataloader_drop_last=True would drop the last {len(test_dataset) % batch} of {len(test_dataset)} records: "
                f"batches of all ranks take {batch}. Set it to False."
            )
        return super().predict(test_dataset, *args, **kwargs)

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
            self._restore_delta(bad)
        return norm

    def _restore_delta(self, skipped: Tensor) -> None:
        """Restore delta to its value before the step if the step is not applied."""
        if self._shift is not None and self._shift_before is not None:
            for name, before in self._shift_before.items():
                buffer = self._shift.get_buffer(name)
                buffer.copy_(torch.where(skipped.to(buffer.device), before, buffer))

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The GradScaler lowers its scale when it skips a step. With a fused optimizer accelerate does not notice.
        scaler = self.accelerator.scaler
        is_lower = scaler is not None and self._scale_before is not None and scaler.get_scale() < self._scale_before
        if is_lower or self.accelerator.optimizer_step_was_skipped:
            self._restore_delta(torch.tensor(True))
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
        tokens, pairs = window.pop("tokens")
        if mode == "eval":
            self._pairs_evaluated = int(pairs)
        tokens /= self._tp_size  # tensor-parallel ranks get the same batch
        metrics = {name: total / count for name, (total, count) in window.items() if count}
        if mode == "eval" and self._square_weight is not None:
            metrics["loss"] += self._square_weight * metrics["loss/sft"]
        metrics["tokens_per_second"] = tokens / seconds
        metrics["pairs_per_second"] = pairs / seconds
        if mode == "train":
            metrics["data_wait"] = waited / seconds  # rank 0's; the GPU may still have been busy
        if self._shift is not None:
            metrics["reward_shift"] = self._shift.value.item()
        if mode == "train":
            self._whole_run = [total + new for total, new in zip(self._whole_run, window["loss"], strict=True)]
            self._total_train_tokens += int(tokens)
            metrics["num_tokens"] = self._total_train_tokens
        return metrics

    @property
    def _square_weight(self) -> float | None:
        """Return the weight of an SFT term averaged by square roots, whose average is that of a whole evaluation."""
        of_losses = zip(self.mixture.weights, self.mixture.losses, strict=True)
        return next((weight for weight, loss in of_losses if isinstance(loss, SFT) and loss.average == "square"), None)

    def _over_ranks(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        total: Tensor = self.accelerator.reduce(values.to(self.accelerator.device), reduction="sum")
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means over the pairs of this logging window and all ranks."""
        if "loss" in logs:  # a training window, not an evaluation
            logs = {**logs, **self._read_meter("train")}
            if self._bad_records is not None:
                logs["bad_records"] = self._bad_records.count("train")
        if "train_loss" in logs:  # the summary at the end, which `train` returns
            self._read_meter("train")
            total, pairs = self._whole_run
            logs["train_loss"] = total / max(pairs, 1)
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate. Every metric, including the loss, is the mean over pairs, independent of batch sizes."""
        self._evaluated = metric_key_prefix
        self._pairs_evaluated, self._is_reference = 0, None
        self.gather_function = self._gather_rows  # transformers restores its own at the end
        if self._bad_records is not None:
            self._bad_records.seen_again(metric_key_prefix)
        with self._not_counted(), self._attention():
            self._meters["eval"].clear()
            output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
            self._settle_bad_records(metric_key_prefix, dataloader.dataset)
            metrics = self._read_meter("eval")
            if self._bad_records is not None:
                metrics["bad_records"] = self._bad_records.count(metric_key_prefix)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output._replace(num_samples=self._pairs_evaluated)

    @contextlib.contextmanager
    def _not_counted(self) -> Iterator[None]:
        """Exclude the time spent in the context from the training speed."""
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

    # --- Training and checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train the policy.

        Args:
            resume_from_checkpoint: True to resume from the newest complete checkpoint in ``output_dir``, or the folder of a
                checkpoint.
            args: see transformers' `Trainer.train`.
            kwargs: likewise.

        Returns:
            steps, metrics and the loss: the mean over all pairs of the run, including those before it was resumed.

        Raises:
            ValueError: when there is no complete checkpoint to resume from, a file of it is truncated, or the run that wrote it had
                other settings (`mpo.training.resume`) or other records (`mpo.training.content`).
            FloatingPointError: when a loss or gradient was not finite.
        """
        self._content = content_of(self.train_dataset) if self.train_dataset is not None else None
        if resume_from_checkpoint:
            asked = None if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = complete_checkpoint(self.args.output_dir, asked)
            order = {} if self.args.ignore_data_skip else {name: value for name, value in self._order().items() if name != PLAN}
            check_same_run(resume_from_checkpoint, self._description, order)
        self._meters["train"].clear()
        self._guard.clear()
        self._whole_run = [0.0, 0.0]
        if self._bad_records is not None and not resume_from_checkpoint:
            self._bad_records.clear()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SampleResponses):
                callback.trainer = self
        with self._attention():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._guard.check()
        self._settle_bad_records()
        self._flush_references()
        return super()._finalize_training(*args, **kwargs)

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
                if self.args.sync_ref_model:
                    self.accelerator.unwrap_model(self.ref_model).save_pretrained(os.path.join(folder, REFERENCE))
            self.state.save_to_json = partial(finish_checkpoint, self.state)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                del self.state.save_to_json

    def _save_rng_state(self, output_dir: str) -> None:
        """Wait for the files of all ranks before rank 0 writes the last one."""
        super()._save_rng_state(output_dir)
        flush_to_disk(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_callback_state(self) -> None:
        """Restore the state of callbacks (early stopping's patience), with this run's settings.

        With `restore_callback_states_from_checkpoint`, transformers restores their settings too.
        """
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
        shift = self._shift
        return {
            "reward_shift": {} if shift is None else {name: value.item() for name, value in shift.state_dict().items()},
            "num_tokens": self._total_train_tokens,
            "window": self._meters["train"].state(self._over_ranks),
            "whole_run": self._whole_run,
            "order": self._order(),
            "bad_records": None if self._bad_records is None else self._bad_records.state(),
        }

    def _order(self) -> dict[str, Any]:
        """Return what determines which pairs a step gets."""
        sized = hasattr(self.train_dataset, "__len__")
        return {
            "pairs in the data set": len(self.train_dataset) if sized else None,
            "content of the data set": self._content,
            "pairs per step": self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
            PLAN: None if self._sampler is None else self._sampler.identity,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_state(checkpoint)
        if not self.args.ignore_data_skip:
            check_same_run(checkpoint, {}, {PLAN: self._order()[PLAN]})  # not known earlier
        self._total_train_tokens = state["num_tokens"]
        self._whole_run = state["whole_run"]
        if self._bad_records is not None and state.get("bad_records"):
            self._bad_records.restore(state["bad_records"])
        # Rank 0 gets the sums of all ranks, the others zeros, since all take part in the next reading.
        self._meters["train"].restore(state["window"], share=float(self.accelerator.process_index == 0))
        shift = self._shift
        if shift is not None:
            shift.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in state["reward_shift"].items()})
        if self.args.sync_ref_model:
            load_weights(self.accelerator.unwrap_model(self.ref_model), os.path.join(checkpoint, REFERENCE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._holds_whole_model() and is_peft_model(self.model):
            check_adapter(self.model, resume_from_checkpoint)
        if self._holds_whole_model() and not is_peft_model(self.model):
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._holds_whole_model() and is_peft_model(self.model):
            check_adapter(self.model, best)
        if self._holds_whole_model() and not is_peft_model(self.model):
            load_weights(self.model, best)
        else:
            super()._load_best_model()

    def _holds_whole_model(self) -> bool:
        """Whether this process holds all weights, not a shard of them."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # --- Model card

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, with the loss, its weights, the data and this library's version."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir, "README.md")
        if self.is_world_process_zero() and path.exists():
            settings = {name: getattr(self.args, name) for name in ("beta", "reward_shift", "sft_average", "learning_rate")}
            path.write_text(extend_card(path.read_text(), self.mixture, settings, self._order()["pairs in the data set"]))
