"""What a run starts from: configuration, records, processor, model, and the copy of it that stays as its reference.

Checked against TRL 1.16.0; of its inner functions it uses `create_model_from_path` and `get_config_model_id`.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoProcessor, PreTrainedModel
from trl.trainer.utils import create_model_from_path, get_config_model_id

from mpo.config import MPOConfig
from mpo.models.loading import official_folder
from mpo.models.official.checkpoint import open_official
from mpo.models.strict import load_strictly, refuse_adapter
from mpo.packing.attention import check_backend
from mpo.reference.adapters import adapted, continued, has_tuner_layers, identity
from mpo.reference.fingerprint import Fingerprint, fingerprint


def checked_arguments(args: MPOConfig | None, model: Any) -> MPOConfig:
    """The run's configuration, or a default one named after the model.

    Raises:
        ValueError: for another class, fields that do not go with a model that is loaded already, or an attention kernel that is
            not installed.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = MPOConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-MPO")
    if not isinstance(args, MPOConfig):
        raise ValueError(
            f"MPOTrainer takes an MPOConfig, got {type(args).__name__}. MPOConfig has the same fields: replace the name "
            "(and pass loss_type to keep a loss other than MPO)."
        )
    if args.model_init_kwargs is not None and not isinstance(model, str):
        raise ValueError(
            "model_init_kwargs say how to load a model, and this one is loaded already. Pass them where you load it, or "
            "pass its name."
        )
    if args.rows != "padded":
        check_backend(args.packed_attention)
    return args


def check_columns(dataset: Any, name: str) -> None:
    """Refuse a data set without answers.

    Raises:
        ValueError: naming the missing columns.
    """
    columns = getattr(dataset, "column_names", None) or []  # none: not known before a stream is read
    missing = [column for column in ("chosen", "rejected") if columns and column not in columns]
    if missing:
        hint = " Lines of MMPR are read with mpo.data.sources.load_preferences." if "question" in columns else ""
        raise ValueError(
            f"{name} has no column {' and no column '.join(map(repr, missing))}; it has {', '.join(columns)}. A preference record "
            f"needs 'chosen' and 'rejected', and 'prompt' unless both answers repeat it.{hint} "
            "(Rename others with dataset.rename_column.)"
        )


def load_processing_class(model: Any, args: MPOConfig) -> Any:
    """The processor or tokenizer of a model, by its name.

    Raises:
        ValueError: for a model that has none.
    """
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    if isinstance(model, str):
        refuse_adapter(model)
    if not name:
        raise ValueError(
            "This model was built from a config, so its tokenizer or processor cannot be looked up by name. Pass it as "
            "`processing_class`."
        )
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def load_by_name(name: str, args: MPOConfig, quantization_config: Any, *, whole: bool) -> PreTrainedModel:
    """Load a model as TRL would, but strictly.

    Args:
        name: of a checkpoint, or its folder.
        args: the run's configuration.
        quantization_config: as of `MPOTrainer`.
        whole: the model is trained as a whole, without adapters.

    Raises:
        ValueError: for a checkpoint whose tensors are not those of its config, and for weights of 4 bits that cannot be trained.
    """
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if whole:
            raise ValueError(
                "A quantized model cannot be trained as a whole. Pass a `peft_config` to train an adapter on it (QLoRA), or drop "
                "`quantization_config`."
            )
        if "quantization_config" in kwargs:
            raise ValueError("quantization_config is in args.model_init_kwargs too. Pass it once, to the trainer.")
        kwargs["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        kwargs["device_map"] = None  # each rank holds the model on its own device
    model: PreTrainedModel = load_strictly(create_model_from_path, name, **kwargs)
    return model


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` as it is now, in eval mode and without gradients; of one in pieces (ZeRO-3), in pieces too."""
    twin: PreTrainedModel = _copy_of_pieces(model) if _in_pieces(model) else copy.deepcopy(model)
    for module in twin.modules():
        if not hasattr(module, "_hf_hook"):
            # A forward that an earlier trainer put on the instance would still run the original.
            module.__dict__.pop("forward", None)
    return twin.eval().requires_grad_(False)


def _in_pieces(model: nn.Module) -> bool:
    """Whether DeepSpeed has shared out the weights already, as it does with ZeRO-3 while they are loaded."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _copy_of_pieces(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same config, in pieces from its making on (DeepSpeed ZeRO-3), and the weights gathered one by one."""
    import deepspeed

    twin: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
    with torch.no_grad():
        for source, target in zip(model.parameters(), twin.parameters(), strict=True):
            with deepspeed.zero.GatheredParameters([source, target], modifier_rank=0):  # whose change all ranks then have
                if torch.distributed.get_rank() == 0:
                    target.copy_(source)
        for source, target in zip(model.buffers(), twin.buffers(), strict=True):
            target.copy_(source)
    return twin


def check_leftovers(model: nn.Module) -> None:
    """Refuse adapter layers in a model that is not a PeftModel: plain transformers would neither save nor load them.

    Raises:
        ValueError: saying how they may have got there.
    """
    if not is_peft_model(model) and has_tuner_layers(model):
        raise ValueError(
            f"This {type(model).__name__} has adapter layers in it, put there by an earlier get_peft_model or trainer, or by "
            "loading an adapter's folder as a model. Load the model again, take them out with unload(), or pass the PeftModel."
        )


def check_apart(model: nn.Module, ref_model: nn.Module) -> None:
    """Refuse a reference that has trained weights of the policy: it would move along.

    Raises:
        ValueError: naming one of them.
    """
    held = {parameter.data_ptr() for parameter in ref_model.parameters() if parameter.numel()}
    shared = [name for name, p in model.named_parameters() if p.requires_grad and p.numel() and p.data_ptr() in held]
    if shared:
        raise ValueError(
            f"ref_model shares {len(shared)} trained weights with the model ({shared[0]} and others), so it would change with it. "
            "Pass a copy (copy.deepcopy), or leave ref_model out."
        )


def check_trained(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a model of which nothing would be trained, or something that cannot be saved.

    Args:
        model: as it will be trained.
        optimizer: made by the user, or None.

    Raises:
        ValueError: when no parameter is trained; for an optimizer of another model; or rows that were added to the embeddings under
            an adapter.
    """
    if any(getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in model.parameters()):
        raise ValueError(
            "The model's 4-bit layers were packed for inference by a forward pass in evaluation mode on a CPU, and pass no "
            "gradient on. Load the model again."
        )
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        cause = (
            "its adapter is frozen: load it with PeftModel.from_pretrained(..., is_trainable=True)"
            if is_peft_model(model)
            else "all of its parameters are frozen: call requires_grad_(True) on those to train, or pass a peft_config"
        )
        raise ValueError(f"Nothing of this {type(model).__name__} would be trained; {cause}.")
    if optimizer is not None:
        given = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = len(given - {id(parameter) for parameter in model.parameters()})
        if missing or not given & trained:
            raise ValueError(
                f"Of the optimizer's {len(given)} parameters {missing} are not of this model and {len(given & trained)} are "
                "trained. Make the optimizer from the model that is passed (a peft_config adds parameters: pass a PeftModel)."
            )
    if is_peft_model(model):
        _check_added_rows(model)


def _check_added_rows(model: Any) -> None:
    """Refuse embeddings with more or fewer rows than their checkpoint: an adapter's folder does not hold these."""
    base = model.get_base_model()
    name = str(getattr(base.config, "_name_or_path", "") or "")
    rows = getattr(base.get_input_embeddings(), "num_embeddings", None)
    if not name or rows is None:
        return
    try:
        folder = official_folder(name)
        config = AutoConfig.from_pretrained(name, local_files_only=True) if folder is None else open_official(folder).config
    except (OSError, ValueError):  # the name is no checkpoint, or one with code of its own: nothing to compare with
        return
    saved = getattr(config.get_text_config(), "vocab_size", rows)
    if saved != rows:
        raise ValueError(
            f"The model has {rows} rows of embeddings and its checkpoint {name} has {saved}. An adapter's folder does not hold "
            "the difference, so what is trained could not be loaded. Save the resized model with its tokenizer (save_pretrained), "
            "load it from there, and train the adapter on that."
        )


class Adapters:
    """Puts the policy's adapters on, in the place of peft's `get_peft_model`, and keeps what they start from.

    TRL would copy a given adapter by the name "default" into a second one, "ref", which initializes it anew.

    Args:
        given: a model that comes with adapters, or None where a fresh adapter is made.
        optimizer: made by the user, or None.
        fingerprint: of the reference, where its log-probs are cached and the policy is its reference.

    Attributes:
        start: what the reference needs, once the adapters are on; None for a run without.
        reference: the reference's fingerprint, likewise.
        identity: of the weights that are not trained (`mpo.reference.adapters.identity`), likewise.

    Raises:
        ValueError: for adapters that cannot be trained; see `mpo.reference.adapters`.
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
        """Called by TRL with the arguments of `get_peft_model`."""
        policy = self.given
        if policy is None:
            of_base = self._fingerprint(base) if self._fingerprint else None
            self.identity = identity(base)
            policy, self.start = adapted(base, config, partial(get_peft_model, **options))
            self.reference = of_base
        check_trained(policy, self.optimizer)
        assert self.start is not None
        if self._fingerprint and self.start.adapters_on:
            self.reference = self._fingerprint(policy)
        if getattr(policy, "is_loaded_in_4bit", False) or getattr(policy, "is_loaded_in_8bit", False):
            self._trained = {name: parameter.data for name, parameter in policy.named_parameters() if parameter.requires_grad}
        return policy

    def unround(self, policy: nn.Module) -> None:
        """Put back what is trained beside weights of 4 or 8 bits; TRL makes it bfloat16.

        There a weight of 0.01 does not change by less than 2e-5, a step of AdamW at that rate, nor does AdamW's second moment, in
        the weight's dtype, fall; and an adapter that is trained further is rounded.
        """
        parameters = dict(policy.named_parameters())
        for name, value in self._trained.items():
            parameters[name].data = value.to(parameters[name].device)
        self._trained = {}


def fingerprint_of(reference: Any, processing_class: Any, args: MPOConfig) -> Fingerprint:
    """Identify a reference by its weights, in the precision it computes in, and all that decides its log-probs.

    Raises:
        ValueError: for weights in pieces.
    """
    if _in_pieces(reference):
        raise ValueError(
            "reference='cached' knows a reference by its weights, and ZeRO-3 holds them in pieces from the start. Use "
            "reference='live', or launch=zero2 or fsdp2."
        )
    return fingerprint(
        reference, processing_class, compute_dtype=compute_dtype(reference, args), scoring={"completion_end": args.completion_end}
    )


def compute_dtype(model: Any, args: MPOConfig) -> torch.dtype:
    """What a model computes in: autocast's dtype, or that of its weights."""
    dtype: torch.dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    return dtype
