"""Extend TRL's model card with the loss, the data and the version of this library."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from mpo.losses import Mixture

PAPER = {
    "title": "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization",
    "id": "2411.10442",
    "citation": (
        "@article{wang2024mpo,\n"
        "    title  = {{Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference "
        "Optimization}},\n"
        "    author = {Weiyun Wang and Zhe Chen and Wenhai Wang and Yue Cao and Yangzhou Liu and Zhangwei Gao and Jinguo Zhu "
        "and Xizhou Zhu and Lewei Lu and Yu Qiao and Jifeng Dai},\n"
        "    year   = 2024,\n"
        "    eprint = {arXiv:2411.10442},\n"
        "}"
    ),
}
"""Citation in TRL's part of the card."""

SECTION = "### Framework versions\n\n"


def extend_card(card: str, mixture: Mixture, settings: Mapping[str, Any], pairs: int | None) -> str:
    """Add the loss, the data and this library's version to a card that TRL wrote.

    Args:
        card: Markdown, with TRL's section of framework versions.
        mixture: the loss of the training.
        settings: further settings by name, such as beta.
        pairs: number of training pairs; None when it is not known (streams).
    """
    rows = [f"| `{name}` | {weight:g} |" for weight, name in zip(mixture.weights, mixture.names, strict=True)]
    told = [f"- {name}: {value}" for name, value in {**settings, "preference pairs": pairs}.items() if value is not None]
    loss = "\n".join(["The loss is a weighted sum:", "", "| term | weight |", "|---|---|", *rows, "", *told, "", ""])
    card = card.replace('model="None"', 'model="path/of/this/folder"', 1)  # not on the hub
    card = card.replace("is a fine-tuned version of [None](https://huggingface.co/None)", "is fine-tuned", 1)  # built from a config
    card = card.replace(SECTION, f"{loss}{SECTION}- mpo-trainer: {version('mpo-trainer')}\n", 1)
    return card.replace("It has been trained using [TRL]", "It has been trained with `mpo-trainer`, on [TRL]", 1)
