"""The reference of a run: live or cached log-probs, and the check that a run starts from it."""

import contextlib
import gc
import warnings
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from trl.models.utils import disable_gradient_checkpointing

from mpo.batching.batch import Batch
from mpo.batching.randomness import eval_mode
from mpo.losses import Mixture, PairLogps
from mpo.models.tower import SharedTower, can_share
from mpo.training.reference.adapters import AdapterStart
from mpo.training.reference.cache import ReferenceCache
from mpo.training.reference.filling import ShareEveryEpoch, default_folder, fill, look_up, refuse_augmented
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.reference.maintenance import DISAGREEMENT, DISAGREEMENT_16_BIT
from mpo.training.start import compute_dtype, fingerprint_of


class UsesReference(Trainer):  # type: ignore[misc]
    """Compute or look up log-probs under the reference, a pure function of the record."""

    mixture: Mixture
    ref_model: PreTrainedModel | None
    _adapter_start: AdapterStart | None
    _tower: SharedTower | None
    _tower_is_shared: bool
    _references: ReferenceCache | None = None
    _start_is_unchecked: bool
    _is_reference: bool | None = None  # whether the policy is the reference, in this evaluation

    def _share_tower(self, is_copy: bool) -> None:
        """Let the policy share its vision tower's output with the reference, if this is a copy of it, or itself."""
        self._tower_is_shared, self._tower = is_copy, None
        if can_share(self.model) and self.args.vision_features == "live":
            self._tower = SharedTower(self.model, (self.ref_model if is_copy else None) or self.model)

    def compute_ref_log_probs(self, model: nn.Module, batch: Batch, *, same_images: bool = False) -> Tensor:
        """Compute the log-prob sums of a batch's chosen and rejected completions under the reference, shape (2, pairs), float32.

        Args:
            model: the reference model, or the policy, whose adapters are then switched off.
            same_images: the policy's last forward pass had the same images, so a frozen tower's output can be reused.
        """
        start: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.ref_model is None and self._adapter_start is not None:
            start = self._adapter_start.restored(self.accelerator.unwrap_model(self.model))
        checkpointing_off = disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs)
        once = self._tower.playing() if self._tower is not None and same_images else contextlib.nullcontext()
        with warnings.catch_warnings():
            # TRL asks by a name that transformers 5.24 deprecates, which would warn in every step.
            warnings.filterwarnings("ignore", ".*checkpointing.* is deprecated", FutureWarning)
            with checkpointing_off, start, once:
                return self._evaluated_sums(model, batch)

    def _evaluated_sums(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute log-prob sums in evaluation mode, without randomness: each depends on its record alone."""
        with torch.no_grad(), eval_mode(model), self.accelerator.autocast():
            return batch.sums(self._outputs(model, batch).log_probs, self.ld_alpha)

    def _reference_sums(self, batch: Batch) -> Tensor | tuple[None, None]:
        if not self.mixture.needs_reference:
            return None, None
        if self._references is None:
            reference: Any = self.model if self.ref_model is None else self.ref_model
            return self.compute_ref_log_probs(reference, batch, same_images=self._tower_is_shared)
        compute = None
        if self._reference_is_base:  # a separate reference model has been released by now
            compute = partial(self.compute_ref_log_probs, self.model, same_images=self._tower_is_shared)
        elif self._policy_is_reference(self._references):
            compute = partial(self.compute_ref_log_probs, self.model)
        return look_up(self._references, batch, compute, self._on_any_rank).to(batch.shift_labels.device)

    def _evaluate_start(self, batch: Batch) -> Tensor | None:
        """Compute the first batch's log-prob sums under the policy, shape (2, pairs); None for a resumed run."""
        self._start_is_unchecked = False
        if self.state.global_step > 0:
            return None
        once = contextlib.nullcontext() if self._tower is None else self._tower.playing(keep=True)
        with once:
            return self._evaluated_sums(self.model, batch)

    def _check_start(self, start: Tensor, batch: Batch, pairs: PairLogps, counted: int) -> None:
        """Refuse a new run whose policy is not its reference, on any rank. At the start L - L_g = 0.8 ln 2 + 0.2 * 2 ln 2."""
        assert pairs.ref_chosen is not None and pairs.ref_rejected is not None
        difference = (start[:, :counted] - torch.stack([pairs.ref_chosen, pairs.ref_rejected])[:, :counted]).abs()
        tokens = batch.lengths[:, :counted].clamp_min(1)
        dtype = str(compute_dtype(self.model, self.args)).removeprefix("torch.")
        rounding = DISAGREEMENT.get(dtype, DISAGREEMENT_16_BIT) * (1 if self._references is None else 10)
        wrong = ~(difference <= rounding * tokens.sqrt())  # NaN is left to FiniteGuard
        wrong &= difference.isfinite()
        if not self._over_ranks(wrong.sum().float()):
            return
        worst = int(torch.where(wrong, difference, 0).max(dim=0).values.argmax()) if counted else 0
        largest = (
            f"{difference.max().item():.3g} nats at {(batch.names or range(counted))[worst]}"
            if wrong.any()
            else "another rank has the record"
        )
        cache = "" if self._references is None else f" or wrong values in {self._references.folder} (mpo cache verify, prune)"
        raise ValueError(
            "Before the first step the policy in evaluation mode and its reference must give the same log-probs, but they differ: "
            f"{largest}. Causes: an adapter whose method does not start at the base model{cache}, or weights that changed after "
            "the trainer was made. Fix that, or pass the intended reference as ref_model."
        )

    def _open_references(self, fingerprint: Fingerprint | None) -> None:
        """Open the cache of reference log-probs. A reference model of its own fills it now and is released."""
        assert fingerprint is not None
        refuse_augmented(self.train_dataset)
        self._references = ReferenceCache(self.args.reference_cache or default_folder(), fingerprint)
        self._reference_is_base = self.ref_model is None
        if self.ref_model is None:  # the base model computes what is missing
            self.add_callback(ShareEveryEpoch(self._references, self.accelerator))
            return
        args, ref_model = self.args, self.ref_model

        def compute(batch: Batch) -> Tensor:
            return self.compute_ref_log_probs(ref_model, self._prepare_inputs(batch))

        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"evaluation": self.eval_dataset}
        for name, dataset in {"training": self.train_dataset, **evaluated}.items():
            if dataset is None:
                continue
            if not hasattr(dataset, "__len__"):
                raise ValueError(
                    f"reference='cached' computes the reference's log-probs of the {name} data before training, and a stream has "
                    "no length. Use reference='live', or an adapter."
                )
            with self._attention():
                fill(
                    self._references,
                    self._whole_dataloader(dataset),
                    compute,
                    accelerator=self.accelerator,
                    name=name,
                    dataset=dataset,
                    settings=(args.max_length, args.truncation_mode, args.completion_end, args.tile_budget, args.ld_alpha),
                    on_any_rank=self._on_any_rank,
                )

    def _release_reference(self) -> None:
        if self.ref_model is None:
            return  # the base model computes what is missing
        self.accelerator._models = [model for model in self.accelerator._models if model is not self.ref_model]
        self.ref_model = None
        if self._tower is not None:
            self._tower = SharedTower(self.model, self.model)
        gc.collect()  # the fused head's forward, kept on the model, is a reference cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _on_any_rank(self, missing: bool) -> bool:
        """Whether log-probs are missing here, or on any of the ranks that the weights are sharded over."""
        if self._holds_whole_model():
            return missing
        return bool(self._over_ranks(torch.tensor(float(missing), device=self.accelerator.device)))

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

    def _flush_references(self) -> None:
        if self._references is not None:
            self._references.flush()
