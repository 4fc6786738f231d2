"""Build the model of a job without its weights, and load its processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from mpo.models.family import takes_images
from mpo.models.fit import check_targets
from mpo.models.loading import as_dtype, load_processor, model_config

if TYPE_CHECKING:
    from mpo.training.job import TrainJob


@dataclass(frozen=True)
class Structure:
    """``model``: the policy as it will be trained, with its adapters, on the meta device unless ``real``; ``name``: its name."""

    model: Any
    processor: Any
    name: str
    real: bool


def build_structure(job: TrainJob) -> Structure:
    """Build a job's model from its config, and load its processor.

    A model without a checkpoint (`mpo.models.smollm2`) is small and is built with its weights.

    Args:
        job: a checked job.
    """
    settings = {key: value for key, value in job.model.items() if key != "_target_"}
    name = settings.get("name_or_path")
    if name is None:
        loaded = job.loader()(**settings)
        return Structure(adapted(loaded.model, job), loaded.processor, job.model["_target_"], True)
    code = bool(settings.get("trust_remote_code"))
    config = model_config(name, code)
    model = meta_model(config, settings.get("dtype", "auto"), trust_remote_code=code)
    tiles = {key: settings.get(key) for key in ("min_tiles", "max_tiles", "thumbnail")}
    processor = load_processor(name, **tiles, trust_remote_code=code)
    return Structure(adapted(model, job), processor, str(name), False)


def meta_model(config: Any, dtype: str | torch.dtype = "auto", *, trust_remote_code: bool = False) -> Any:
    """Build a model on the meta device, where tensors have a shape and a dtype but no memory.

    Args:
        config: transformers' config of the checkpoint.
        dtype: as for `load_internvl`; ``"auto"``: the config's dtype.
        trust_remote_code: run code that comes with the checkpoint.
    """
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
