"""What a run starts from: configuration, records, processor, model, and the copy of it that stays as its reference.

Checked against TRL 1.16.0; of its inner functions it uses `create_model_from_path` and `get_config_model_id`.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, PreTrainedModel
from trl.trainer.utils import create_model_from_path, get_config_model_id

from mpo.config import MPOConfig
from mpo.models.strict import load_strictly, refuse_adapter
from mpo.packing.attention import check_backend
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
        hint = " Lines of MMPR are read with mpo.data.sources.load_pairs." if "question" in columns else ""
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


def hold_adapters_in_float32(model: nn.Module) -> None:
    """Give what is trained beside weights of 4 or 8 bits the dtype that peft gave it; TRL makes it bfloat16.

    A bfloat16 weight of 0.01 does not change by less than 2e-5, a step of AdamW at that learning rate, and AdamW's second moment,
    in the weight's dtype, hardly ever falls.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            dtype: Any = torch.float32 if "lora_" in name else model.dtype
            parameter.data = parameter.data.to(dtype)


def disable_dropout_outside_adapters(model: nn.Module) -> None:
    """Set the dropout probability to 0, except in adapters: theirs was asked for with them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


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
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else reference.dtype
    return fingerprint(reference, processing_class, compute_dtype=dtype, scoring={"answer_end": args.answer_end})
