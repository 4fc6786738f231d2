"""MPOConfig: TRL's DPOConfig with the paper's defaults and three more fields."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import DPOConfig

from mpo.bad_records import MAX_BAD_FRACTION
from mpo.losses import Mixture
from mpo.models.parts import PARTS
from mpo.packing.skipping import ON_BAD_RECORD
from mpo.packing.tiles import BUDGETS

MPO_LOSS_TYPE = ["sigmoid", "bco_pair", "sft"]
MPO_LOSS_WEIGHTS = [0.8, 0.2, 1.0]


def _choice(default: str, choices: tuple[str, ...], help: str) -> Any:
    return field(default=default, metadata={"help": help, "choices": list(choices)})


_CHOSEN = (
    *("reward_shift", "sft_average", "completion_end", "tile_budget", "rows", "packed_attention", "reference", "batching"),
    *("on_bad_record", "truncation_mode"),
)

# Fields of TRL's and transformers' classes that nothing in a preference run reads: off value, and what to use.
_WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "dataset_num_proc": (None, "records are tokenised while training, by the data loader. Use dataloader_num_workers."),
    "eval_use_gather_object": (False, "evaluation gathers tensors, the rows that count."),
    "label_smoothing_factor": (0.0, "it belongs to transformers' own loss. Use loss_type='cdpo' with label_smoothing."),
}


def _has_bf16() -> bool:
    """Whether a GPU computes in bfloat16 itself; PyTorch also emulates it on older ones, which is slow."""
    emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(is_torch_bf16_gpu_available()) and not emulated


@dataclass
class MPOConfig(DPOConfig):  # type: ignore[misc]
    """Everything TRL's `DPOConfig` has, with the defaults of the MPO paper (arXiv 2411.10442, section 7).

    Without arguments the loss is MPO: 0.8 DPO + 0.2 BCO with a reward shift + 1.0 SFT, beta 0.1. When ``loss_type`` is given,
    it means what it means in TRL, and ``loss_weights`` default to 1.0 each.

    Args:
        loss_type: one loss or several, by TRL's names (and ``cdpo``, ``orpo``). Default: MPO's three.
        loss_weights: one weight per loss type.
        reward_shift: ``"running_mean"`` is BCO with delta, the running mean of past rewards, as the paper has it;
            ``"none"`` is BCO without, as TRL has it since 0.29.
        sft_average: the SFT term is averaged over each answer's tokens (``"completion"``, the paper's equation 8), over all
            tokens of the micro-batch (``"token"``, TRL), or weighted by the square root of the length (``"square"``,
            InternVL 2.5).
        rows: ``"packed"``: a prompt and all its answers are one row, the prompt and its images computed once, nothing padded
            (same loss to rounding); ``"padded"``: a row for each answer; ``"auto"``: packed where the model allows it.
        packed_attention: see `mpo.packing.attention.use_packed_attention`.
        reference: ``"live"``: the reference model runs in every step; ``"cached"``: its log-probs are kept on disk, found by
            content, and no second model is held. ``precompute_ref_log_probs=True`` means the same.
        reference_cache: folder of the cache; runs share it.
        batching: ``"pairs"``: a batch holds ``per_device_train_batch_size`` pairs; ``"tokens"``: as many as fit into
            ``max_tokens_per_batch`` and ``max_tiles_per_batch``. The loss of a step is the mean over its pairs in any case.
        max_tokens_per_batch: see `batching`.
        max_tiles_per_batch: see `batching`.
        group_same_prompt: up to this many pairs of one question share a batch and, in packed rows, their prompt and images there.
        verify_first_batch: compare the first batch's packed rows with padded ones, once and without dropout, and log how far
            log-probs and gradients are apart.
        on_bad_record: a record that cannot be used (an image that does not decode, a prompt that is too long) stops the run
            (``"raise"``) or is left out, counted and listed in ``bad_records.jsonl`` of the run's folder (``"skip"``). It is never
            replaced by another.
        max_bad_fraction: the largest share of the records seen that ``"skip"`` leaves out before the run stops.
        vision_learning_rate: of the vision tower; like the next three, None is ``learning_rate``.
        projector_learning_rate: of the projector between tower and language model.
        language_learning_rate: of the language model.
        head_learning_rate: of its output head, where it has its own weights.
        vision_layer_decay: the tower's layers have this much less learning rate the further down they are
            (`mpo.models.learning_rates`).
        vision_drop_path: stochastic depth of the tower's last layer (`mpo.models.drop_path`); off in the reference.
        completion_end: score an answer up to its end-of-turn token (``"end_of_turn"``), or everything that the chat template
            puts after the prompt (``"template"``, TRL).
        tile_budget: several images of a prompt share the processor's most tiles (``"prompt"``, the official InternVL code), or
            each may have them (``"image"``, TRL).

    With ``reward_shift="none"``, ``sft_average="token"``, ``completion_end="template"`` and ``tile_budget="image"`` every loss is
    TRL's.

    Other defaults that differ from TRL's: learning_rate 5e-6, one epoch, weight_decay 0.05, cosine schedule, 5 % warm-up,
    max_length None (images take hundreds of tokens each), bf16 only where the hardware has it, logging_nan_inf_filter off (it
    would log a NaN loss as 0).

    Raises:
        ValueError: for unknown loss types, weights of the wrong number or sign, and settings that no chosen loss uses.
    """

    loss_type: list[str] | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "One loss or several, by TRL's names. Default: sigmoid, bco_pair and sft, that is MPO."},
    )
    loss_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per loss type. Default: 0.8, 0.2, 1.0 for MPO, else 1.0 each."}
    )
    reward_shift: str = _choice(
        "running_mean", ("running_mean", "none"), "BCO's delta: the running mean of past rewards, or none (TRL's form)."
    )
    sft_average: str = _choice(
        "completion", ("completion", "token", "square"), "Average the SFT term by completion (paper), token (TRL) or square root."
    )
    completion_end: str = _choice(
        "end_of_turn",
        ("end_of_turn", "template"),
        "Score answers up to their end-of-turn token, or everything the chat template puts there (TRL's form).",
    )

    tile_budget: str = _choice(
        "prompt", BUDGETS, "Several images of a prompt share the processor's most tiles, or each may have them (TRL's form)."
    )

    rows: str = _choice(
        "auto", ("auto", "packed", "padded"), "Answers share their prompt's row (packed), or have padded rows; auto: where it fits."
    )
    packed_attention: str = _choice(
        "auto",
        ("auto", "segments", "flash_attn_2", "flash_attn_3"),
        "Kernel for packed rows: the best PyTorch has, one call per segment, or the flash-attn package's.",
    )
    reference: str = _choice(
        "live", ("live", "cached"), "Reference log-probs: computed in every step, or kept on disk and never computed twice."
    )
    reference_cache: str | None = field(
        default=None,
        metadata={"help": "Folder of cached reference log-probs, shared by runs. Default: ~/.cache/mpo/references."},
    )
    batching: str = _choice(
        "pairs",
        ("pairs", "tokens"),
        "Training batches hold per_device_train_batch_size pairs, or as many as max_tokens_per_batch allows.",
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "With batching=tokens: tokens on a device at once, prompts that pairs share counted once."}
    )
    max_tiles_per_batch: int | None = field(
        default=None, metadata={"help": "With batching=tokens: image tiles on a device at once; None: no limit."}
    )
    group_same_prompt: int = field(
        default=1, metadata={"help": "Put up to this many pairs of one question into one batch, where they share its prompt."}
    )
    verify_first_batch: bool = field(
        default=False, metadata={"help": "Compare the first batch's packed rows with padded ones, and say how far they are apart."}
    )
    on_bad_record: str = _choice(
        "raise", ON_BAD_RECORD, "A record that cannot be used stops the run, or is left out and listed in bad_records.jsonl."
    )
    max_bad_fraction: float = field(
        default=MAX_BAD_FRACTION, metadata={"help": "With on_bad_record=skip: the run stops when more of the records are bad."}
    )

    vision_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the vision tower."})
    projector_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    language_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the language model."})
    head_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the output head."})
    vision_layer_decay: float = field(
        default=1.0, metadata={"help": "Each layer of the vision tower has this share of the next one's learning rate."}
    )
    vision_drop_path: float = field(
        default=0.0, metadata={"help": "Stochastic depth of the vision tower's last layer; 0.1 or 0.4 in the official recipes."}
    )

    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens; None: no limit. Answers are cut to it, images and prompts never."},
    )
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of passes over the pairs."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule after the warm-up."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Warm-up: a number of steps, or below 1 the share of all steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log a loss that is not finite as the mean of the others. Hides divergence."}
    )

    def __post_init__(self) -> None:  # noqa: D105
        if self.loss_type is None:
            self.loss_type = list(MPO_LOSS_TYPE)
            if self.loss_weights is None:
                self.loss_weights = list(MPO_LOSS_WEIGHTS)
        elif isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        if self.precompute_ref_log_probs:
            self.reference = "cached"
        if self.padding_free and self.rows == "auto":
            self.rows = "packed"
        for name in _CHOSEN:
            choices = self.__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}.")
        if self.group_same_prompt < 1:
            raise ValueError(f"group_same_prompt is a number of pairs, at least 1 (no groups); got {self.group_same_prompt}.")
        of_packed_rows = {
            "padding_free": self.padding_free,
            "packed_attention": self.packed_attention != "auto",
            "verify_first_batch": self.verify_first_batch,
        }
        for name, is_set in of_packed_rows.items() if self.rows == "padded" else ():
            if is_set:
                raise ValueError(f"{name}={getattr(self, name)!r} is for packed rows. Leave it out, or rows='padded'.")
        if self.use_weighting and {"aot", "aot_unpaired"} & set(self.loss_type):
            raise ValueError(
                "use_weighting weighs pair by pair, and the aot losses sort the batch, which parts pairs from their "
                "weights. Use one or the other."
            )
        if self.ld_alpha is not None and not 0.0 <= self.ld_alpha <= 1.0:
            raise ValueError(f"ld_alpha lies between 0 and 1; got {self.ld_alpha}.")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError("train_sampling_strategy='batch_rebalance' deals pairs out by rows of tokens. Use 'random'.")
        if self.train_sampling_strategy == "group_by_length":
            raise ValueError(
                "train_sampling_strategy='group_by_length' sorts rows of token ids, and records are encoded with their batch. Use "
                "'random' with batching='tokens' and max_tokens_per_batch, which groups records by what they cost."
            )
        for name, (off, reason) in _WITHOUT_EFFECT.items():
            if getattr(self, name) != off:
                raise ValueError(f"{name}={getattr(self, name)!r} would be ignored: {reason}")
        if not self.sync_ref_model and (self.ref_model_mixup_alpha, self.ref_model_sync_steps) != (0.6, 512):
            raise ValueError("ref_model_mixup_alpha and ref_model_sync_steps need sync_ref_model=True. Set it, or leave them out.")
        if self.precompute_ref_batch_size is not None:
            raise ValueError(
                "precompute_ref_batch_size would be ignored: the cache is filled per_device_eval_batch_size at a time."
            )
        if self.reference == "cached" and self.sync_ref_model:
            raise ValueError("sync_ref_model moves the reference, and reference='cached' keeps its log-probs. Use one of them.")
        if (self.batching == "tokens") != (self.max_tokens_per_batch is not None):
            raise ValueError("batching='tokens' and max_tokens_per_batch go together: set both, or neither.")
        if self.batching == "tokens" and self.rows == "padded":
            raise ValueError(
                "batching='tokens' counts the prompt that completions share once, and rows='padded' computes it for each of them. "
                "Use rows='packed', or batching='pairs'."
            )
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True trains on after an out-of-memory error with the pairs, the reward shift and the weights "
                "of the attempt that failed. Set per_device_train_batch_size (and gradient_accumulation_steps) instead."
            )
        if not self.dataloader_in_order:
            raise ValueError(
                "dataloader_in_order=False delivers batches in an order that depends on timing: a resumed run could not go on "
                "where it was, and repeated pairs could not be told apart. Leave it at True."
            )
        if self.max_tiles_per_batch is not None and self.batching != "tokens":
            raise ValueError("max_tiles_per_batch needs batching='tokens'. Set it, or leave this out.")
        if (self.batching == "tokens" or self.group_same_prompt > 1) and self.train_sampling_strategy != "random":
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} would be ignored: batching and group_same_prompt plan "
                "the batches. Leave it at 'random'."
            )
        if self.reference_cache is not None and self.reference != "cached":
            raise ValueError("reference_cache needs reference='cached'. Set it, or leave this out.")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise ValueError(f"max_bad_fraction is a share of the records, from 0 to below 1; got {self.max_bad_fraction}.")
        if self.max_bad_fraction != MAX_BAD_FRACTION and self.on_bad_record == "raise":
            raise ValueError("max_bad_fraction needs on_bad_record='skip'. Set it, or leave this out.")
        if not 0.0 < self.vision_layer_decay <= 1.0:
            raise ValueError(f"vision_layer_decay lies above 0 and up to 1 (no decay); got {self.vision_layer_decay}.")
        if not 0.0 <= self.vision_drop_path < 1.0:
            raise ValueError(f"vision_drop_path is a probability below 1; got {self.vision_drop_path}.")
        bf16: bool | None = self.bf16  # type: ignore[has-type]
        if bf16 is None and not self.fp16 and (self.use_cpu or not _has_bf16()):
            self.bf16 = False  # TRL's default stops here with an error
        needs_reference = self.mixture().needs_reference  # a wrong loss fails here, before any model loads
        if self.reference == "cached" and not needs_reference:
            raise ValueError(
                "reference='cached' (or precompute_ref_log_probs=True) has no effect: none of the losses "
                f"{self.loss_type} has a reference. Leave it out."
            )
        super().__post_init__()
        if self.activation_offloading and self.device.type == "cpu":
            raise ValueError(
                "activation_offloading moves activations from a GPU to the CPU, and this run has no GPU. Leave it out."
            )
        if self.use_liger_kernel and self.device.type == "cpu":
            raise ValueError("use_liger_kernel runs layers as Triton kernels on a GPU, and this run has none. Leave it out.")
        shares = self.accelerator_config
        if shares.dispatch_batches or shares.split_batches or not shares.even_batches:
            raise ValueError(
                "accelerator_config: dispatch_batches, split_batches and even_batches=False cut a batch between its chosen and "
                "rejected rows or leave ranks with unequal numbers of batches. Leave them at their defaults; no pair counts twice."
            )
        shares.dispatch_batches = False

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the parts that have one of their own (`mpo.models.parts`)."""
        given = {part: getattr(self, f"{part}_learning_rate") for part in PARTS}
        return {part: float(rate) for part, rate in given.items() if rate is not None}

    def mixture(self) -> Mixture:
        """The loss of this configuration, fresh."""
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
