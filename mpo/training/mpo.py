"""MPOTrainer: TRL's DPOTrainer with the loss of `mpo.losses`.

Private names of other libraries that the package uses: tests/test_private_names.py.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.trainer import dpo_trainer

from mpo.batching.attention import attends_by_segments, packed_attention, use_packed_attention, usual_attention
from mpo.batching.batch import Batch
from mpo.batching.collator import LabelledBatches
from mpo.batching.logits_to_keep import add_logits_to_keep
from mpo.batching.randomness import disable_dropout, trainable_in_4_bits
from mpo.batching.verify import compare, without_dropout
from mpo.data.encoded import with_encoded_images
from mpo.encoding.images import add_tile_order
from mpo.encoding.templates import is_processor
from mpo.losses import SFT, PairLogps
from mpo.losses.quality import RewardShift
from mpo.models.family import takes_images
from mpo.models.fit import check_fit, check_targets
from mpo.models.kernels import compile_layers, use_liger_layers
from mpo.models.packable import fixed_context
from mpo.models.parts import split_groups
from mpo.models.tower import DropPath, SharedTower, can_share
from mpo.schema import BAD, COUNTED, EPOCH, LOADED, PADDING, TRL_COLUMNS, names
from mpo.training.checkpoint import load_state, load_weights
from mpo.training.config import MPOConfig
from mpo.training.loop import Loop
from mpo.training.metrics import measured
from mpo.training.model_card import PAPER, extend_card
from mpo.training.reference.adapters import identity
from mpo.training.reference.use import UsesReference
from mpo.training.start import (
    Adapters,
    check_apart,
    check_columns,
    check_leftovers,
    check_trained,
    checked_arguments,
    choose_layout,
    fingerprint_of,
    frozen_copy,
    load_by_name,
    load_processing_class,
    pair_collator,
)

logger = logging.getLogger(__name__)

REFERENCE = "reference"  # folder of a checkpoint, for a reference that sync_ref_model updates


class MPOTrainer(UsesReference, Loop, DPOTrainer):  # type: ignore[misc]
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
        ...     model="OpenGVLab/InternVL3-1B-hf", args=MPOConfig("runs/mpo"), train_dataset=pairs
        ... )
        >>> trainer.train()  # doctest: +SKIP
    """

    _tag_names = ["trl", "mpo"]
    _name = "MPO"
    _paper = PAPER

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
        if args.n_gpu > 1:  # transformers would split each batch over all GPUs (nn.DataParallel)
            logger.warning(
                f"Training uses 1 of {args.n_gpu} GPUs. Start the script with torchrun or accelerate launch to use all of them."
            )
            args._n_gpu = 1
        if processing_class is None:
            processing_class = load_processing_class(model, args)
        self._collator_is_ours = data_collator is None
        if self._collator_is_ours:
            evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
            for name, dataset in {"train_dataset": train_dataset, **evaluated}.items():
                check_columns(dataset, name)
            train_dataset = with_encoded_images(train_dataset)  # TRL looks at the first record
            encoded = {name: with_encoded_images(dataset) for name, dataset in evaluated.items()}
            eval_dataset = encoded if isinstance(eval_dataset, dict) else encoded["eval_dataset"]
        data_collator = _collator(data_collator, processing_class, args)
        starts_from_reference = ref_model is None
        with contextlib.ExitStack() as undo:
            # The reference is copied before anything changes the model.
            if peft_config is not None and not isinstance(model, str) and is_peft_model(model):
                raise ValueError("The model has adapters already, and peft_config would add others. Pass one of the two.")
            trains_adapter = peft_config is not None or (not isinstance(model, str) and is_peft_model(model))
            if isinstance(model, str):
                model, quantization_config = load_by_name(model, args, quantization_config, whole=not trains_adapter), None
                undo.enter_context(_temporarily(args, model_init_kwargs=None))  # used up
            check_leftovers(model)
            if peft_config is not None:
                check_targets(model, peft_config)
            else:
                check_trained(model, optimizers[0])
                if ref_model is not None and ref_model is not model:
                    check_apart(model, ref_model)
            copy_identity = None
            if starts_from_reference and not trains_adapter:
                ref_model = frozen_copy(model)
                copy_identity = identity(ref_model)
            reference = None
            if args.reference == "cached" and ref_model is not None:  # before accelerate may shard it
                reference = fingerprint_of(ref_model, processing_class, args)
            self._unsharded_reference = ref_model
            keyed = args.reference == "cached" and ref_model is None
            adapters = Adapters(
                model if is_peft_model(model) else None,
                optimizer=optimizers[0],
                fingerprint=partial(fingerprint_of, processing_class=processing_class, args=args) if keyed else None,
            )
            if is_peft_model(model):
                model, peft_config = model.get_base_model(), next(iter(model.peft_config.values()))
            undo.enter_context(_temporarily(dpo_trainer, get_peft_model=adapters.put_on))
            if takes_images(model.config) and not is_processor(processing_class):  # the vision tower never runs
                undo.enter_context(_temporarily(args, ddp_find_unused_parameters=args.ddp_find_unused_parameters is not False))
            # TRL's disable_dropout would include adapters; caching and packing are done here.
            undo.enter_context(_temporarily(args, disable_dropout=False, precompute_ref_log_probs=False, padding_free=False))
            if args.torch_compile:  # single layers are compiled below
                undo.enter_context(_temporarily(args, torch_compile_backend="no"))
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
        adapters.unround(self.model)
        self._adapter_start = adapters.start if ref_model is None else None
        self._start_identity = adapters.identity or copy_identity
        self._check_start_can_be_kept()
        check_fit(self.model, processing_class)
        if args.sync_ref_model and not args.mixture().needs_reference:
            raise ValueError(
                f"sync_ref_model=True has no effect: none of the losses {args.loss_type} uses a reference. Leave it out."
            )
        self.ref_model: PreTrainedModel | None
        self.mixture = args.mixture().to(self.accelerator.device)
        if not self.mixture.needs_reference:
            self.ref_model = None
        self._start_is_unchecked = starts_from_reference and self.mixture.needs_reference
        self._is_cast = False
        self._start_loop()
        self._prepare_models(starts_from_reference)
        self.layout, reason = choose_layout(
            args,
            *(model for model in (self.model, self.ref_model) if model is not None),
            router_loss=self.aux_loss_enabled,
            own_collator=not self._collator_is_ours,
            reads_logits=compute_metrics is not None,
        )
        if reason is not None:
            unused = {"verify_first_batch": args.verify_first_batch, "packed_attention": args.packed_attention != "auto"}
            ignored = "".join(f" {name} has no effect on them." for name, is_set in unused.items() if is_set)
            logger.warning(f"Rows are padded: {reason}.{ignored}")
        self._unverified = torch.tensor(args.verify_first_batch and self.layout == "packed")
        self._unverified.share_memory_()  # type: ignore[no-untyped-call]  # data loader workers read it
        if self._collator_is_ours:
            self.data_collator = replace(
                data_collator,
                layout=self.layout,
                context=fixed_context(self.model),
                blank_image=self.accelerator.num_processes > 1 and takes_images(self.model.config),
            )
        if args.reference == "cached" and self.mixture.needs_reference:
            reference = reference or adapters.reference
            assert reference is not None
            self._open_references(reference)
            del ref_model  # then the trainer's is the last one
            self._release_reference()

    def _check_start_can_be_kept(self) -> None:
        """Refuse a sharding in which an adapter's start values cannot be restored."""
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

    def _prepare_models(self, starts_from_reference: bool) -> None:
        """Prepare both models: dropout outside adapters off, logits at needed positions only, kernels, a shared vision tower."""
        for model in (self.model, self.ref_model):
            if model is not None:
                if self.args.disable_dropout:
                    disable_dropout(model)
                backbone = _base(self.accelerator.unwrap_model(model)).base_model
                add_logits_to_keep(backbone)
                add_tile_order(backbone)
                if self.args.use_liger_kernel:  # the Trainer would do so for the policy alone
                    use_liger_layers(model, self.args.liger_kernel_config)
                if self.args.torch_compile:
                    compile_layers(model, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        # A reference that is a copy of the policy can share its vision tower's output.
        DropPath.remove_from(self.model)
        self._drop_path = DropPath(self.model, self.args.vision_drop_path) if self.args.vision_drop_path else None
        self._tower_is_shared = starts_from_reference
        self._tower = None
        if can_share(self.model):
            reference: Any = self.ref_model
            self._tower = SharedTower(self.model, reference if starts_from_reference and reference is not None else self.model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer, with a parameter group for each learning rate."""
        rates, decay = self.args.learning_rates(), self.args.vision_layer_decay
        fresh = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if rates or decay != 1.0:
            if not fresh:
                raise ValueError(
                    "vision_learning_rate, its siblings and vision_layer_decay would be ignored: an optimizer was passed. Set "
                    "the rates in its parameter groups."
                )
            whole = self.model if model is None else model
            split_groups(optimizer, whole, rate=self.args.learning_rate, rates=rates, vision_layer_decay=decay)
        return optimizer

    # --- Training after evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; see `mpo.training.evaluating`."""
        self._is_reference = None
        self._is_cast |= (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        with trainable_in_4_bits(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `mpo.training.loop.Loop.train`.

        Raises:
            ValueError: also when an earlier evaluation has rounded the weights.
        """
        if self._is_cast:
            name = "bf16_full_eval" if self.args.bf16_full_eval else "fp16_full_eval"
            raise ValueError(
                f"{name}=True rounded the model's weights to 16 bits in an evaluation, and training would continue from the "
                f"rounded weights. Make a new trainer from the original model, or leave {name} out."
            )
        try:
            return super().train(*args, **kwargs)
        finally:  # after an error too, or the noise would remain in the next trainer of this model
            if (noise := getattr(self, "neftune_hook_handle", None)) is not None:
                noise.remove()

    # --- Checkpoints

    def _save_more(self, folder: str) -> None:
        if self._adapter_start is not None:
            self._adapter_start.save(Path(folder))

        if self.args.sync_ref_model:
            self.accelerator.unwrap_model(self.ref_model).save_pretrained(Path(folder, REFERENCE))

    def _state(self) -> dict[str, Any]:
        shift = {} if self._shift is None else {name: value.item() for name, value in self._shift.state_dict().items()}
        return {**super()._state(), "reward_shift": shift, "start": self._start_identity}

    def _restore_state(self, state: dict[str, Any], checkpoint: str) -> None:
        super()._restore_state(state, checkpoint)
        if self._shift is not None:
            shift = {name: torch.tensor(value, dtype=torch.float64) for name, value in state["reward_shift"].items()}
            self._shift.load_state_dict(shift)
        if self.args.sync_ref_model:
            load_weights(self.accelerator.unwrap_model(self.ref_model), str(Path(checkpoint, REFERENCE)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        saved_identity = load_state(resume_from_checkpoint).get("start")
        if saved_identity is not None and saved_identity != self._start_identity and self.accelerator.process_index == 0:
            raise ValueError(
                f"The run that wrote {resume_from_checkpoint} started from another model than the one passed here, so the "
                "references differ. Pass the model that the run started from, not its checkpoint, and resume."
            )
        if self._adapter_start is not None:
            changed = (
                "the adapter's initialization changed the base weights with them" if self._adapter_start.base_changed else None
            )
            cached = "the cached reference log-probs belong to the values here" if self._references is not None else None
            self._adapter_start.restore(resume_from_checkpoint, fixed=changed or cached)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    # --- Batches

    def _training_collator(self) -> Any:
        """Keep the records in the batches until `verify_first_batch` has compared one."""
        return replace(self.data_collator, keep_records=self._unverified) if self._unverified.item() else self.data_collator

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Leave records as they are for this library's collator. A user's collator gets TRL's columns."""
        if self._collator_is_ours:
            return dataset
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._collator_is_ours:
            self._signature_columns = [*LOADED, *names(encoded=True), *TRL_COLUMNS, PADDING, EPOCH, COUNTED, BAD]

    # --- Log-probs

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Let the models attend by segments within the context, if rows are packed. (`generate` needs their usual attention.)"""
        models = [model for model in (self.model, self.ref_model) if model is not None] if self.layout == "packed" else []
        with packed_attention(*models, backend=self.args.packed_attention):
            yield

    def _outputs(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        """Run `model` on a batch. Its fused head returns values at each labelled position, shape (1, M)."""
        if "segments" in batch.model_inputs and not attends_by_segments(model):
            # Called outside of training and evaluation. It stays on, since a backward pass may follow.
            use_packed_attention(model, self.args.packed_attention)
        head = _base(self.accelerator.unwrap_model(model)).get_output_embeddings()
        if isinstance(head, FSDPModule):
            # The fused head reads its weight without calling the module, so FSDP2 does not gather it. TRL gathers a sharded weight
            # with `full_tensor`, and then each rank keeps its own gradient instead of the mean over ranks.
            head.unshard()
        labels = {"positions_to_keep": batch.positions_to_keep, "shift_labels": batch.shift_labels}
        return model(**batch.model_inputs, **labels, **kwargs, use_cache=False, fused_lm_head=True)

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
    def _shift(self) -> RewardShift | None:
        return self.mixture.reward_shift

    def _before_step(self) -> None:
        shift = self._shift
        self._shift_before = None if shift is None else {name: value.clone() for name, value in shift.state_dict().items()}

    def _undo_step(self, skipped: Tensor) -> None:
        """Restore delta to its value before the step if the step is not applied."""
        if self._shift is not None and self._shift_before is not None:
            for name, before in self._shift_before.items():
                buffer = self._shift.get_buffer(name)
                buffer.copy_(torch.where(skipped.to(buffer.device), before, buffer))

    def _read_meter(self, mode: str) -> dict[str, float]:
        metrics = super()._read_meter(mode)
        if metrics and mode == "eval" and self._square_weight is not None:
            metrics["loss"] += self._square_weight * metrics["loss/sft"]
        if metrics and self._shift is not None:
            metrics["reward_shift"] = self._shift.value.item()
        return metrics

    @property
    def _square_weight(self) -> float | None:
        """Return the weight of an SFT term averaged by square roots, whose average is that of a whole evaluation."""
        of_losses = zip(self.mixture.weights, self.mixture.losses, strict=True)
        return next((weight for weight, loss in of_losses if isinstance(loss, SFT) and loss.average == "square"), None)

    # --- Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Compute the loss of a micro-batch: in training its sum divided by the pairs of the whole step, otherwise its mean.

        Args:
            model: the policy.
            inputs: a batch.
            return_outputs: also return the model's outputs (with logits, from a second forward pass).
            num_items_in_batch: number of pairs of the optimizer step, over all micro-batches and ranks.
        """
        mode = "train" if self.model.training else "eval"
        if inputs.records is not None and mode == "train" and self._unverified.item():
            self._unverified.fill_(False)
            self._compare_with_padded_rows(inputs)
        kwargs = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self._outputs(model, inputs, **kwargs)
        step_wide = mode == "train" and num_items_in_batch is not None
        counted = self._counted(inputs) if mode == "eval" else inputs.size if inputs.counted is None else inputs.counted
        start = self._evaluate_start(inputs) if mode == "train" and self._start_is_unchecked else None
        pairs = self._pairs(outputs, inputs, self._mean_sqrt_tokens if step_wide else None).first(max(counted, 1))
        if start is not None:
            self._check_start(start, inputs, pairs, counted)
        self.mixture.train(mode == "train" and counted > 0)
        mixed = self.mixture(pairs)
        if mode == "train" and not counted and self._shift is not None:
            self._shift.train()(pairs.chosen[:0])  # nothing to add, but all ranks must take part
        # Gradients are averaged over ranks, so each rank's part of the step's mean is multiplied by their number.
        factor = counted * self.accelerator.num_processes / num_items_in_batch if step_wide else 1.0
        loss = mixed.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        options = {"beta": self.beta, "counted": counted, "square_weight": self._square_weight if mode == "eval" else None}
        self._meters[mode].add(measured(loss, mixed.terms, pairs, outputs, inputs, **options))
        if mode == "train":
            self._guard.see_loss(self.state.global_step + 1, inputs.names, loss)
        if not return_outputs:
            return loss * factor
        with torch.no_grad():
            return loss * factor, model(**inputs.model_inputs, use_cache=False)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write TRL's model card, with the loss, its weights, the data and this library's version."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir, "README.md")
        if self.is_world_process_zero() and path.exists():
            settings = {name: getattr(self.args, name) for name in ("beta", "reward_shift", "sft_average", "learning_rate")}
            path.write_text(extend_card(path.read_text(), self.mixture, settings, self._order()["pairs in the data set"]))

    def _compare_with_padded_rows(self, packed: Batch) -> None:
        """Compare with the same records in padded rows, under the model's usual attention (`verify_first_batch`)."""
        collator = replace(self.data_collator, layout="padded", keys=False)
        padded = self._prepare_inputs(collator(packed.records))
        model = self.accelerator.unwrap_model(self.model)
        no_drop_path = self._drop_path.off() if self._drop_path is not None else contextlib.nullcontext()
        with without_dropout(model, self.accelerator.device), no_drop_path:
            report = compare(
                lambda batch: batch.sums(self._outputs(model, batch).log_probs).flatten(),
                packed,
                padded,
                [parameter for parameter in model.parameters() if parameter.requires_grad] if self._holds_whole_model() else [],
                usual=lambda: usual_attention(model),
            )
        torch.clear_autocast_cache()  # weights cast here belong to a freed graph
        logger.warning(report)


def _base(model: nn.Module) -> Any:
    """Return the model inside adapters."""
    wrapped: Any = model
    return wrapped.get_base_model() if is_peft_model(model) else model


def _collator(users: Any, processing_class: Any, args: MPOConfig) -> Any:
    """Build this library's collator, or wrap the user's to add what the loss needs."""
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
    return pair_collator(processing_class, args)


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
