"""MPOConfig: TRL's DPOConfig with the MPO paper's defaults, the fields of this library, and checks of what does not go together."""

from dataclasses import dataclass
from typing import Any, ClassVar

from trl import DPOConfig

from mpo.losses import Mixture
from mpo.training.loop_config import LoopConfig, choice, described

MPO_LOSS_TYPE = ["sigmoid", "bco_pair", "sft"]
MPO_LOSS_WEIGHTS = [0.8, 0.2, 1.0]


@described
@dataclass
class MPOConfig(LoopConfig, DPOConfig):  # type: ignore[misc]
    """Configuration of a training run: TRL's `DPOConfig` with the defaults of the MPO paper (arXiv 2411.10442, section 7).

    Without arguments the loss is MPO: 0.8 DPO + 0.2 BCO with a reward shift + 1.0 SFT, beta 0.1. When ``loss_type`` is given,
    it means what it means in TRL, and ``loss_weights`` default to 1.0 each.

    Args:
        loss_type: one loss or several, by TRL's names (and ``cdpo``, ``orpo``); or ``MODULE.CLASS``. Default: MPO's three.
        loss_weights: one weight per loss type.
        reward_shift: delta of the BCO term. ``"running_mean"``: the running mean of past rewards, as in the paper. ``"none"``: no
            shift, as in TRL since 0.29.
        sft_average: average of the SFT term: over each completion's tokens (``"completion"``, the paper's equation 8), over all
            tokens of the micro-batch (``"token"``, TRL), or weighted by the square root of the length (``"square"``,
            InternVL 2.5).
        rows: ``"packed"``: several texts are one row without padding, and a prompt and its images are computed once for all its
            completions (same loss to rounding). ``"padded"``: a row for each text. ``"auto"``: packed where the model allows it.
        packed_attention: attention kernel of packed rows; see `mpo.batching.attention.use_packed_attention`.
        reference: ``"live"``: the reference model runs in every step. ``"cached"``: its log-probs are kept on disk, keyed by
            content, and no second model is held in memory. ``precompute_ref_log_probs=True`` means the same.
        reference_cache: folder of the cache, which runs may share.
        vision_features: ``"live"``: the vision tower runs in every step. ``"cached"``: the features of a frozen tower are kept on
            disk, keyed by content, before the projector or, where that is frozen too, after it: an image is decoded and encoded
            once, in training, evaluation and the pass that fills the reference cache (`mpo.training.features`).
        vision_feature_cache: folder of these features, which runs may share.
        vision_feature_cache_gb: maximum size of that folder in GB (10^9 bytes).
        batching: ``"pairs"``: a batch holds ``per_device_train_batch_size`` pairs. ``"tokens"``: a batch holds as many pairs as fit
            into ``max_tokens_per_batch`` and ``max_tiles_per_batch``. The loss of a step is the mean over its pairs in both cases.
        max_tokens_per_batch: maximum number of tokens of a batch on one device, for ``batching="tokens"``.
        max_tiles_per_batch: maximum number of image tiles of a batch on one device, for ``batching="tokens"``. None: no limit.
        group_same_prompt: maximum number of pairs with the same prompt that share a batch and, in packed rows, the computation of
            their prompt and images.
        verify_first_batch: compare the first batch's packed rows with padded rows, once and without dropout, and log the
            differences of log-probs and gradients.
        on_bad_record: what to do with a record that cannot be used (an image that does not decode, a prompt that is too long).
            ``"raise"``: stop the run. ``"skip"``: leave it out, count it and list it in ``bad_records.jsonl`` of the run's folder.
            It is never replaced by another record.
        max_bad_fraction: maximum fraction of bad records among those seen; with ``"skip"`` the run stops above it.
        vision_learning_rate: learning rate of the vision tower. None, here and in the next four: ``learning_rate``.
        fuser_learning_rate: learning rate of the fuser between tower and projector (`mpo.models.fused`).
        projector_learning_rate: learning rate of the projector between tower and language model.
        language_learning_rate: learning rate of the language model.
        head_learning_rate: learning rate of the output head, if it has its own weights.
        vision_layer_decay: factor between the learning rates of a tower layer and of the layer above it
            (`mpo.models.parts`).
        vision_drop_path: stochastic depth of the tower's last layer (`mpo.models.tower`); off in the reference.
        completion_end: end of the labelled tokens of a completion: its end-of-turn token (``"end_of_turn"``), or the end of
            everything that the chat template puts after the prompt (``"template"``, TRL).
        max_length: maximum number of tokens of a prompt and a completion: longer completions are truncated (with
            ``truncation_mode="keep_end"``: prompts, from the left), images never. None: no limit.
        tile_budget: what the processor's tile limit applies to: all images of a prompt together (``"prompt"``, the official
            InternVL code), or each image (``"image"``, TRL).

    With ``reward_shift="none"``, ``sft_average="token"``, ``completion_end="template"`` and ``tile_budget="image"`` every loss
    equals TRL's.

    Other defaults that differ from TRL's: learning_rate 5e-6, one epoch, weight_decay 0.05, cosine schedule, 5 % warm-up,
    max_length None (images take hundreds of tokens each), bf16 only where the hardware has it, logging_nan_inf_filter off (it
    would log a NaN loss as 0).

    Raises:
        ValueError: for unknown loss types, a wrong number of weights, negative weights, and settings that no chosen loss uses.
    """

    by_number: ClassVar[str] = "pairs"
    without_effect: ClassVar[dict[str, tuple[Any, str]]] = {
        **LoopConfig.without_effect,
        "label_smoothing_factor": (0.0, "it belongs to transformers' loss. Use loss_type='cdpo' with label_smoothing."),
    }

    needs: ClassVar[dict[str, tuple[str, Any]]] = {
        **LoopConfig.needs,
        **dict.fromkeys(("ref_model_mixup_alpha", "ref_model_sync_steps"), ("sync_ref_model", True)),
        "reference_cache": ("reference", "cached"),
    }

    loss_type: list[str] | None = None  # type: ignore[assignment]
    loss_weights: list[float] | None = None
    reward_shift: str = choice("running_mean", ("running_mean", "none"))
    sft_average: str = choice("completion", ("completion", "token", "square"))
    completion_end: str = choice("end_of_turn", ("end_of_turn", "template"))
    reference: str = choice("live", ("live", "cached"))
    reference_cache: str | None = None
    batching: str = choice("pairs", ("pairs", "tokens"))
    group_same_prompt: int = 1  # type: ignore[misc]
    max_length: int | None = None
    learning_rate: float = 5e-6
    warmup_steps: float = 0.05

    def __post_init__(self) -> None:
        if self.loss_type is None:
            self.loss_type = list(MPO_LOSS_TYPE)
            if self.loss_weights is None:
                self.loss_weights = list(MPO_LOSS_WEIGHTS)
        elif isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.precompute_ref_log_probs:
            self.reference = "cached"
        super().__post_init__()

    def _check(self) -> None:
        if self.group_same_prompt < 1:
            raise ValueError(f"group_same_prompt must be a number of pairs, at least 1 (no groups); got {self.group_same_prompt}.")
        if self.use_weighting and (sorting := self.mixture().sorting):
            raise ValueError(
                f"use_weighting weights each pair, and {', '.join(sorting)} sorts the batch, which separates pairs from their "
                "weights. Use one of them."
            )
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha must be between 0 and 1; got {self.ld_alpha}.")
        if self.precompute_ref_batch_size is not None:
            raise ValueError(
                "precompute_ref_batch_size would be ignored: the cache is filled per_device_eval_batch_size at a time."
            )
        if self.reference == "cached" and self.sync_ref_model:
            raise ValueError(
                "sync_ref_model updates the reference, and reference='cached' keeps its first log-probs. Use one of them."
            )
        needs_reference = self.needs_reference  # a wrong loss fails here, before any model loads
        if self.reference == "cached" and not needs_reference:
            raise ValueError(
                "reference='cached' (or precompute_ref_log_probs=True) has no effect: none of the losses "
                f"{self.loss_type} has a reference. Leave it out."
            )

    @property
    def needs_reference(self) -> bool:  # type: ignore[override]
        """Whether one of the losses has a reference."""
        return self.mixture().needs_reference

    def encoding_rules(self) -> dict[str, Any]:  # noqa: D102
        return {"completion_end": self.completion_end}

    def loss_name(self) -> str:  # noqa: D102
        return repr(self.mixture())

    def mixture(self) -> Mixture:
        """Build the loss of this configuration, with no state."""
        return Mixture.from_trl(
            self.loss_type or MPO_LOSS_TYPE,
            self.loss_weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            discopop_tau=self.discopop_tau,
            reward_shift=self.reward_shift,
            sft_average=self.sft_average,
        )
