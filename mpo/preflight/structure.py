"""Build the model of a job without its weights, load its processor, and count the parameters of its parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from mpo.models.family import DEFAULT, family_of, takes_images
from mpo.models.fit import check_targets
from mpo.models.loading import as_dtype, load_processor

if TYPE_CHECKING:
    from mpo.training.job import TrainJob

TITLES = {"vision": "vision tower", "fuser": "fuser", "projector": "projector", "language": "language model", "head": "LM head"}
REST = "model"


class Structure(NamedTuple):
    """``model``: the policy as it will be trained, with its adapters, on the meta device unless ``real``; ``name``: its name."""

    model: Any
    processor: Any
    name: str
    real: bool


def build_structure(job: TrainJob) -> Structure:
    """Build a job's model from its config, and load its processor.

    A model without a checkpoint (`mpo.models.smollm2`) is small and is built with its weights.
    """
    settings = job.settings()
    name = settings.get("name_or_path")
    if name is None:
        loaded = job.loader()(**settings)
        return Structure(adapted(loaded.model, job), loaded.processor, job.model["_target_"], True)
    code = bool(settings.get("trust_remote_code"))
    model = meta_model(job.config(), settings.get("dtype", "auto"), trust_remote_code=code)
    own = {key: settings.get(key) for key in ("min_tiles", "max_tiles", "thumbnail", "chat_template")}
    return Structure(adapted(model, job), load_processor(name, **own, trust_remote_code=code), str(name), False)


def meta_model(config: Any, dtype: str | torch.dtype = "auto", *, trust_remote_code: bool = False) -> Any:
    """Build a model on the meta device, where tensors have a shape and a dtype but no memory."""
    asked = as_dtype(dtype)
    chosen = (config.dtype or torch.float32) if asked == "auto" else asked
    loader = AutoModelForImageTextToText if takes_images(config) else AutoModelForCausalLM
    with torch.device("meta"):
        return loader.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)


def adapted(model: Any, job: TrainJob) -> Any:
    """Freeze parts of the model and add adapters as the job does, with the dtypes of training."""
    adapter = job.adapter(job.family(model.config))
    job.freeze(model)
    if adapter is None:
        return model
    from peft import get_peft_model

    check_targets(model, adapter)
    with torch.device(model.device):
        return get_peft_model(model, adapter)


def titles(model: nn.Module) -> Callable[[str], str]:
    """Return a function from the name of a parameter or module of `model` to the title of its part; adapters are a separate part.

    In a vision-language model of an unknown family, all but adapters and LM head is one part.
    """
    base = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    try:
        family = DEFAULT if base is None else family_of(base.config, "dry_run=true")
    except ValueError:
        return lambda name: "adapters" if "lora_" in name else TITLES["head"] if "lm_head" in name.split(".") else REST
    return lambda name: "adapters" if "lora_" in name else TITLES[family.part_of(name)]


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count parameters by part: all, and trained ones. Weights shared by head and embeddings count for the language model."""
    counts = dict.fromkeys((*TITLES.values(), REST, "adapters"), (0, 0))
    part_of = titles(model)
    for name, parameter in model.named_parameters():
        total, trained = counts[part_of(name)]
        counts[part_of(name)] = total + parameter.numel(), trained + parameter.numel() * parameter.requires_grad
    return counts
