"""The policy in a run: how it is loaded, which rows it gets, a pass through it, and its optimizer."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer

from mpo.batching.attention import attends_by_segments, packed_attention, use_packed_attention, usual_attention
from mpo.batching.batch import Batch, compare
from mpo.batching.logits_to_keep import add_logits_to_keep
from mpo.batching.randomness import disable_dropout, trainable_in_4_bits, without_dropout
from mpo.data.encoded import with_encoded_images
from mpo.encoding.chat import is_processor
from mpo.encoding.images import add_tile_order
from mpo.models.family import takes_images
from mpo.models.fit import check_fit, check_targets
from mpo.models.kernels import compile_layers, use_liger_layers
from mpo.models.packable import fixed_context
from mpo.models.parts import learns_from_images_alone, split_groups
from mpo.models.tower import DropPath
from mpo.schema import BAD, COUNTED, EPOCH, LOADED, PADDING, TRL_COLUMNS, names
from mpo.training.record_checks import check_images
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.start import Adapters, check_columns, check_leftovers, check_trained, choose_layout, load_by_name

logger = logging.getLogger(__name__)


class HasPolicy(Trainer):  # type: ignore[misc]
    """Run the policy on batches of this library's collator."""

    columns: ClassVar[tuple[str, ...]]  # that the collator reads, besides `LOADED` and what training adds
    needed: ClassVar[tuple[tuple[str, ...], ...]]  # what a record must have: one of these sets of columns

    _collator_is_ours: bool
    _is_cast = False
    data_collator: Any

    # --- Construction

    def _checked_data(self, train_dataset: Any, eval_dataset: Any, processing_class: Any) -> tuple[Any, Any]:
        """Return the data sets with images left encoded: TRL looks at the first record. Raises ValueError for missing columns."""
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, dataset in {"train_dataset": train_dataset, **evaluated}.items():
            check_columns(dataset, name, self.needed, processing_class)
        encoded = {name: with_encoded_images(dataset) for name, dataset in evaluated.items()}
        return with_encoded_images(train_dataset), encoded if isinstance(eval_dataset, dict) else encoded["eval_dataset"]

    @staticmethod
    def _loaded(model: Any, args: Any, optimizer: Any, quantization_config: Any, peft_config: Any) -> tuple[Any, Any]:
        """Load a model that is given by name, and check what is trained of it. Return it and the quantization left to TRL."""
        if peft_config is not None and not isinstance(model, str) and is_peft_model(model):
            raise ValueError("The model has adapters already, and peft_config would add others. Pass one of the two.")
        if isinstance(model, str):
            model, quantization_config = load_by_name(model, args, quantization_config, whole=peft_config is None), None
        check_leftovers(model)
        if peft_config is not None:
            check_targets(model, peft_config)
        else:
            check_trained(model, optimizer)
        return model, quantization_config

    def _construct(
        self,
        model: Any,
        args: Any,
        trl: ModuleType,
        off: dict[str, Any],
        fingerprint: Callable[[Any], Fingerprint] | None = None,
        *,
        processing_class: Any,
        optimizers: tuple[Any, Any],
        peft_config: Any,
        **others: Any,
    ) -> Adapters:
        """Let TRL's constructor, of the module `trl`, add the adapters with `Adapters`, and change nothing else.

        Args:
            off: settings that this library applies itself.
            fingerprint: as in `Adapters`.
            others: further arguments of the constructor.
        """
        adapters = Adapters(model if is_peft_model(model) else None, optimizer=optimizers[0], fingerprint=fingerprint)
        if is_peft_model(model):
            model, peft_config = model.get_base_model(), next(iter(model.peft_config.values()))
        if takes_images(model.config) and not is_processor(processing_class):  # the vision tower never runs
            off = {**off, "ddp_find_unused_parameters": args.ddp_find_unused_parameters is not False}
        if args.torch_compile:  # single layers are compiled by `_prepare_policy`
            off = {**off, "torch_compile_backend": "no"}
        use_cache = {name: value for name, value in vars(model.config).items() if name == "use_cache"}
        # `model_init_kwargs` are used up.
        with patch.multiple(trl, get_peft_model=adapters.put_on), patch.multiple(args, model_init_kwargs=None, **off):
            try:
                passed = {"processing_class": processing_class, "optimizers": optimizers, "peft_config": peft_config, **others}
                super().__init__(model=model, args=args, **passed)
            finally:  # transformers' Trainer sets it, and no step reads it
                vars(model.config).pop("use_cache", None)
                vars(model.config).update(use_cache)
        adapters.unround(self.model)
        check_fit(self.model, processing_class)
        return adapters

    def _all_models(self) -> list[nn.Module]:
        return [self.model]

    def _prepare_policy(self, *, without_dropout: bool) -> None:
        """Prepare all models: dropout outside adapters off, logits at needed positions only, kernels; and drop path."""
        for model in self._all_models():
            if without_dropout:
                disable_dropout(model)
            backbone = inner(self.accelerator.unwrap_model(model)).base_model
            add_logits_to_keep(backbone)
            add_tile_order(backbone)
            if self.args.use_liger_kernel:  # the Trainer would do so for the policy alone
                use_liger_layers(model, self.args.liger_kernel_config)
            if self.args.torch_compile:
                compile_layers(model, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode)
        DropPath.remove_from(self.model)
        self._drop_path = DropPath(self.model, self.args.vision_drop_path) if self.args.vision_drop_path else None

    def _choose_rows(self, *, router_loss: bool, reads_logits: bool) -> None:
        self.layout, reason = choose_layout(
            self.args,
            *self._all_models(),
            router_loss=router_loss,
            own_collator=not self._collator_is_ours,
            reads_logits=reads_logits,
        )
        if reason is not None:
            unused = {"verify_first_batch": self.args.verify_first_batch, "packed_attention": self.args.packed_attention != "auto"}
            ignored = "".join(f" {name} has no effect on them." for name, is_set in unused.items() if is_set)
            logger.warning(f"Rows are padded: {reason}.{ignored}")
        self._unverified = torch.tensor(self.args.verify_first_batch and self.layout == "packed")
        self._unverified.share_memory_()  # type: ignore[no-untyped-call]  # data loader workers read it
        if self._collator_is_ours:
            self.data_collator = replace(
                self.data_collator,
                layout=self.layout,
                context=fixed_context(self.model),
                blank_image=takes_images(self.model.config)
                and (self.accelerator.num_processes > 1 or learns_from_images_alone(self.model, self.args.learning_rates())),
            )
            check_images(self.train_dataset, self.model, self.args.learning_rates())

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
            if not any(group["lr"] for group in optimizer.param_groups):
                raise ValueError(f"Nothing would be trained: the learning rate of every trained part is 0 ({rates}). Raise one.")
        return optimizer

    # --- Training after evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; see `mpo.training.evaluating`."""
        self._is_cast |= (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        with trainable_in_4_bits(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see `mpo.training.loop.Loop.train`. Raises ValueError also when an earlier evaluation has rounded the weights."""
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

    # --- Batches

    def _training_collator(self) -> Any:
        """Return the collator of training batches, which keeps their records until `verify_first_batch` has compared one."""
        return replace(self.data_collator, keep_records=self._unverified) if self._unverified.item() else self.data_collator

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave records as they are for this library's collator. A user's collator gets TRL's columns."""
        return dataset if self._collator_is_ours else super()._prepare_dataset(dataset, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._collator_is_ours:
            self._signature_columns = [*LOADED, *self.columns, PADDING, EPOCH, COUNTED, BAD]

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        """Keep columns of unknown names for this library's collator, which judges them (`mpo.encoding.turns.check_fields`)."""
        if not (self._collator_is_ours and self.args.remove_unused_columns):
            return super()._remove_unused_columns(dataset, description)
        self._set_signature_columns_if_needed()
        unread = {*names(), *TRL_COLUMNS} - {*self._signature_columns}
        return dataset.remove_columns([name for name in dataset.column_names if name in unread])

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return data_collator if self._collator_is_ours else super()._get_collator_with_removed_columns(data_collator, description)

    # --- A pass through the policy

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Let the models attend by segments within the context, if rows are packed. (`generate` needs their usual attention.)"""
        models = self._all_models() if self.layout == "packed" else []
        with packed_attention(*models, backend=self.args.packed_attention):
            yield

    def _outputs(self, model: nn.Module, batch: Batch, **kwargs: Any) -> Any:
        """Run `model` on a batch. Its fused head returns values at each labelled position, shape (1, M)."""
        if "segments" in batch.model_inputs and not attends_by_segments(model):
            # Called outside of training and evaluation. It stays on, since a backward pass may follow.
            use_packed_attention(model, self.args.packed_attention)
        head = inner(self.accelerator.unwrap_model(model)).get_output_embeddings()
        if isinstance(head, FSDPModule):
            # The fused head reads its weight without calling the module, so FSDP2 does not gather it. TRL gathers a sharded weight
            # with `full_tensor`, and then each rank keeps its own gradient instead of the mean over ranks.
            head.unshard()
        labels = {"positions_to_keep": batch.positions_to_keep, "shift_labels": batch.shift_labels}
        return model(**batch.model_inputs, **labels, **kwargs, use_cache=False, fused_lm_head=True)

    def _verify(self, batch: Batch) -> None:
        if batch.records is not None and self._unverified.item():
            self._unverified.fill_(False)
            self._compare_with_padded_rows(batch)

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


def inner(model: nn.Module) -> Any:
    """Return the model inside adapters."""
    wrapped: Any = model
    return wrapped.get_base_model() if is_peft_model(model) else model
