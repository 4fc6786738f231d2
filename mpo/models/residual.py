"""Adapters whose initialization changes the base weights (PiSSA, OLoRA), saved as plain LoRA for the unchanged base.

Their base becomes W - s B0 A0, so the trained model W - s B0 A0 + s B A is a LoRA of twice the rank on W (arXiv 2404.02948,
appendix). A folder with A and B alone would rely on the same decomposition of W wherever it is loaded.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

_RANK_DIMENSION = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}


def to_plain_lora(folder: str | os.PathLike[str], start: Mapping[str, Tensor], adapter: str) -> None:
    """Rewrite a saved adapter as the LoRA that gives the trained model on the unchanged base.

    Args:
        folder: with the adapter, as peft saved it.
        start: the adapter's tensors before training, by their names in the model.
        adapter: its name in the model.
    """
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    begun = {name.replace(f".{adapter}", ""): value for name, value in start.items()}
    tensors = load_file(file)
    for name, value in tensors.items():
        kind = _kind(name)
        if kind is not None:
            other = begun[name].to(value)
            tensors[name] = torch.cat([value, -other if kind.endswith("B") else other], _RANK_DIMENSION[kind]).contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    path = Path(folder, CONFIG_NAME)
    config = json.loads(path.read_text())
    factor = 2**0.5 if config["use_rslora"] else 2  # keeps alpha / r, or alpha / sqrt(r)
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}
    config["rank_pattern"] = {name: 2 * rank for name, rank in (config["rank_pattern"] or {}).items()}
    config["alpha_pattern"] = {name: factor * alpha for name, alpha in (config["alpha_pattern"] or {}).items()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def load_plain_lora(model: PeftModel, folder: str | os.PathLike[str], adapter: str) -> None:
    """Put a checkpoint that `to_plain_lora` wrote back into the model that is in training.

    Args:
        model: with the adapter on its changed base.
        folder: of the checkpoint.
        adapter: the adapter's name in the model.
    """
    tensors = load_file(Path(folder, SAFETENSORS_WEIGHTS_NAME))
    for name, value in tensors.items():
        kind = _kind(name)
        if kind is not None:
            dimension = _RANK_DIMENSION[kind]
            tensors[name] = value.narrow(dimension, 0, value.shape[dimension] // 2)
    set_peft_model_state_dict(model, tensors, adapter_name=adapter)


def _kind(name: str) -> str | None:
    return next((part for part in name.split(".") if part in _RANK_DIMENSION), None)
