"""Extend TRL's model card with the loss, the data and the version of this library."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

MPO_PAPER = {
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
SFT_PAPER = {
    "title": "Expanding Performance Boundaries of Open-Source Multimodal Models with Model, Data, and Test-Time Scaling",
    "id": "2412.05271",
    "citation": (
        "@article{chen2024internvl25,\n"
        "    title  = {{Expanding Performance Boundaries of Open-Source Multimodal Models with Model, Data, and Test-Time "
        "Scaling}},\n"
        "    author = {Zhe Chen and Weiyun Wang and Yue Cao and Yangzhou Liu and Zhangwei Gao and Erfei Cui and others},\n"
        "    year   = 2024,\n"
        "    eprint = {arXiv:2412.05271},\n"
        "}"
    ),
}
"""Citations in TRL's part of the card."""

SECTION = "### Framework versions\n\n"


def extend_card(card: str, loss: Mapping[str, float] | str, settings: Mapping[str, Any]) -> str:
    """Add the loss, the data and this library's version to a card that TRL wrote.

    Args:
        card: Markdown, with TRL's section of framework versions.
        loss: the weight of each term of the loss, or a description of it.
        settings: further settings by name, such as beta; those that are None are left out.
    """
    rows = [] if isinstance(loss, str) else [f"| `{name}` | {weight:g} |" for name, weight in loss.items()]
    said = [loss] if isinstance(loss, str) else ["The loss is a weighted sum:", "", "| term | weight |", "|---|---|", *rows]
    told = [f"- {name}: {value}" for name, value in settings.items() if value is not None]
    section = "\n".join([*said, "", *told, "", ""])
    card = card.replace('model="None"', 'model="path/of/this/folder"', 1)  # not on the hub
    card = card.replace("is a fine-tuned version of [None](https://huggingface.co/None)", "is fine-tuned", 1)  # built from a config
    card = card.replace(SECTION, f"{section}{SECTION}- mpo-trainer: {version('mpo-trainer')}\n", 1)
    return card.replace("It has been trained using [TRL]", "It has been trained with `mpo-trainer`, on [TRL]", 1)
