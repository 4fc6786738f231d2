"""Hydra recipes for `mpo train` and `mpo sft`, read as ``pkg://mpo.recipes``: YAML, and what all of its files may use.

``experiment=MODEL``, ``MODEL_lora`` and ``MODEL_qlora`` choose a published model, which brings its method, with ``peft`` and
``launch``. In a file, ``${without_adapters:a,b}`` is `a` when all weights are trained (``peft=none``), and `b` with adapters;
``${drop_path:a}`` is `a` or 0 likewise, and 0 in a stage of `mpo sft` that freezes the vision tower.
"""

from importlib.resources import files
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

if __name__ != "mpo.recipes":
    raise ImportError("the recipes folder installs as mpo.recipes; import it under that name")

FAMILIES: dict[str, dict[float | None, str]] = {
    "internvl2": {0.1: "8b"},
    "internvl2_5": {0.1: "1b 2b 4b 8b", 0.4: "26b 38b 78b"},
    "internvl3": {0.1: "1b 2b 8b 9b 14b", 0.4: "38b 78b"},
    "internvl3_5": {None: "1b 2b 4b", 0.1: "8b 14b 30b_a3b", 0.4: "38b 241b_a28b"},
}
"""Family of published models, which is its method -> drop path rate (0.1: of the tower of 300M parameters, 0.4: of 6B) -> sizes."""
SHARDED_FROM = {"none": 4, "lora": 38}
"""peft -> billions of parameters from which an experiment shards the model over all GPUs. QLoRA is not run sharded."""
IN_THEIR_GROUP = ("loss", "peft")
"""Groups whose options set the keys of their group alone; those of the others set any."""


def _model(family: str, size: str, drop_path: float | None) -> dict[str, Any]:
    """A published model."""
    name = f"{family.replace('internvl', 'InternVL')}-{size.upper().replace('_', '-')}"
    model: dict[str, Any] = {
        "defaults": ["internvl@model", {"override /method": family}],
        "model": {
            "name_or_path": f"OpenGVLab/{name}{'-Instruct' if family >= 'internvl3' else ''}",
            "dtype": "${without_adapters:float32,bfloat16}",
            "max_tiles": 12,
        },
    }
    if drop_path is not None:
        model["drop_path"] = f"${{drop_path:{drop_path}}}"
    if "_a" in size:  # output_router_logits is false in the published config, so there is no router loss
        model["trainer"] = {"router_aux_loss_coef": 0.0}
    return model


def _experiments(model: str, size: str) -> dict[str, dict[str, str]]:
    """The experiments of a published model."""
    found = {}
    for peft in ("none", "lora", "qlora"):
        if peft == "qlora" and "_a" in size:  # bitsandbytes quantizes linear layers; experts are one tensor, which it would leave
            continue
        launch = "fsdp2" if int(size.split("b")[0]) >= SHARDED_FROM.get(peft, float("inf")) else "ddp"
        found[model if peft == "none" else f"{model}_{peft}"] = {"model": model, "peft": peft, "launch": launch}
    return found


def _without_adapters(full: Any, adapters: Any, *, _root_: Any) -> Any:
    return full if _root_.peft.kind == "none" else adapters


def _drop_path(rate: Any, *, _root_: Any) -> Any:
    frozen = _root_.task == "sft" and _root_.train_parts.vision == "freeze"  # scripts of MPO keep it in a frozen tower
    return 0.0 if frozen else _without_adapters(rate, 0.0, _root_=_root_)


OmegaConf.register_new_resolver("drop_path", _drop_path, replace=True)
OmegaConf.register_new_resolver("without_adapters", _without_adapters, replace=True)

OPTIONS: Any = OmegaConf.to_container(OmegaConf.create(files(__name__).joinpath("options.yaml").read_text("utf-8")))
"""Group -> option that has no file of its own -> what it sets."""
EXPERIMENTS: dict[str, dict[str, str]] = {}
"""Name of an experiment of a published model -> group -> option."""
for _family, _towers in FAMILIES.items():
    for _rate, _size in ((rate, size) for rate, sizes in _towers.items() for size in sizes.split()):
        OPTIONS["model"][f"{_family}_{_size}"] = _model(_family, _size, _rate)
        EXPERIMENTS |= _experiments(f"{_family}_{_size}", _size)
for _name, _choices in EXPERIMENTS.items():
    OPTIONS["experiment"][_name] = {"defaults": [{f"override /{group}": option} for group, option in _choices.items()]}
for _group, _options in OPTIONS.items():
    for _name, _option in _options.items():
        _package = _group if _group in IN_THEIR_GROUP else "_global_"
        ConfigStore.instance().store(_name, _option, group=_group, package=_package, provider="mpo.recipes")
