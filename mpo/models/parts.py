"""The parts of a vision-language model: whether each is trained, adapted with LoRA, or frozen, and its learning rate."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mpo.models.family import DEFAULT, PARTS, Family, family_of, known_family


def base_model(model: nn.Module) -> Any:
    """The transformers model, without adapters or other wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def check_parts(choices: Mapping[str, Any], *, adapters: bool) -> None:
    """Refuse choices of ``train_parts`` that no model can have, with or without adapters.

    `choices`: part -> ``"train"``, ``"freeze"``, ``"lora"``, or for the vision tower the number of last layers to train.
    """
    for part, choice in choices.items():
        if part not in PARTS:
            raise ValueError(f"Expected parts among {', '.join(PARTS)} in train_parts; got {part!r}.")
        layers = isinstance(choice, int) and not isinstance(choice, bool)
        if layers and part == "vision" and choice >= 1 and not adapters:
            continue
        if choice not in ("train", "freeze", "lora") or layers:
            raise ValueError(
                f"Expected train_parts.{part} to be train, freeze or lora (for vision without adapters also the number of last "
                f"layers to train); got train_parts.{part}={choice!r}."
            )
        if choice == "lora" and part == "head":
            raise ValueError("train_parts.head=lora has no effect: the loss reads the head's weight, not its adapter. Freeze it.")
        if choice == "lora" and part == "fuser":
            raise ValueError("train_parts.fuser=lora would leave a new fuser without effect: its gamma1 is 0. Use train or freeze.")
        if choice == "lora" and not adapters:
            raise ValueError(f"train_parts.{part}=lora needs adapters. Add peft=lora or peft=qlora.")
        if choice == "train" and adapters and part not in ("projector", "fuser"):
            raise ValueError(f"train_parts.{part}=train with adapters keeps a second copy of a large part. Use lora or freeze.")
    default = {"fuser": "freeze"}  # few models have one
    if choices and all(choices.get(part, default.get(part, "train")) == "freeze" for part in PARTS):
        raise ValueError("train_parts freezes every part, so nothing would be trained. Set one to train or lora.")


def check_adapter(choices: Mapping[str, Any], adapter: Any, family: Family = DEFAULT) -> None:
    """Refuse an adapter's settings that train a frozen part; with adapters, parts that `choices` does not name are frozen."""
    frozen = [part for part in PARTS[:-1] if (part != "fuser" or family.fuser) and choices.get(part, "freeze") == "freeze"]
    if choices and frozen and getattr(adapter, "bias", "none") == "all":
        raise ValueError(f"peft.bias=all trains all biases, but train_parts freezes {', '.join(frozen)}. Use peft.bias=lora_only.")
    tokens = getattr(adapter, "trainable_token_indices", None) or {}
    named = [*(getattr(adapter, "modules_to_save", None) or []), *(tokens if isinstance(tokens, Mapping) else ["embed_tokens"])]
    for name in named:
        part = family.part_of(name)
        if choices.get(part) == "freeze":
            raise ValueError(
                f"train_parts.{part}=freeze, but peft trains its {name} (modules_to_save or trainable_token_indices). "
                "Leave one of the two out."
            )


def freeze_parts(model: nn.Module, choices: Mapping[str, Any]) -> None:
    """Freeze parts of a model, and the first layers of its vision tower, by the choices of `check_parts`; the rest is trained.

    Raises ValueError for a part that the model does not have, or more layers than in its tower.
    """
    family = family_of(base_model(model).config, "train_parts")
    names = {family.part_of(name) for name, _ in model.named_parameters()}
    for part in choices:
        if part == "head" and choices["head"] == choices.get("language", "train"):
            continue  # a tied head follows the input embeddings
        if part == "fuser" and family.fuser and choices["fuser"] == choices.get("projector", "train"):
            continue  # concatenated layers are fused by the projector
        if part not in names:
            why = " (its head is tied to the input embeddings, part of language)" if part == "head" else ""
            raise ValueError(f"train_parts.{part}: {type(model).__name__} has no such part{why}. Leave it out.")
    depth = family.depth(model)
    last = choices.get("vision")
    if isinstance(last, int) and last > depth:
        raise ValueError(f"train_parts.vision={last} is more than the {depth} layers of the vision tower.")
    for name, parameter in model.named_parameters():
        choice = choices.get(family.part_of(name), "train")
        if isinstance(choice, int):
            number = family.vision_depth(name)
            choice = "train" if number is not None and number >= depth - choice else "freeze"
        if choice == "freeze":
            parameter.requires_grad_(False)


def learns_from_images_alone(model: nn.Module, rates: Mapping[str, float]) -> bool:
    """Whether only parts are trained that get no gradient from text: the vision tower and the projector.

    `rates` has parts' own learning rates; a part with 0 is not trained.
    """
    family = known_family(base_model(model).config)
    trained = {family.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    trained -= {part for part, rate in rates.items() if rate == 0}
    return bool(trained) and trained <= {"vision", "fuser", "projector"}


def split_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, *, rate: float, rates: Mapping[str, float], vision_layer_decay: float
) -> None:
    """Split the parameter groups of a new optimizer, without state, by learning rate; other settings of a group are kept.

    `rates`: part -> learning rate; `rate` is that of the others. With `vision_layer_decay` d, layer i of L in the vision tower has
    d^(L - i) of the tower's rate, its embeddings d^(L + 1): layer-wise decay as in BEiT (arXiv 2106.08254), with the projector in
    place of its head. Raises ValueError for a rate of a part that is not trained, and for a model of an unknown family.
    """
    setting = f"{next(iter(rates))}_learning_rate" if rates else "vision_layer_decay"
    family = family_of(base_model(model).config, setting)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = family.depth(model)
    trained = {family.part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in rates:
        if part not in trained:
            has = part in map(family.part_of, names.values())
            why = "that part is frozen" if has else f"a {type(base_model(model)).__name__} has no such part"
            raise ValueError(f"{part}_learning_rate={rates[part]} has no effect: {why}. Leave it out.")
    if vision_layer_decay != 1 and "vision" not in trained:
        raise ValueError(f"vision_layer_decay={vision_layer_decay} has no effect: the vision tower is frozen. Leave it out.")

    def rate_of(name: str) -> float:
        part, depth = family.part_of(name), family.vision_depth(name)
        below = 0 if part != "vision" else layers + 1 if depth is None else layers - depth
        return rates.get(part, rate) * float(vision_layer_decay**below)

    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_rate.setdefault(rate_of(names[id(parameter)]), []).append(parameter)
        groups += [{**group, "lr": own, "params": parameters} for own, parameters in by_rate.items()]
    optimizer.param_groups[:] = groups
