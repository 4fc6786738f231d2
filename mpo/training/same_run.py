"""What a resumed run must have in common with the run that saved its checkpoint, compared by name before a step is taken."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from mpo.training.checkpoint import load_state
from mpo.training.config import MPOConfig
from mpo.training.loop_config import LoopConfig
from mpo.training.reference.fingerprint import flat, processor_parts
from mpo.training.sft_config import PackedSFTConfig

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    # Length of the run.
    *("num_train_epochs", "max_steps"),
    # Logging.
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_on_each_node", "log_level"),
    *("log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "include_num_input_tokens_seen", "debug", "skip_memory_metrics"),
    # Saving. (An output folder, and what the model is loaded with: its weights are compared.)
    *("output_dir", "save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("enable_jit_checkpoint", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "ignore_data_skip"),
    *("model_init_kwargs", "trust_remote_code"),
    # Evaluation.
    *("eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "prediction_loss_only", "eval_on_start"),
    *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
    *("bf16_full_eval", "fp16_full_eval", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "label_names"),
    *("do_train", "do_eval", "do_predict"),
    # Hardware, memory and the number of ranks. Pairs per step are compared with the order of the pairs, as is the seed.
    *("use_cpu", "local_rank", "accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed", "tf32"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "average_tokens_across_devices", "full_determinism"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs"),
    *("activation_offloading", "use_cache", "torch_empty_cache_steps", "auto_find_batch_size", "packed_attention"),
    *("torch_compile", "torch_compile_backend", "torch_compile_mode", "use_liger_kernel", "liger_kernel_config"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataset_num_proc", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"),
    *("ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout", "seed", "data_seed"),
    # Limits and checks that change no step; where reference log-probs and vision features come from, the same live or cached.
    *("max_bad_fraction", "verify_first_batch", "reference", "reference_cache", "precompute_ref_log_probs"),
    *("vision_features", "vision_feature_cache", "vision_feature_cache_gb"),
}
"""Fields of `MPOConfig` that may differ when a run is resumed. All others must be equal."""
MAY_CHANGE_IN_RECIPES = {
    *("run_dir", "resume", "dry_run", "dry_run_gpu_gb", "dry_run_records", "launch", "samples"),
    # Where model and data are: weights and records are compared by content.
    *("model.name_or_path", "model.trust_remote_code", "model.attn_implementation"),
    *("data.path", "data.meta", "data.mix", "data.image_root", "data.eval_path", "data.eval_image_root", "data.eval_split"),
    *("data.eval_format", "data.num_proc", "data.bad_records", "data.max_bad_fraction"),
    *(f"trainer.{name}" for name in MAY_CHANGE),
}
"""Keys and groups of a recipe that may differ; those of ``trainer`` are `MAY_CHANGE`."""
_NOT_OF_AN_ADAPTER = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "task_type")

_NOT_OF_A_MODEL = ("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "id2label", "label2id")


def description(model: nn.Module, args: LoopConfig, processing_class: Any, optimizer: Any) -> dict[str, Any]:
    """Describe what a resumed run must have in common with this one, besides weights and records, as plain JSON values by name.

    `model` is not wrapped yet; `optimizer` is the user's, or None.
    """
    trained = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    digest = hashlib.blake2b("\n".join(trained).encode(), digest_size=4).hexdigest()
    adapters = model.peft_config if isinstance(model, PeftModel) else {}
    found = {field.name: getattr(args, field.name) for field in fields(args) if field.init and field.name not in MAY_CHANGE}
    found |= {
        **_processor(processing_class),
        "trained parameters": f"{len(trained)} ({digest})",
        "optimizer passed to the trainer": optimizer and {"class": type(optimizer).__name__, **optimizer.defaults},
        "adapters": {adapter: config.peft_type for adapter, config in adapters.items()},
    }
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = {name: value for name, value in flat(base.config.to_dict()) if not {*name.split(".")} & {*_NOT_OF_A_MODEL}}
    found |= {f"config.json's {name}": value for name, value in settings.items()}
    for adapter, config in adapters.items():
        own = config.to_dict().items()
        found |= {f"{adapter} adapter's {name}": value for name, value in own if name not in _NOT_OF_AN_ADAPTER}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=_plain))
    return plain


def _processor(processing_class: Any) -> dict[str, str]:
    try:
        return processor_parts(processing_class)
    except (AttributeError, NotImplementedError, OSError, TypeError, ValueError):  # settings without a stable hash
        return {"processing class": type(processing_class).__name__}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    text = str(getattr(value, "value", value))
    return type(value).__name__ if " at 0x" in text else text  # an address differs between processes


def check_same_run(checkpoint: str, run: Mapping[str, Any], order: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings than it was saved with. Warn of a checkpoint that does not hold them.

    Args:
        run: the `description` of this run; empty: not compared.
        order: what determines which pairs a step gets; names that an earlier version did not save are not compared.
    """
    state = load_state(checkpoint)
    before, now = dict(state.get("run") or {}), dict(run)
    if run and not before:
        logger.warning(
            f"{checkpoint} was written by an earlier version, which did not save the run's settings. Whether loss, learning rate, "
            "adapter and records are those of that run is not checked."
        )
    if not (run and before):
        before, now = {}, {}
    for name in order.keys() & state["order"].keys():
        before[name], now[name] = state["order"][name], order[name]
    other_pairs = any(state["order"].get(name, value) != value for name, value in order.items())
    fix = "set ignore_data_skip=True to go on from the beginning of the other records, or " if other_pairs else ""
    check_same(before, now, checkpoint, fix=f"{fix}choose another output_dir")


def check_same_recipe(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to resume a recipe `now` with other settings than `before`, the ``resolved.yaml`` beside its checkpoint, has."""
    first, second = _recipe_settings(before), _recipe_settings(now)
    if first.get("peft.kind") != second.get("peft.kind"):
        first, second = ({n: v for n, v in one.items() if n == "peft.kind" or n[:5] != "peft."} for one in (first, second))
    names = {*first, *second}
    first, second = ({name: one.get(name) for name in names} for one in (first, second))
    check_same(first, second, checkpoint, fix="choose another run_dir")


def _recipe_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a recipe that must not change, by key. Keys that are not set have their default."""
    own = PackedSFTConfig if config.get("task") == "sft" else MPOConfig
    classes = {"trainer": own, "loss": own, "peft": LoraConfig}
    found = {
        f"{group}.{field.name}": field.default if field.default_factory is MISSING else field.default_factory()
        for group, kind in classes.items()
        for field in fields(kind)
        if field.init and (group != "peft" or (config.get("peft") or {}).get("kind", "none") != "none")
    }
    found = {"task": "train", **{name: value for name, value in found.items() if value not in (None, MISSING)}}
    found |= flat(config)
    return {name: value for name, value in found.items() if not _may_change(name)}


def _may_change(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:count]) in MAY_CHANGE_IN_RECIPES for count in range(1, len(parts) + 1))


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: str, *, fix: str) -> None:
    """Compare the settings that both have, by name: another version of a library has others.

    Args:
        before: settings of the run that wrote the checkpoint.
        fix: what to do instead of setting them back.

    Raises:
        ValueError: naming every setting that differs, with both values.
    """
    changed = [name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]]
    if changed:
        listed = "".join(f"\n  {name} = {_short(before[name])} (now {_short(now[name])})" for name in changed)
        raise ValueError(
            f"The run that wrote {checkpoint} had other settings:{listed}\nSet them back to resume it, or {fix} "
            "for a new run (the checkpoint can be its model)."
        )


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
