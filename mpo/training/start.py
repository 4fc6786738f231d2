"""What a run starts from: configuration, records, processor, model, and the frozen copy that is its reference.

Undocumented names of other libraries, checked on TRL 1.16.0 and transformers 5.24.0: `trl.trainer.utils.create_model_from_path`
and `get_config_model_id`; `PreTrainedModel._from_config`, `PretrainedConfig._name_or_path`; accelerate's `_hf_hook`.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from trl.trainer.utils import create_model_from_path, get_config_model_id

from mpo.batching.attention import check_backend
from mpo.batching.collator import ConversationCollator, PairCollator
from mpo.data.encoded import with_encoded_images
from mpo.encoding.turns import CONVERSATION, SIDES, check_fields
from mpo.io import bad_record
from mpo.models.family import known_family
from mpo.models.loading import official_folder
from mpo.models.official.checkpoint import open_official
from mpo.models.packable import why_not
from mpo.models.strict import load_strictly, refuse_adapter
from mpo.training.config import MPOConfig
from mpo.training.loop_config import LoopConfig
from mpo.training.reference.adapters import adapted, continued, has_tuner_layers, identity
from mpo.training.reference.fingerprint import Fingerprint, fingerprint

logger = logging.getLogger(__name__)


def checked_arguments(args: Any, model: Any, kind: type[LoopConfig] = MPOConfig) -> Any:
    """Return a copy of the run's configuration `args`, or a default one named after the model; the caller's is never changed.

    Raises ValueError for another class, model_init_kwargs beside a model that is loaded already, or an attention kernel that is not
    installed.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = kind(f"{name.rstrip('/').split('/')[-1] or 'model'}-{'MPO' if kind is MPOConfig else 'SFT'}")
    if not isinstance(args, kind):
        more = " (and pass loss_type to keep a loss other than MPO)" if kind is MPOConfig else ""
        raise ValueError(
            f"The trainer needs an {kind.__name__}, got {type(args).__name__}. {kind.__name__} has the same fields: replace the "
            f"name{more}."
        )
    if args.model_init_kwargs is not None and not isinstance(model, str):
        raise ValueError(
            "model_init_kwargs has no effect on a model that is loaded already. Pass its values where you load the model, or pass "
            "the model's name."
        )
    if args.rows != "padded":
        check_backend(args.packed_attention)
    args = copy.copy(args)
    if args.n_gpu > 1:  # transformers would split each batch over all of them (nn.DataParallel)
        logger.warning(
            f"Training uses 1 of {args.n_gpu} GPUs. Start the script with torchrun or accelerate launch to use all of them."
        )
        args._n_gpu = 1
    return args


def adds_router_loss(config: Any, args: LoopConfig) -> bool:
    """Whether training adds the loss that balances experts, as `DPOTrainer` decides it (``aux_loss_enabled``, TRL 1.16).

    Raises ValueError for a model that does not return router logits.
    """
    text = config.get_text_config()
    given = args.router_aux_loss_coef
    coefficient = getattr(text, "router_aux_loss_coef", 0.0) if given is None else given
    if not hasattr(text, "output_router_logits") or coefficient == 0.0:
        return False
    if not known_family(config).router_loss:
        raise ValueError(
            f"router_aux_loss_coef={coefficient:g} (default: the model's config) adds the router loss, and transformers' models of "
            f"type {config.model_type} do not return router logits. Set router_aux_loss_coef=0."
        )
    return True


def choose_layout(
    args: LoopConfig, *models: nn.Module, router_loss: bool, own_collator: bool = False, reads_logits: bool = False
) -> tuple[str, str | None]:
    """Choose the rows of a run: packed, or padded and the reason why packed ones are not possible.

    Args:
        models: the policy, and the reference if it is another model; parameters may be on the meta device.
        router_loss: training adds the router loss (`adds_router_loss`).
        own_collator: the run has a collator of its own.
        reads_logits: the run has ``compute_metrics``.

    Raises:
        ValueError: for settings that need packed rows where they are not possible.
    """
    if args.rows == "padded":
        return "padded", None
    reasons = (
        "the run has a data_collator of its own" if own_collator else None,
        "compute_metrics reads the logits of padded rows" if reads_logits else None,
        "truncation_mode='keep_end' truncates prompts" if args.truncation_mode == "keep_end" and args.max_length else None,
        f"pad_to_multiple_of={args.pad_to_multiple_of} is set" if args.pad_to_multiple_of else None,
        "the router loss counts the prompt's tokens once per completion" if router_loss else None,
        "neftune_noise_alpha scales its noise by the length of a row" if args.neftune_noise_alpha else None,
        *(why_not(model) for model in models),
    )
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is not None and args.rows == "packed":
        raise ValueError(f"rows='packed' (or padding_free=True) is not possible here: {reason}. Use rows='auto'.")
    if reason is not None and args.batching == "tokens":
        raise ValueError(
            f"batching='tokens' counts the prompt that completions share once, and rows must be padded here: {reason}. Use "
            f"batching={args.by_number!r}."
        )
    return ("packed", None) if reason is None else ("padded", reason)


def collator_of(processing_class: Any, args: LoopConfig) -> PairCollator | ConversationCollator:
    """Build the collator of a run on pairs or conversations; its layout is chosen later (`choose_layout`)."""
    if args.pad_token is not None:
        getattr(processing_class, "tokenizer", processing_class).pad_token = args.pad_token

    def named(*names: str) -> dict[str, Any]:
        return {name: getattr(args, name) for name in names}

    given = {"processing_class": processing_class, "augment_seed": args.order_seed}
    given |= named("tile_budget", "pad_to_multiple_of", "on_bad_record")
    if isinstance(args, MPOConfig):
        own = named("max_length", "truncation_mode", "completion_end", "ld_alpha")
        return PairCollator(**given, **own, keys=args.reference == "cached")
    return ConversationCollator(**given, **named("train_on"), budget=args.encoding_rules()["budget"])


def check_columns(dataset: Any, name: str, needed: Sequence[Sequence[str]] = (SIDES,), processing_class: Any = None) -> None:
    """Refuse a data set without what its records need, or whose first has a column that is not used but may be part of a prompt.

    A record has all columns of one of the sets in `needed`.

    Raises:
        ValueError: naming the missing columns, or the column that is not used (`mpo.encoding.turns.check_fields`); for no records.
    """
    columns = getattr(dataset, "column_names", None) or []  # None: not known before a stream is read
    missing = min(([column for column in each if columns and column not in columns] for each in needed), key=len)
    if missing:
        hint = " Load MMPR files with mpo.data.load_preferences." if "question" in columns else ""
        if any(name in columns for name in ("conversations", "query")):
            load = "load_preferences" if SIDES in needed else "load_conversations"
            hint = f" Load files of ShareGPT's, LLaVA's or ms-swift's format with mpo.data.{load}."
        records = "A conversation needs 'messages', or 'prompt' and 'completion'."
        if SIDES in needed:
            records = "A preference record needs 'chosen' and 'rejected', and 'prompt' unless both contain it."
        raise ValueError(
            f"{name} has no column {' and no column '.join(map(repr, missing))}; it has {', '.join(columns)}. {records}{hint} "
            "(dataset.rename_column renames other columns.)"
        )
    if not isinstance(dataset, (Dataset, IterableDataset)):
        return
    has_transform = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
    bare = dataset if has_transform else with_encoded_images(dataset.with_format(None))
    if (record := next(iter(bare), None)) is None:
        raise ValueError(f"{name} has no records. Give it one or more, or leave it out.")
    with bad_record(name):
        check_fields(record, SIDES if SIDES in needed else CONVERSATION, processing_class)


def load_processing_class(model: Any, args: LoopConfig) -> Any:
    """Load the processor or tokenizer of a model, by its name. Raises ValueError for a model without a name."""
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    if isinstance(model, str):
        refuse_adapter(model)
    if not name:
        raise ValueError(
            "The model was built from a config, so its tokenizer or processor cannot be found by name. Pass it as "
            "`processing_class`."
        )
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def load_by_name(name: str, args: LoopConfig, quantization_config: Any, *, whole: bool) -> PreTrainedModel:
    """Load a model as TRL does, but strictly; `whole`: it is trained without adapters.

    Raises ValueError for a checkpoint whose tensors do not match its config, and for quantized weights without an adapter.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if whole:
            raise ValueError(
                "quantization_config without peft_config: quantized weights cannot be trained. Pass a peft_config to train an "
                "adapter on them (QLoRA), or leave quantization_config out."
            )
        if "quantization_config" in kwargs:
            raise ValueError(
                "quantization_config is passed twice, to the trainer and in args.model_init_kwargs. Pass it to the trainer alone."
            )
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each rank holds the model on its own device
    model: PreTrainedModel = load_strictly(create_model_from_path, name, **kwargs)
    return model


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Copy `model` in its current state, in eval mode and without gradients. The copy of a sharded model (ZeRO-3) is sharded."""
    frozen: PreTrainedModel = _sharded_copy(model) if _is_sharded(model) else copy.deepcopy(model)
    for module in frozen.modules():
        if not hasattr(module, "_hf_hook"):
            # A forward that an earlier trainer set on the instance would run the original's.
            module.__dict__.pop("forward", None)
            module.__dict__.pop("get_image_features", None)
    return frozen.eval().requires_grad_(False)


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _sharded_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Make a model of the same config, sharded from the beginning (ZeRO-3), and copy the weights, gathered one by one."""
    import deepspeed

    clone: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    with torch.no_grad():
        for source, target in zip(model.parameters(), clone.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([source, target], modifier_rank=0):  # broadcasts rank 0's change
                if torch.distributed.get_rank() == 0:
                    target.copy_(source)
        for source, target in zip(model.buffers(), clone.buffers(), strict=True):
            target.copy_(source)
    return clone


def check_leftovers(model: nn.Module) -> None:
    """Refuse adapter layers in a model that is not a PeftModel: transformers would neither save nor load them.

    Raises ValueError with possible causes.
    """
    if not is_peft_model(model) and has_tuner_layers(model):
        raise ValueError(
            f"This {type(model).__name__} has adapter layers and is not a PeftModel. An earlier get_peft_model or trainer added "
            "them, or an adapter's folder was loaded as a model. Load the model again, call unload(), or pass the PeftModel."
        )


def check_apart(model: nn.Module, ref_model: nn.Module) -> None:
    """Refuse a reference that shares trained weights with the policy: it would change during training.

    Raises ValueError naming one of them.
    """
    held = {parameter.data_ptr() for parameter in ref_model.parameters() if parameter.numel()}
    shared = [name for name, p in model.named_parameters() if p.requires_grad and p.numel() and p.data_ptr() in held]
    if shared:
        raise ValueError(
            f"ref_model shares {len(shared)} trained weights with the model ({shared[0]} and others), so it would change with it. "
            "Pass a copy (copy.deepcopy), or leave ref_model out."
        )


def check_trained(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a model without trained parameters, or whose training result could not be saved; `optimizer`: the user's, or None.

    Raises ValueError when no parameter is trained, for an optimizer of another model, or for rows added to the embeddings beside an
    adapter.
    """
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        raise ValueError(
            "The model's 4-bit layers were packed for inference by a forward pass in evaluation mode on a CPU, so they pass no "
            "gradients. Load the model again."
        )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        cause = (
            "its adapter is frozen: load it with PeftModel.from_pretrained(..., is_trainable=True)"
            if is_peft_model(model)
            else "all of its parameters are frozen: call requires_grad_(True) on those to train, or pass a peft_config"
        )
        raise ValueError(f"{type(model).__name__} has no trained parameters: {cause}.")
    if optimizer is not None:
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = len(given - {id(parameter) for parameter in model.parameters()})
        if missing or not given & trained:
            raise ValueError(
                f"The optimizer has {len(given)} parameters: {missing} do not belong to this model and {len(given & trained)} are "
                "trained. Make it from the model that is passed (with peft_config, which adds parameters, pass a PeftModel)."
            )
    if is_peft_model(model):
        _check_added_rows(model)


def _check_added_rows(model: Any) -> None:
    """Refuse embeddings with more or fewer rows than in their checkpoint: an adapter's folder does not hold the difference."""
    base = model.get_base_model()
    name = str(getattr(base.config, "_name_or_path", "") or "")
    rows = getattr(base.get_input_embeddings(), "num_embeddings", None)
    if not name or rows is None:
        return
    try:
        folder = official_folder(name)
        config = AutoConfig.from_pretrained(name, local_files_only=True) if folder is None else open_official(folder).config
    except (OSError, ValueError):  # no checkpoint, or one with custom code: nothing to compare with
        return
    saved = getattr(config.get_text_config(), "vocab_size", rows)
    if saved != rows:
        raise ValueError(
            f"The model's embeddings have {rows} rows, those of its checkpoint {name} have {saved}. An adapter's folder does not "
            "hold the difference, so the trained adapter could not be loaded. Save the resized model and its tokenizer with "
            "save_pretrained, load it from there, and train the adapter on it."
        )


class Adapters:
    """Add the policy's adapters in place of peft's `get_peft_model`, and keep their start values.

    TRL would copy an existing adapter named "default" into a second one, "ref", which would be initialized again.

    Args:
        given: a model with adapters, or None for a fresh adapter.
        optimizer: optimizer of the user, or None.
        fingerprint: function that identifies a reference, for cached log-probs when the policy is its own reference; else None.

    Attributes:
        start: start values that the reference needs, once the adapters are added. None without adapters.
        reference: fingerprint of the reference, or None.
        identity: checksum of the weights that are not trained (`mpo.training.reference.adapters.identity`), or None.

    Raises:
        ValueError: for adapters that cannot be trained; see `mpo.training.reference.adapters`.
    """

    def __init__(
        self, given: PeftModel | None, *, optimizer: torch.optim.Optimizer | None, fingerprint: Callable[[Any], Fingerprint] | None
    ) -> None:
        self.given, self.optimizer, self._fingerprint = given, optimizer, fingerprint
        self.start = None if given is None else continued(given)
        self.reference: Fingerprint | None = None
        self.identity = None if given is None else identity(given, frozen=True)
        self._trained: dict[str, Tensor] = {}

    def put_on(self, base: Any, config: Any, **options: Any) -> PeftModel:
        """Add the adapters. TRL calls it with the arguments of `get_peft_model`."""
        policy = self.given
        if policy is None:
            base_fingerprint = self._fingerprint(base) if self._fingerprint else None
            self.identity = identity(base)
            policy, self.start = adapted(base, config, partial(get_peft_model, **options))
            self.reference = base_fingerprint
        check_trained(policy, self.optimizer)
        assert self.start is not None
        if self._fingerprint and self.start.adapters_on:
            self.reference = self._fingerprint(policy)
        if getattr(policy, "is_loaded_in_4bit", False) or getattr(policy, "is_loaded_in_8bit", False):
            self._trained = {name: parameter.data for name, parameter in policy.named_parameters() if parameter.requires_grad}
        return policy

    def unround(self, policy: nn.Module) -> None:
        """Restore the dtype of the weights that are trained beside 4-bit or 8-bit weights, which TRL casts to bfloat16.

        In bfloat16 a weight of 0.01 does not change by less than 2e-5, the size of an AdamW step, AdamW's second moment, in the
        weight's dtype, does not fall, and an adapter that is trained further is rounded.
        """
        parameters = dict(policy.named_parameters())
        for name, value in self._trained.items():
            parameters[name].data = value.to(parameters[name].device)
        self._trained = {}


def fingerprint_of(reference: Any, processing_class: Any, args: MPOConfig) -> Fingerprint:
    """Identify a reference by its weights, its compute dtype and everything else that determines its log-probs.

    Raises ValueError for sharded weights.
    """
    if _is_sharded(reference):
        raise ValueError(
            "reference='cached' identifies a reference by its weights, and ZeRO-3 shards them while they are loaded. Use "
            "reference='live', or launch=zero2 or fsdp2."
        )
    return fingerprint(
        reference, processing_class, compute_dtype=compute_dtype(reference, args), scoring={"completion_end": args.completion_end}
    )


def compute_dtype(model: Any, args: MPOConfig) -> torch.dtype:
    """Return the dtype a model computes in: autocast's, or that of its weights."""
    dtype: torch.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision, model.dtype)  # or a launcher's
    return dtype
