"""Extend TRL's model card with the loss, the data and the version of this library."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any


def _paper(key: str, title: str, authors: str, year: int, id: str) -> dict[str, str]:
    fields = {"title ": f"{{{title}}}", "author": authors, "year  ": year, "eprint": f"arXiv:{id}"}
    lines = [f"    {name} = {value if name == 'year  ' else f'{{{value}}}'},\n" for name, value in fields.items()]
    return {"title": title, "id": id, "citation": f"@article{{{key},\n{''.join(lines)}}}"}


MPO_PAPER = _paper(
    "wang2024mpo",
    "Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization",
    "Weiyun Wang and Zhe Chen and Wenhai Wang and Yue Cao and Yangzhou Liu and Zhangwei Gao and Jinguo Zhu and Xizhou Zhu and "
    "Lewei Lu and Yu Qiao and Jifeng Dai",
    2024,
    "2411.10442",
)
SFT_PAPER = _paper(
    "chen2024internvl25",
    "Expanding Performance Boundaries of Open-Source Multimodal Models with Model, Data, and Test-Time Scaling",
    "Zhe Chen and Weiyun Wang and Yue Cao and Yangzhou Liu and Zhangwei Gao and Erfei Cui and others",
    2024,
    "2412.05271",
)


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
