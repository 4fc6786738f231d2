"""Fingerprint of a reference: short hashes of what its log-probs depend on, of contents and never of names or paths.

A `Fingerprint` identifies what all log-probs of a run share: the reference model and how text and images become its input. A key
(`mpo.encoding.keys.completion_key`) identifies one completion of one prompt with its images. Together they identify a log-prob.
"""

import enum
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from tokenizers import AddedToken
from torch import Tensor, nn

from mpo.encoding.keys import KEY_BYTES
from mpo.models.parts import base_model

FORMAT = "2"
"""Increased when the same model gets other log-probs, so that a cache of an earlier version is not read. 2: always in evaluation
mode, with the values from before training."""
_CHUNK_BYTES = 64 * 2**20
_NOT_IN_FORWARD = {
    # Origin of a model.
    *("transformers_version", "architectures", "auto_map", "processor_class", "name_or_path", "peft_version"),
    # The weights' hash includes their dtype; the compute dtype is a part of its own.
    *("dtype", "torch_dtype"),
    # Other outputs than logits, classification heads, generation (a trainer may set the special tokens).
    *("output_hidden_states", "output_attentions", "output_router_logits", "return_dict", "use_cache", "id2label", "label2id"),
    *("problem_type", "is_encoder_decoder", "bos_token_id", "eos_token_id", "pad_token_id", "chunk_size_feed_forward"),
    *("initializer_range", "initializer_factor"),
    # Origin of an adapter's base.
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"),
    # Of a processor: arguments that a call may override, and parts that have their own hash.
    *("return_tensors", "device", "use_fast", "tokenizer", "chat_template", "special_tokens_map_file", "tokenizer_file"),
}
_DROPOUT = ("dropout", "drop_path", "layerdrop")  # off in a reference


@dataclass(frozen=True)
class Fingerprint:
    """What all log-probs of a cache share, by named part. Two fingerprints are equal if their parts are."""

    parts: Mapping[str, str]  # part -> hash, in hex (``compute dtype``: its name)
    # Part -> the settings that were hashed, for parts that are settings. Only used to report differences.
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)  # origin, for information; never compared

    @property
    def digest(self) -> str:
        """Return one hash of all parts, 32 hex digits."""
        return hash_settings(dict(self.parts))

    def differences(self, other: "Fingerprint") -> list[str]:
        """Return the parts that differ from `other`; settings by name, as ``other's value -> this one's``.

        >>> here, there = Fingerprint({"weights": "a", "scoring": "b"}), Fingerprint({"weights": "a", "scoring": "c"})
        >>> here.differences(there), here.differences(here)
        (['scoring'], [])
        """
        found = []
        for part in sorted({*self.parts, *other.parts}):
            if self.parts.get(part) == other.parts.get(part):
                continue
            mine, theirs = dict(flat(self.settings.get(part, {}))), dict(flat(other.settings.get(part, {})))
            names = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
            changes = [f"{name} {_short(theirs.get(name))} -> {_short(mine.get(name))}" for name in names[:5]]
            if not names and part == "compute dtype":
                changes = [f"{other.parts.get(part)} -> {self.parts.get(part)}"]
            found.append(part + (f" ({', '.join(changes)}{', ...' if len(names) > 5 else ''})" if changes else ""))
        return found


def fingerprint(
    model: nn.Module, processing_class: Any, *, compute_dtype: torch.dtype | str, scoring: Mapping[str, Any] | None = None
) -> Fingerprint:
    """Compute the fingerprint of a reference model and of how records become its input.

    Compute it before the model is sharded (FSDP, ZeRO-3), and before its first forward pass: bitsandbytes permanently rounds the
    scales of 4-bit layers when they first run on a CPU. It does not depend on the model's device or origin, nor on dropout, on
    train or eval mode, or on the attention implementation (which changes the last bits only).

    Args:
        model: the reference model, including its adapters, those of a PeftModel or those put into a plain model.
        compute_dtype: dtype the model computes in: autocast's if enabled, else that of the weights.
        scoring: settings that determine which tokens are labelled, as plain values: ``completion_end``, ``max_length``,
            ``truncation_mode``.

    Raises:
        ValueError: when weights are sharded or not loaded, or a setting is not a plain value.
    """
    base = base_model(model)
    config = plain({"class": type(base).__name__, "config": base.config.to_dict()}, "the model's config")
    config["modules"] = hash_settings(module_settings(base))
    if adapters := _adapter_settings(model):
        config["adapters"] = adapters
    images, rules = _image_settings(processing_class), plain(dict(scoring or {}), "the scoring")
    parts = {
        "model weights": hash_weights(model),
        "model config": hash_settings(config),
        "compute dtype": str(compute_dtype).removeprefix("torch."),
        **processor_parts(processing_class),
        "scoring": hash_settings(rules),
        "format": FORMAT,
    }
    about = {
        "model": type(base).__name__,
        "name_or_path": str(getattr(base.config, "_name_or_path", "")),
        "reference_adapter": bool(adapters),
        "processing_class": type(processing_class).__name__,
        "chat_template": _chat_template(processing_class),
    }
    return Fingerprint(parts, {"model config": config, "image processor": images, "scoring": rules}, about)


def processor_parts(processing_class: Any) -> dict[str, str]:
    """Hash how text and images become input, part -> hash. Raises ValueError for a setting that is not a plain value."""
    return {
        "tokenizer": _hash_tokenizer(getattr(processing_class, "tokenizer", processing_class)),
        "chat template": hash_settings({"template": _chat_template(processing_class)}),
        "image processor": hash_settings(_image_settings(processing_class)),
    }


def hash_weights(model: nn.Module) -> str:
    """Hash all that the forward of a model, or of modules, reads. Raises ValueError when weights are sharded or not loaded."""
    tensors = dict(sorted(_reference_tensors(model)))
    # Tied weights are hashed once. sha256 and copies from a GPU run outside the interpreter's lock, so threads help.
    places = {name: (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) for name, tensor in tensors.items()}
    distinct = {place: tensors[name] for name, place in places.items()}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        contents = dict(zip(distinct, pool.map(_hash_tensor, distinct.values()), strict=True))
    return hash_settings(
        {name: [str(tensor.dtype), list(tensor.shape), contents[places[name]]] for name, tensor in tensors.items()}
    )


def _hash_tensor(tensor: Tensor) -> str:
    hasher = hashlib.sha256()
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, len(data), _CHUNK_BYTES):
        hasher.update(data[start : start + _CHUNK_BYTES].cpu().numpy().data)
    return hasher.hexdigest()


def _reference_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors of everything that the reference's forward reads, including adapters."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "placements") or (hasattr(parameter, "ds_id") and parameter.numel() == 0):
            raise ValueError(
                f"The weights are sharded ({name}). Compute the fingerprint before the model is prepared for FSDP or ZeRO-3."
            )
        if parameter.device.type == "meta":
            raise ValueError(f"The weight {name} is not loaded (it is on the meta device). Load the model without offloading.")
    # The state dict also holds the scales and code books of quantized layers (bitsandbytes). Buffers outside of it (rotary
    # frequencies) are rebuilt at loading, but a cast to bfloat16 and back changes them permanently.
    tensors = dict(model.named_buffers())
    tensors.update((name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor))
    for name, tensor in tensors.items():
        if name.endswith("inv_freq") and name.removesuffix("inv_freq") + "original_inv_freq" in tensors:
            continue  # dynamic rotary embeddings change it with the length of their input
        yield name.replace("_orig_mod.", ""), tensor


def module_settings(base: nn.Module) -> dict[str, Any]:
    """Return the numbers that modules use in their forward (epsilons, scales), which may differ from the config."""
    settings = {}
    for name, module in base.named_modules():
        numbers = {key: value for key, value in vars(module).items() if isinstance(value, float) and "dropout" not in key}
        if numbers and not isinstance(module, nn.Dropout):
            settings[name.replace("_orig_mod.", "").replace("base_layer.", "")] = dict(sorted(numbers.items()))
    return settings


_OF_MODULES = {*vars(nn.Module()), "training"}


def _adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings of adapters besides their tensors: scales, and which are active, disabled or merged."""

    def as_plain(value: Any) -> Any:
        return _hash_tensor(value) if isinstance(value, Tensor) else type(value).__name__

    settings: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own = {key: value for key, value in vars(module).items() if key not in _OF_MODULES and not key.startswith("_cache")}
            settings[name] = hash_settings(json.loads(json.dumps(own, default=as_plain, skipkeys=True)))
    if isinstance(model, PeftModel):
        learned = {name: config.to_dict() for name, config in model.peft_config.items() if config.is_prompt_learning}
        settings |= {name: plain(config, f"the adapter {name}'s config") for name, config in learned.items()}
    return settings


def _hash_tokenizer(tokenizer: Any) -> str:
    settings: dict[str, Any] = {"special_tokens": plain(dict(tokenizer.special_tokens_map), "the tokenizer's special tokens")}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Settings that the last call left there.
        settings["content"] = {name: value for name, value in content.items() if name not in ("padding", "truncation")}
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(file) for file in tokenizer.save_vocabulary(folder)]
            settings["files"] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        settings["class"], settings["added"] = type(tokenizer).__name__, tokenizer.get_added_vocab()
    return hash_settings(settings)


def _chat_template(processing_class: Any) -> Any:
    own = getattr(processing_class, "chat_template", None)
    return own or getattr(getattr(processing_class, "tokenizer", None), "chat_template", None)


def _image_settings(processing_class: Any) -> dict[str, Any]:
    if not hasattr(processing_class, "tokenizer"):
        return {}
    image_processor = getattr(processing_class, "image_processor", None)
    settings = {"class": type(processing_class).__name__, "processor": processing_class.to_dict()}
    if image_processor is not None:
        settings["image_processor"] = image_processor.to_dict()
        settings["processor"].pop("image_processor", None)
    return dict(plain(settings, "the processor"))


def plain(value: Any, where: str) -> Any:
    """Return plain JSON values, without None and without what has no effect (see `_NOT_IN_FORWARD`)."""
    if isinstance(value, Mapping):
        kept = {str(getattr(name, "value", name)): item for name, item in value.items() if item is not None}
        return {
            name: plain(item, f"{where}, {name}")
            for name, item in sorted(kept.items())
            if name.lstrip("_") not in _NOT_IN_FORWARD and not name.startswith("_") and not any(word in name for word in _DROPOUT)
        }
    if isinstance(value, enum.Enum):
        return plain(value.value, where)
    if isinstance(value, (set, frozenset, list, tuple)):
        items = [plain(item, where) for item in value]
        return sorted(items) if isinstance(value, (set, frozenset)) else items
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        return value.tolist()
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, (torch.dtype, os.PathLike, AddedToken)):
        return str(value)
    raise ValueError(f"{where}: {value!r} ({type(value).__name__}) must be a plain value, since others have no stable hash.")


def hash_settings(settings: Any) -> str:
    """Hash plain JSON values, 32 hex digits."""
    text = json.dumps(settings, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=KEY_BYTES).hexdigest()


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested settings to names with dots; without None."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
