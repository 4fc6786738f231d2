"""Hydra recipes for `mpo train` and `mpo sft`, read as ``pkg://mpo.recipes``: YAML, and what all of its files may use.

``experiment=MODEL``, ``MODEL_lora`` and ``MODEL_qlora`` choose a published model, which brings its method, with ``peft`` and
``launch``. In a file, ``${without_adapters:a,b}`` is `a` when all weights are trained (``peft=none``), and `b` with adapters;
``${drop_path:a}`` is `a` or 0 likewise, and 0 in a stage of `mpo sft` that freezes the vision tower.
"""

import re
from importlib.resources import files
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

if __name__ != "mpo.recipes":
    raise ImportError("the recipes folder installs as mpo.recipes; import it under that name")

SHARDED_FROM = {"none": 4, "lora": 38}
"""peft -> billions of parameters from which an experiment shards the model over all GPUs. QLoRA is not run sharded."""


def _experiments() -> dict[str, dict[str, str]]:
    found = {}
    for file in files(__name__).joinpath("model").iterdir():
        model = file.name.removesuffix(".yaml")
        size = re.search(r"_(\d+)b(_a\d+b)?$", model)
        for peft in ("none", "lora", "qlora") if size else ():
            assert size is not None
            if peft == "qlora" and size[2]:  # bitsandbytes quantizes linear layers; experts are one tensor, which it would leave
                continue
            launch = "fsdp2" if int(size[1]) >= SHARDED_FROM.get(peft, float("inf")) else "ddp"
            found[model if peft == "none" else f"{model}_{peft}"] = {"model": model, "peft": peft, "launch": launch}
    return found


EXPERIMENTS = _experiments()
"""Name of an experiment of a published model -> group -> option."""


def _without_adapters(full: Any, adapters: Any, *, _root_: Any) -> Any:
    return full if _root_.peft.kind == "none" else adapters


def _drop_path(rate: Any, *, _root_: Any) -> Any:
    frozen = _root_.task == "sft" and _root_.train_parts.vision == "freeze"  # scripts of MPO keep it in a frozen tower
    return 0.0 if frozen else _without_adapters(rate, 0.0, _root_=_root_)


OmegaConf.register_new_resolver("drop_path", _drop_path, replace=True)
OmegaConf.register_new_resolver("without_adapters", _without_adapters, replace=True)
for _name, _choices in EXPERIMENTS.items():
    _overrides = [{f"override /{group}": option} for group, option in _choices.items()]
    ConfigStore.instance().store(_name, {"defaults": _overrides}, group="experiment", package="_global_", provider="mpo.recipes")
