"""What a run starts from: configuration, records, processor, model, and the copy of it that stays as its reference.

Checked against TRL 1.16.0; of its inner functions it uses `create_model_from_path` and `get_config_model_id`.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, PreTrainedModel, set_seed
from trl.trainer.utils import create_model_from_path, get_config_model_id

from mpo.config import MPOConfig
from mpo.reference.fingerprint import Fingerprint, fingerprint


def checked_arguments(args: MPOConfig | None, model: Any) -> MPOConfig:
    """The run's configuration, or a default one named after the model.

    Raises:
        ValueError: for another class, or fields that do not go with a model that is loaded already.
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
    if not name:
        raise ValueError(
            "This model was built from a config, so its tokenizer or processor cannot be looked up by name. Pass it as "
            "`processing_class`."
        )
    revision = (args.model_init_kwargs or {}).get("revision") if isinstance(model, str) else None
    return AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def load_whole_model(name: str, args: MPOConfig, quantization_config: Any) -> PreTrainedModel:
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


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` as it is now, in eval mode and without gradients."""
    twin: PreTrainedModel = copy.deepcopy(model)
    for module in twin.modules():
        if not hasattr(module, "_hf_hook"):
            # A forward that an earlier trainer put on the instance would still run the original.
            module.__dict__.pop("forward", None)
    return twin.eval().requires_grad_(False)


def disable_dropout_outside_adapters(model: nn.Module) -> None:
    """Set the dropout probability to 0, except in adapters: theirs was asked for with them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def fingerprint_of(reference: Any, processing_class: Any, args: MPOConfig) -> Fingerprint:
    """Identify a reference by its weights, in the precision it computes in, and all that decides its log-probs."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else reference.dtype
    return fingerprint(reference, processing_class, compute_dtype=dtype, scoring={"answer_end": args.answer_end})
