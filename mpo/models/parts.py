"""The parts of a vision-language model, and whether each is trained, adapted with LoRA, or frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from mpo.models.family import INTERNVL, PARTS, Family, family_of


def base_model(model: nn.Module) -> Any:
    """The transformers model, without adapters or other wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def check_parts(choices: Mapping[str, Any], *, adapters: bool) -> None:
    """Check the choices of ``train_parts``.

    Args:
        choices: part -> ``"train"``, ``"freeze"``, ``"lora"``, or for the vision tower the number of last layers to train.
        adapters: whether the run has adapters.

    Raises:
        ValueError: naming the part and its allowed choices.
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
            raise ValueError(
                "train_parts.head=lora has no effect: the loss reads the head's weight directly, not its adapter. Freeze the head, "
                "or set peft=none."
            )
        if choice == "lora" and not adapters:
            raise ValueError(f"train_parts.{part}=lora needs adapters. Add peft=lora or peft=qlora.")
        if choice == "train" and adapters and part != "projector":
            raise ValueError(
                f"train_parts.{part}=train would keep a second copy of that part besides the adapters, which only the projector "
                f"is small enough for. Use lora or freeze."
            )
    if choices and set(PARTS) <= choices.keys() and all(choices[part] == "freeze" for part in PARTS):
        raise ValueError("train_parts freezes every part, so nothing would be trained. Set one to train or lora.")


def check_adapter(choices: Mapping[str, Any], adapter: Any, family: Family = INTERNVL) -> None:
    """Check that an adapter's settings do not train a frozen part.

    Args:
        choices: as in `check_parts`, with adapters; parts that are not named are frozen.
        adapter: the peft config.
        family: of the model.

    Raises:
        ValueError: naming the setting and the parts.
    """
    frozen = [part for part in PARTS[:3] if choices.get(part, "freeze") == "freeze"]
    if choices and frozen and getattr(adapter, "bias", "none") == "all":
        raise ValueError(
            f"peft.bias=all trains the biases of the whole model, but train_parts freezes {', '.join(frozen)}. Use "
            "peft.bias=lora_only to train those of adapted layers, or leave train_parts out."
        )
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

    Raises:
        ValueError: for a part that the model does not have, or more layers than in its tower.
    """
    family = family_of(base_model(model).config, "train_parts")
    names = {family.part_of(name) for name, _ in model.named_parameters()}
    for part in choices:
        if part not in names:
            why = " (its head is tied to the input embeddings, part of language)" if part == "head" else ""
            raise ValueError(f"train_parts.{part}: {type(model).__name__} has no such part{why}. Leave it out.")
    depth = 1 + max(
        (number for name, _ in model.named_parameters() if (number := family.vision_depth(name)) is not None), default=-1
    )
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
