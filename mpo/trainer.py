"""MPOTrainer: TRL's DPOTrainer with the loss of `mpo.losses`.

This is the only file that uses names private to TRL and transformers. They were checked against TRL 1.16.0 and transformers
5.17.0 and 5.23.0: `DPOTrainer._prepare_dataset`, `_set_signature_columns_if_needed`, `_metrics`, `_tp_size`, `_total_train_tokens`,
`aux_loss_enabled`, `create_model_from_path`, `get_config_model_id`, `use_adapter`, `disable_gradient_checkpointing`;
`Trainer._get_num_items_in_batch`, `_get_grad_norm`, `_maybe_log_save_evaluate`, `_finalize_training`, `_get_dataloader`,
`_load_from_checkpoint`, `_load_best_model`, `_load_optimizer_and_scheduler`, `_save_checkpoint`, `_save_rng_state`,
`_get_output_dir`.
"""

import contextlib
import copy
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import AutoProcessor, PreTrainedModel, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput
from trl import DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from mpo.checkpoint import check_adapter, complete_checkpoint, load_state, load_weights, save_state
from mpo.config import MPOConfig
from mpo.finite import FiniteGuard
from mpo.losses import PairLogps
from mpo.metrics import Fraction, Meter
from mpo.model_card import extend_card
from mpo.models.fit import check_fit
from mpo.packing.collator import PairCollator
from mpo.packing.logps import sum_answers
from mpo.packing.streams import FILLER, FilledStream, RepeatedStream

logger = logging.getLogger(__name__)

REFERENCE = "reference"  # folder of a checkpoint, for a reference that moves

_NOT_FOR_THE_MODEL = {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", "is_cut", "counted", "names"}


class MPOTrainer(DPOTrainer):  # type: ignore[misc]
    """Trains a model with Mixed Preference Optimization (arXiv 2411.10442), or with any mixture of preference losses.

    It takes what TRL's `DPOTrainer` takes and can stand in its place; only the configuration is an `MPOConfig`. What differs:

    * The loss of an optimiser step is the mean over its pairs, however they are split over micro-batches and ranks.
    * The reference of a full fine-tuning run is a copy of the model as it was handed over, not a reload by its name.
    * No pair counts twice: what accelerate repeats to give every rank an equal number of batches counts nothing.
    * A run that was killed goes on bitwise as if it had not been: the reward shift delta of BCO and the logging window are part
      of every checkpoint, weights are restored strictly, and a half-written checkpoint is never resumed from.
    * A loss or gradient that is not finite stops the run at the next logging or saving step, before anything is saved.
    * Each term of the loss is logged under its own name: ``loss/sigmoid``, ``loss/bco_pair``, ``loss/sft``.
    * ``disable_dropout`` leaves the dropout of adapters on.

    Example:
        >>> from mpo import MPOConfig, MPOTrainer  # doctest: +SKIP
        >>> trainer = MPOTrainer(  # doctest: +SKIP
        ...     model="OpenGVLab/InternVL3-1B-hf", args=MPOConfig("runs/mpo"), train_dataset=pairs
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole step

    _tag_names = ["trl", "mpo"]
    _name = "MPO"
    _paper = {
        "title": "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization",
        "id": "2411.10442",
        "citation": (
            "@article{wang2024mpo,\n"
            "    title  = {{Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference "
            "Optimization}},\n"
            "    author = {Weiyun Wang and Zhe Chen and Wenhai Wang and Yue Cao and Yangzhou Liu and Zhangwei Gao and Jinguo Zhu "
            "and Xizhou Zhu and Lewei Lu and Yu Qiao and Jifeng Dai},\n"
            "    year   = 2024,\n"
            "    eprint = {arXiv:2411.10442},\n"
            "}"
        ),
    }

    def __init__(
        self,
        model: Any,
        ref_model: PreTrainedModel | None = None,
        args: MPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = MPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-MPO")
        if not isinstance(args, MPOConfig):
            raise ValueError(
                f"MPOTrainer takes an MPOConfig, got {type(args).__name__}. MPOConfig has the same fields: replace the name "
                "(and pass loss_type to keep a loss other than MPO)."
            )
        if processing_class is None:
            processing_class = _load_processing_class(model, args)
        if args.model_init_kwargs is not None and not isinstance(model, str):
            raise ValueError(
                "model_init_kwargs say how to load a model, and this one is loaded already. Pass them where you load it, or "
                "pass its name."
            )
        self._collator_is_ours = data_collator is None
        if self._collator_is_ours:
            evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            for name, dataset in {"train_dataset": train_dataset, **evaluated}.items():
                _check_columns(dataset, name)
        if data_collator is None:
            if args.pad_token is not None:
                getattr(processing_class, "tokenizer", processing_class).pad_token = args.pad_token
            data_collator = PairCollator(
                processing_class,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                answer_end=args.answer_end,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        # What a fully trained policy starts from is kept before anything changes it. ZeRO-3 holds parameters in pieces that
        # cannot be copied, so there TRL loads the reference once more by its name.
        trains_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
        copies = ref_model is None and not trains_adapter and not args.precompute_ref_log_probs and not is_deepspeed_zero3_enabled()
        starts_from_reference = ref_model is None
        with contextlib.ExitStack() as undo:
            if copies:
                if isinstance(model, str):
                    model = _load_model(model, args, quantization_config)
                    undo.enter_context(_temporarily(args, model_init_kwargs=None))  # used up
                ref_model = frozen_copy(model)
            undo.enter_context(_temporarily(args, disable_dropout=False))  # TRL's would reach into adapters too
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        check_fit(self.model, processing_class)
        if args.sync_ref_model and not args.mixture().needs_reference:
            raise ValueError(f"sync_ref_model has no effect: none of the losses {args.loss_type} has a reference. Leave it out.")
        if args.disable_dropout:
            disable_dropout_outside_adapters(self.model)
            if self.ref_model is not None:
                disable_dropout_outside_adapters(self.ref_model)
        self.ref_model: PreTrainedModel | None
        self.mixture = args.mixture().to(self.accelerator.device)
        if not self.mixture.needs_reference:
            self.ref_model = None
        self._meters = {"train": Meter(), "eval": Meter()}
        self._whole_run = [0.0, 0.0]  # sum of losses, number of pairs
        self._guard = FiniteGuard(self._over_ranks if self.accelerator.num_processes > 1 else None)
        self._mean_sqrt_tokens: Tensor | None = None
        self._shift_before: dict[str, Tensor] | None = None
        self._start_is_unchecked = starts_from_reference and self.mixture.needs_reference

    # --- Batches

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Leave records as they are, since our collator reads them. A collator of the user's gets TRL's columns."""
        if self._collator_is_ours:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._collator_is_ours:
            ours = ["id", "prompt", "chosen", "rejected", "image", "images", "tools", "chat_template_kwargs", FILLER]
            self._signature_columns = [*ours, "ref_chosen_logps", "ref_rejected_logps"]

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Streams are repeated for training; for evaluation, every rank gets equally many batches."""
        if isinstance(dataset, IterableDataset):
            ranks = self.accelerator.num_processes
            if kwargs.get("is_training"):
                dataset = RepeatedStream(dataset)
            elif ranks > 1:
                dataset = FilledStream(dataset, kwargs["batch_size"] * ranks)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step."""
        try:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError:
            raise  # a refusal that says what to do
        except Exception as error:
            raise RuntimeError(
                f"The training data failed while the batches of step {self.state.global_step + 1} were read: "
                f"{type(error).__name__}: {error}. Nothing was skipped; mend the data set and resume from the last checkpoint."
            ) from error

    def _counted(self, batch: dict[str, Any]) -> int:
        """How many of a batch's pairs count, the first ones; the rest were repeated to fill it up."""
        pairs = len(batch["input_ids"]) // 2
        if "counted" in batch:
            return int(batch["counted"])
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return pairs
        # The last batches of all ranks together hold `remainder` pairs, rank 0's first.
        return max(0, min(pairs, state.remainder - self.accelerator.process_index * pairs))

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor | None:
        """The pairs of an optimiser step, over its micro-batches and all ranks: what its loss is divided by."""
        if not batch_samples:
            return None
        # This is asked before the batches are used: by then the data loader's end would be behind the first of them.
        batch_samples[-1]["counted"] = self._counted(batch_samples[-1])
        lengths = torch.cat([_chosen_lengths(batch)[: batch.get("counted")] for batch in batch_samples]).to(device)
        shift = self.mixture.reward_shift
        self._shift_before = None if shift is None else {name: value.clone() for name, value in shift.state_dict().items()}
        step = self._over_ranks(torch.stack([torch.ones_like(lengths).sum(), lengths.sqrt().sum()]))
        self._mean_sqrt_tokens = step[1] / step[0]
        return step[0]

    # --- Log-probs

    def _outputs(self, model: nn.Module, inputs: dict[str, Any], **kwargs: Any) -> Any:
        """Run `model` on a batch; its fused head gives per-token log-probs (rows, tokens - 1), zero where not scored."""
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        of_model = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
        return model(**of_model, **kwargs, labels=labels, use_cache=False, fused_lm_head=True)

    def _answer_sums(self, outputs: Any, inputs: dict[str, Any], ld_alpha: float | None) -> tuple[Tensor, Tensor]:
        """Log-prob sums of the chosen and the rejected answers, each of shape (pairs,), float32."""
        scored = inputs["completion_mask"][:, 1:]
        # Prompt-learning adapters put virtual tokens in front.
        chosen, rejected = sum_answers(outputs.log_probs[:, -scored.size(1) :], scored, ld_alpha).chunk(2)
        return chosen, rejected

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-prob sums of a batch under the reference.

        Args:
            model: the reference model, or the policy when its adapters are to be switched off for this.
            inputs: a batch of `PairCollator`, on the model's device.

        Returns:
            sums of the chosen and of the rejected answers, shape (pairs,), float32.
        """
        adapter: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            # A pretrained adapter that is trained on has its start kept under the name "ref".
            adapter = use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None)
        checkpointing_off = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        with torch.no_grad(), checkpointing_off, adapter, self.accelerator.autocast():
            return self._answer_sums(self._outputs(model, inputs), inputs, self.ld_alpha)

    def _reference_sums(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if self.precompute_ref_logps:
            return inputs["ref_chosen_logps"].float(), inputs["ref_rejected_logps"].float()
        if not self.mixture.needs_reference:
            return None, None
        return self.compute_ref_log_probs(self.ref_model or self.model, inputs)

    def _pairs(self, outputs: Any, inputs: dict[str, Any], mean_sqrt_tokens: Tensor | None) -> PairLogps:
        chosen, rejected = self._answer_sums(outputs, inputs, self.ld_alpha)
        ref_chosen, ref_rejected = self._reference_sums(inputs)
        lengths = inputs["completion_mask"][:, 1:].sum(dim=1)
        chosen_tokens, rejected_tokens = lengths.chunk(2)
        weight = None
        if self.use_weighting:  # WPO, arXiv 2406.11827, equation 2
            scored = inputs["completion_mask"][:, 1:]
            token_weights = outputs.log_probs - outputs.log_sum_sq_probs
            mean = sum_answers(token_weights[:, -scored.size(1) :], scored) / lengths.clamp_min(1)
            chosen_weight, rejected_weight = mean.detach().exp().chunk(2)
            weight = chosen_weight * rejected_weight
        return PairLogps(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_tokens,
            rejected_tokens,
            weight,
            sft_chosen=None if self.ld_alpha is None else self._answer_sums(outputs, inputs, None)[0],
            mean_sqrt_tokens=mean_sqrt_tokens,
        )

    # --- Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """The loss of a micro-batch: its pairs' sum over the pairs of the whole step (in training), or their mean.

        Args:
            model: the policy.
            inputs: a batch of `PairCollator`.
            return_outputs: return the model's outputs (with logits, from a second forward) too.
            num_items_in_batch: pairs of the optimiser step over all micro-batches and ranks.
        """
        mode = "train" if self.model.training else "eval"
        kwargs = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self._outputs(model, inputs, **kwargs)
        step_wide = mode == "train" and num_items_in_batch is not None
        counted = self._counted(inputs) if mode == "eval" else inputs.get("counted", len(inputs["input_ids"]) // 2)
        pairs = self._pairs(outputs, inputs, self._mean_sqrt_tokens if step_wide else None).first(max(counted, 1))
        if self._start_is_unchecked and mode == "train":
            self._check_start(pairs)
        self.mixture.train(mode == "train" and counted > 0)
        mixed = self.mixture(pairs)
        shift = self.mixture.reward_shift
        if mode == "train" and not counted and shift is not None:
            shift.train()(pairs.chosen[:0])  # nothing to add, but the other ranks wait for it
        # Gradients are averaged over ranks, so a rank's share of the step's mean counts once per rank.
        share = counted * self.accelerator.num_processes / num_items_in_batch if step_wide else 1.0
        loss = mixed.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._meters[mode].add(self._measure(loss, mixed.terms, pairs, outputs, inputs, counted))
        if mode == "train":
            self._guard.see_loss(self.state.global_step + 1, inputs.get("names", []), loss)
        if not return_outputs:
            return loss * share
        with torch.no_grad():
            of_model = {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL}
            return loss * share, model(**of_model, use_cache=False)

    def _check_start(self, pairs: PairLogps) -> None:
        """A fresh run starts as its own reference: L - L_g = 0.8 ln 2 + 0.2 * 2 ln 2. Say so if this one does not."""
        self._start_is_unchecked = False
        if self.state.global_step > 0 or pairs.ref_chosen is None or _has_dropout(self.model):
            return
        with torch.no_grad():
            rewards = self.beta * torch.cat([pairs.chosen_logratio, pairs.rejected_logratio])
            largest = rewards.abs().max().item()
        if largest > 0.1:
            logger.warning(
                "At the first step the policy should give the same log-probs as its reference, but a reward is already "
                f"{largest:.3f} (expected 0). Something differs between the two: randomness in the forward pass, an adapter "
                "that does not start at zero, or reference log-probs of another model or template."
            )

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Keep the optimiser from a step that is not finite. (Under fp16 an overflow is the scaler's matter.)"""
        norm = super()._get_grad_norm(model, grad_norm)
        if self.accelerator.scaler is None and not self.is_deepspeed_enabled:
            self._guard.see_gradients(norm)
            bad = self._guard.is_bad()
            self._guard.gate(getattr(self.optimizer, "optimizer", self.optimizer), bad)
            for name, before in (self._shift_before or {}).items():  # delta belongs to the step too
                buffer = self.mixture.reward_shift.get_buffer(name)
                buffer.copy_(torch.where(bad, before, buffer))
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self._guard.check()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # --- Logs

    def _measure(
        self,
        loss: Tensor,
        terms: dict[str, Tensor],
        pairs: PairLogps,
        outputs: Any,
        inputs: dict[str, Any],
        counted: int,
    ) -> dict[str, Fraction]:
        """Sums and counts of one micro-batch, by the names they are logged under."""
        count = len(pairs)
        measured: dict[str, Fraction] = {"loss": (loss * count, count)}
        measured |= {f"loss/{name}": (value * count, count) for name, value in terms.items()}
        if pairs.ref_chosen is not None:
            chosen, rejected = self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio
            measured |= {
                "rewards/chosen": (chosen.sum(), count),
                "rewards/rejected": (rejected.sum(), count),
                "rewards/margins": ((chosen - rejected).sum(), count),
                "rewards/accuracies": ((chosen > rejected).sum(), count),
            }
        scored = inputs["completion_mask"][:, 1:].bool()

        def halves(values: Tensor) -> tuple[Tensor, Tensor]:
            chosen, rejected = values[:, -scored.size(1) :].chunk(2)
            return chosen[:count], rejected[:count]

        chosen_scored, rejected_scored = halves(scored)
        chosen_logits, rejected_logits = halves(outputs.mean_logits * scored)
        entropy = sum(half.sum() for half in halves(outputs.entropy * scored))
        chosen_tokens, rejected_tokens = pairs.chosen_tokens.sum(), pairs.rejected_tokens.sum()
        measured |= {
            "logps/chosen": (pairs.chosen.sum(), count),
            "logps/rejected": (pairs.rejected.sum(), count),
            "answer_tokens/chosen": (chosen_tokens, count),
            "answer_tokens/rejected": (rejected_tokens, count),
            "logits/chosen": (chosen_logits.sum(), chosen_tokens),
            "logits/rejected": (rejected_logits.sum(), rejected_tokens),
            "mean_token_accuracy": ((halves(outputs.is_top1)[0] & chosen_scored).sum(), chosen_tokens),
            "entropy": (entropy, chosen_tokens + rejected_tokens),
            "tokens": (sum(half.sum() for half in halves(inputs["attention_mask"][:, 1:])) + 2 * count, count),
        }
        if "is_cut" in inputs:
            measured["answers_cut"] = (sum(half[:count].sum() for half in inputs["is_cut"].chunk(2)), 2 * count)
        if self.aux_loss_enabled:
            measured["aux_loss"] = (outputs.aux_loss * count, count)
        # A batch of repeated pairs alone adds nothing, under the same names.
        return measured if counted else {name: (0.0, 0.0) for name in measured}

    def _read_meter(self, mode: str) -> dict[str, float]:
        meter = self._meters[mode]
        seconds = meter.seconds
        window = meter.read(self._over_ranks)
        if not window:
            return {}
        tokens, pairs = window.pop("tokens")
        tokens /= self._tp_size  # tensor-parallel ranks are given the same batch
        metrics = {name: total / count for name, (total, count) in window.items() if count}
        metrics["tokens_per_second"] = tokens / seconds
        metrics["pairs_per_second"] = pairs / seconds
        if self.mixture.reward_shift is not None:
            metrics["reward_shift"] = self.mixture.reward_shift.value.item()
        if mode == "train":
            self._whole_run = [total + new for total, new in zip(self._whole_run, window["loss"], strict=True)]
            self._total_train_tokens += int(tokens)
            metrics["num_tokens"] = self._total_train_tokens
        return metrics

    def _over_ranks(self, values: Tensor) -> Tensor:
        return self.accelerator.reduce(values, reduction="sum") if self.accelerator.num_processes > 1 else values

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding the means over the pairs of this logging window and all ranks."""
        if "loss" in logs:  # a training window, not an evaluation
            logs = {**logs, **self._read_meter("train")}
        if "train_loss" in logs:  # the summary at the end, which `train` returns
            self._read_meter("train")
            total, pairs = self._whole_run
            logs["train_loss"] = total / max(pairs, 1)
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Evaluate; every metric, the loss included, is the mean over pairs whatever the sizes of the batches."""
        with self._not_counted():
            self._meters["eval"].clear()
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            metrics = self._read_meter("eval")
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    @contextlib.contextmanager
    def _not_counted(self) -> Iterator[None]:
        """Keep the time spent in here out of the training speed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._meters["train"].pause(time.perf_counter() - start)

    # --- Training and checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True to go on from the newest checkpoint in ``output_dir`` that was written to its end, or
                the folder of a checkpoint.
            args: see transformers' `Trainer.train`.
            kwargs: likewise.

        Returns:
            steps, metrics and the loss: the mean over all pairs of the run, those before a resume included.

        Raises:
            ValueError: when there is no complete checkpoint to resume from, or it belongs to another run.
            FloatingPointError: when a loss or gradient was not finite.
        """
        if resume_from_checkpoint:
            asked = None if resume_from_checkpoint is True else resume_from_checkpoint
            resume_from_checkpoint = complete_checkpoint(self.args.output_dir, asked)
        self._meters["train"].clear()
        self._whole_run = [0.0, 0.0]
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._guard.check()
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self._not_counted():
            state = self._state()
            if self.args.should_save:
                folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
                save_state(folder, state)
                if self.args.sync_ref_model:
                    self.accelerator.unwrap_model(self.ref_model).save_pretrained(os.path.join(folder, REFERENCE))
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        """Let no rank's file be missing once rank 0 writes the last one."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        shift = self.mixture.reward_shift
        return {
            "reward_shift": {} if shift is None else {name: value.item() for name, value in shift.state_dict().items()},
            "num_tokens": self._total_train_tokens,
            "window": self._meters["train"].state(self._over_ranks),
            "whole_run": self._whole_run,
            "order": self._order(),
        }

    def _order(self) -> dict[str, Any]:
        """What decides which pairs a step gets."""
        sized = hasattr(self.train_dataset, "__len__")
        return {
            "pairs in the data set": len(self.train_dataset) if sized else None,
            "pairs per step": self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            "seed": self.args.seed if self.args.data_seed is None else self.args.data_seed,
        }

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_state(checkpoint)
        if not self.args.ignore_data_skip:
            for name, now in self._order().items():
                before = state["order"][name]
                if before != now:
                    raise ValueError(
                        f"The run that wrote {checkpoint} had {name} = {before}; this one has {now}, so it would go on with "
                        "other pairs than those still to come. Resume with the same, set ignore_data_skip=True to go "
                        "on from the data's start, or pass the folder as the model to begin a new run from its weights."
                    )
        self._total_train_tokens = state["num_tokens"]
        self._whole_run = state["whole_run"]
        if self.accelerator.process_index == 0:  # the sums are those of all ranks
            self._meters["train"].restore(state["window"])
        shift = self.mixture.reward_shift
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
        if self._holds_whole_model() and not is_peft_model(self.model):
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _holds_whole_model(self) -> bool:
        """Whether this process holds all weights itself, not a shard of them."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card: TRL's, with the loss, its weights, the data and this library's version."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir, "README.md")
        if self.is_world_process_zero() and path.exists():
            settings = {name: getattr(self.args, name) for name in ("beta", "reward_shift", "sft_average", "learning_rate")}
            path.write_text(extend_card(path.read_text(), self.mixture, settings, self._order()["pairs in the data set"]))


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` as it is now, in eval mode and without gradients."""
    twin: PreTrainedModel = copy.deepcopy(model)
    if not hasattr(model, "_hf_hook"):
        # A forward that an earlier trainer put on the instance would still run the original.
        twin.__dict__.pop("forward", None)
    return twin.eval().requires_grad_(False)


def disable_dropout_outside_adapters(model: nn.Module) -> None:
    """Set the dropout probability to 0, except in adapters: theirs was asked for with them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def _check_columns(dataset: Any, name: str) -> None:
    columns = getattr(dataset, "column_names", None)  # None: not known before a stream is read
    missing = [column for column in ("chosen", "rejected") if columns and column not in columns]
    if missing:
        hint = " Lines of MMPR are read with mpo.data.sources.load_pairs." if "question" in columns else ""
        raise ValueError(
            f"{name} has no column {' and no column '.join(map(repr, missing))}; it has {', '.join(columns)}. A preference record "
            f"needs 'chosen' and 'rejected', and 'prompt' unless both answers repeat it.{hint} "
            "(Rename others with dataset.rename_column.)"
        )


def _has_dropout(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def _chosen_lengths(batch: dict[str, Tensor]) -> Tensor:
    """Scored tokens of each chosen answer, shape (pairs,), float32."""
    scored = batch["completion_mask"]
    return scored[: len(scored) // 2, 1:].sum(dim=1).float()


def _load_processing_class(model: Any, args: MPOConfig) -> Any:
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    if not name:
        raise ValueError(
            "This model was built from a config, so its tokenizer or processor cannot be looked up by name. Pass it as "
            "`processing_class`."
        )
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def _load_model(name: str, args: MPOConfig, quantization_config: Any) -> PreTrainedModel:
    """Load a model to be trained as a whole, as TRL would."""
    if quantization_config is not None:
        raise ValueError(
            "A quantized model cannot be trained as a whole. Pass a `peft_config` to train an adapter on it (QLoRA), or drop "
            "`quantization_config`."
        )
    set_seed(args.seed)  # weights that the checkpoint lacks are drawn
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each rank holds the model on its own device
    return create_model_from_path(name, **kwargs)


@contextlib.contextmanager
def _temporarily(target: Any, **values: Any) -> Iterator[None]:
    before = {name: getattr(target, name) for name in values}
    for name, value in values.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
