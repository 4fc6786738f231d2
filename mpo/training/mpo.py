"""MPOTrainer: TRL's DPOTrainer with the loss of `mpo.losses`.

Private names of other libraries that the package uses: tests/test_private_names.py.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from mpo.batching.batch import Batch
from mpo.batching.collator import LabelledBatches
from mpo.encoding.turns import SIDES
from mpo.losses import SFT, PairLogps
from mpo.schema import TRL_COLUMNS, names
from mpo.training.checkpoint import load_weights
from mpo.training.config import MPOConfig
from mpo.training.loop import Loop
from mpo.training.metrics import measured
from mpo.training.model_card import MPO_PAPER
from mpo.training.policy import HasPolicy
from mpo.training.reference.adapters import identity
from mpo.training.reference.use import UsesReference
from mpo.training.start import check_apart, checked_arguments, collator_of, fingerprint_of, frozen_copy, load_processing_class

REFERENCE = "reference"  # folder of a checkpoint, for a reference that sync_ref_model updates


class MPOTrainer(UsesReference, HasPolicy, Loop, DPOTrainer):  # type: ignore[misc]
    """Train a model with Mixed Preference Optimization (arXiv 2411.10442), or with any mixture of preference losses.

    It takes the arguments of TRL's `DPOTrainer` and can replace it; the configuration is an `MPOConfig`. Differences from TRL:

    * The loss of an optimiser step is the mean over its pairs, however they are split over micro-batches and ranks.
    * The reference of a full fine-tuning run is a copy of the model that was passed, not a reload by its name.
    * No pair counts twice: pairs that accelerate repeats to give every rank an equal number of batches do not count.
    * A resumed run is bitwise equal to one that was not interrupted: every checkpoint holds the reward shift delta of BCO and the
      logging window, weights are restored strictly, and an incomplete checkpoint is never resumed from.
    * A loss or gradient that is not finite stops the run at the next logging or saving step, before anything is saved.
    * Each term of the loss is logged under its own name: ``loss/sigmoid``, ``loss/bco_pair``, ``loss/sft``; and ``data_wait``, the
      fraction of the time that steps waited for their batches.
    * ``disable_dropout`` leaves the dropout of adapters on.

    Example:
        >>> from mpo import MPOConfig, MPOTrainer  # doctest: +SKIP
        >>> trainer = MPOTrainer(  # doctest: +SKIP
        ...     model="OpenGVLab/InternVL3-1B-Instruct", args=MPOConfig("runs/mpo"), train_dataset=pairs
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "mpo"]
    _name = "MPO"
    _paper = MPO_PAPER
    in_card = ("beta", "reward_shift", "sft_average", "learning_rate")
    columns = (*names(encoded=True), *TRL_COLUMNS)
    needed = (SIDES,)

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
        args = checked_arguments(args, model)
        if processing_class is None:
            processing_class = load_processing_class(model, args)
        self._collator_is_ours = data_collator is None
        if self._collator_is_ours:
            train_dataset, eval_dataset = self._checked_data(train_dataset, eval_dataset, processing_class)
        data_collator = _collator(data_collator, processing_class, args)
        starts_from_reference = ref_model is None
        # The reference is copied before anything changes the model.
        model, quantization_config = self._loaded(model, args, optimizers[0], quantization_config, peft_config)
        ref_model, copy_identity, reference = self._made_reference(model, ref_model, args, processing_class, peft_config)
        keyed = args.reference == "cached" and ref_model is None
        adapters = self._construct(
            model,
            args,
            dpo_trainer,
            # TRL's disable_dropout would include adapters; caching and packing are done here.
            {"disable_dropout": False, "precompute_ref_log_probs": False, "padding_free": False},
            partial(fingerprint_of, processing_class=processing_class, args=args) if keyed else None,
            ref_model=ref_model,
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
        self._adapter_start = adapters.start if ref_model is None else None
        del ref_model  # then the trainer's is the last one
        self._start_identity = adapters.identity or copy_identity
        self._check_start_can_be_kept()
        self._set_mixture()
        self._start_is_unchecked = starts_from_reference and self.mixture.needs_reference
        self._start_loop()
        self._prepare_policy(without_dropout=args.disable_dropout)
        self._share_tower(starts_from_reference)
        self._choose_rows(router_loss=self.aux_loss_enabled, reads_logits=compute_metrics is not None)
        self._open_features(others=not starts_from_reference and self.ref_model is not None)
        if args.reference == "cached" and self.mixture.needs_reference:
            self._open_references(reference or adapters.reference)
            self._release_reference()

    def _made_reference(
        self, model: Any, ref_model: Any, args: MPOConfig, processing_class: Any, peft_config: Any
    ) -> tuple[PreTrainedModel | None, Any, Any]:
        """Make the reference of a run, before accelerate may shard it.

        Returns the model (None: that of adapters is the model without them), its identity if it is a copy of the policy, and its
        fingerprint if its log-probs are cached.
        """
        if peft_config is None and ref_model is not None and ref_model is not model:
            check_apart(model, ref_model)
        copy_identity = None
        if ref_model is None and peft_config is None and not is_peft_model(model):
            ref_model = frozen_copy(model)
            copy_identity = identity(ref_model)
        self._unsharded_reference = ref_model
        cached = args.reference == "cached" and ref_model is not None
        return ref_model, copy_identity, fingerprint_of(ref_model, processing_class, args) if cached else None

    def _set_mixture(self) -> None:
        mixture = self.args.mixture()
        if self.args.sync_ref_model and not mixture.needs_reference:
            raise ValueError(
                f"sync_ref_model=True has no effect: none of the losses {self.args.loss_type} uses a reference. Leave it out."
            )
        self.ref_model: PreTrainedModel | None
        self.mixture = mixture.to(self.accelerator.device)
        if not mixture.needs_reference:
            self.ref_model = None

    def _check_start_can_be_kept(self) -> None:
        start, plugin = self._adapter_start, self.args.deepspeed_plugin
        if start is None or not start.values:
            return
        if (plugin is not None and plugin.zero_stage == 3) or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
            raise ValueError(
                "The reference of an adapter that is trained further, of biases, and of PiSSA or OLoRA is the model with its start "
                "values, which cannot be restored in weights sharded by ZeRO-3 or FSDP version 1. Use launch=fsdp2, zero2 or ddp."
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Shard the reference layer by layer under FSDP2. TRL would shard it as one unit and gather all of it for every forward."""
        super().create_accelerator_and_postprocess()
        reference, self._unsharded_reference = self._unsharded_reference, None
        if reference is not None and self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            fsdp2_prepare_model(self.accelerator, reference)

    def _all_models(self) -> list[nn.Module]:
        return [model for model in (self.model, self.ref_model) if model is not None]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; see `mpo.training.evaluating`."""
        self._is_reference = None
        return super().evaluation_loop(*args, **kwargs)

    # --- Checkpoints

    def _save_more(self, folder: str) -> None:
        if self._adapter_start is not None:
            self._adapter_start.save(Path(folder))

        if self.args.sync_ref_model:
            self.accelerator.unwrap_model(self.ref_model).save_pretrained(Path(folder, REFERENCE))

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "reward_shift": {name: value.item() for name, value in self._shifts.state_dict().items()}}

    def _restore_state(self, state: dict[str, Any], checkpoint: str) -> None:
        super()._restore_state(state, checkpoint)
        saved = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["reward_shift"].items()}
        # Earlier checkpoints hold that of the first loss alone.
        self._shifts.load_state_dict({name if "." in name else f"0.{name}": value for name, value in saved.items()})
        if self.args.sync_ref_model:
            load_weights(self.accelerator.unwrap_model(self.ref_model), str(Path(checkpoint, REFERENCE)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_identity(resume_from_checkpoint)
        if self._adapter_start is not None:
            changed = (
                "the adapter's initialization changed the base weights with them" if self._adapter_start.base_changed else None
            )
            cached = "the cached reference log-probs belong to the values here" if self._references is not None else None
            self._adapter_start.restore(resume_from_checkpoint, fixed=changed or cached)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    # --- Log-probs

    def _pairs(self, outputs: Any, batch: Batch, mean_sqrt_tokens: Tensor | None) -> PairLogps:
        chosen, rejected = batch.sums(outputs.log_probs, self.ld_alpha)
        ref_chosen, ref_rejected = self._reference_sums(batch)
        chosen_tokens, rejected_tokens = batch.lengths
        weight = None
        if self.use_weighting:  # WPO, arXiv 2406.11827, equation 2
            sums = batch.sums(outputs.log_probs - outputs.log_sum_sq_probs)
            chosen_weight, rejected_weight = (sums / batch.lengths.clamp_min(1)).detach().exp()
            weight = chosen_weight * rejected_weight
        return PairLogps(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_tokens,
            rejected_tokens,
            weight,
            sft_chosen=None if self.ld_alpha is None else batch.sums(outputs.log_probs)[0],
            mean_sqrt_tokens=mean_sqrt_tokens,
        )

    # --- The reward shift delta

    @property
    def _shifts(self) -> nn.ModuleList:
        return nn.ModuleList(self.mixture.reward_shifts)

    def _before_step(self) -> None:
        self._shifts_before = {name: value.clone() for name, value in self._shifts.state_dict().items()}

    def _undo_step(self, skipped: Tensor) -> None:
        for name, before in self._shifts_before.items():
            buffer = self._shifts.get_buffer(name)
            buffer.copy_(torch.where(skipped.to(buffer.device), before, buffer))

    def _read_meter(self, mode: str) -> dict[str, float]:
        metrics = super()._read_meter(mode)
        if metrics and mode == "eval" and self._square_weight is not None:
            metrics["loss"] += self._square_weight * metrics["loss/sft"]
        if metrics and (shift := self.mixture.reward_shift) is not None:
            metrics["reward_shift"] = shift.value.item()
        return metrics

    @property
    def _square_weight(self) -> float | None:
        """Return the weight of an SFT term averaged by square roots, whose average is that of a whole evaluation."""
        of_losses = zip(self.mixture.weights, self.mixture.losses, strict=True)
        return next((weight for weight, loss in of_losses if isinstance(loss, SFT) and loss.average == "square"), None)

    # --- Loss

    def _loss(self, outputs: Any, batch: Batch, counted: int, step: Tensor | None) -> Any:
        training = self.model.training
        start = self._evaluate_start(batch) if training and self._start_is_unchecked else None
        pairs = self._pairs(outputs, batch, None if step is None else self._mean_sqrt_tokens).first(max(counted, 1))
        if start is not None:
            self._check_start(start, batch, pairs, counted)
        self.mixture.train(training and counted > 0)
        mixed = self.mixture(pairs)
        for shift in self._shifts if training and not counted else ():
            shift.train()(pairs.chosen[:0])  # nothing to add, but all ranks must take part
        loss = mixed.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        square_weight = None if training else self._square_weight
        metrics = measured(loss, mixed.terms, pairs, outputs, batch, beta=self.beta, counted=counted, square_weight=square_weight)
        # Gradients are averaged over ranks, so each rank's part of the step's mean is multiplied by their number.
        return loss, 1.0 if step is None else counted * self.accelerator.num_processes / step, metrics

    def _loss_in_card(self) -> dict[str, float]:
        return dict(zip(self.mixture.names, self.mixture.weights, strict=True))


def _collator(users: Any, processing_class: Any, args: MPOConfig) -> Any:
    if users is not None and args.reference == "cached":
        raise ValueError(
            "reference='cached' needs the keys of mpo's PairCollator, and this run has a data_collator of its own. Leave one of "
            "them out."
        )
    for name in ("completion_end", "tile_budget", "packed_attention", "verify_first_batch") if users is not None else ():
        if getattr(args, name) != type(args).__dataclass_fields__[name].default:
            raise ValueError(
                f"{name}={getattr(args, name)!r} needs mpo's PairCollator, and this run has a data_collator of its own. Leave one "
                "of them out."
            )
    if users is not None and args.on_bad_record == "skip":
        raise ValueError("on_bad_record='skip' needs mpo's PairCollator, and this run has a data_collator of its own. Use 'raise'.")
    if users is not None:
        return LabelledBatches(users)
    return collator_of(processing_class, args)
