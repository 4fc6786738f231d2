"""RLHF-V-Dataset: ``text`` is JSON with ``question``, ``chosen``, ``rejected``; ``image`` holds bytes, or ``image_path`` a path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import BadRecord, FoundPair, json_kind, parse_json, rest

NAME = "rlhf_v"
NEEDS = "text (JSON with question, chosen, rejected), image (bytes or path) or image_path"
_USED = ("image", "text", "idx", "origin_split_inner_idx")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line looks like it."""
    return "text" in line and ("image" in line or "image_path" in line)


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """The pair of a line."""
    text = line.get("text")
    pair = parse_json(text, "'text'") if isinstance(text, str) else text
    if not isinstance(pair, Mapping):
        raise BadRecord("", f"'text' holds {json_kind(pair)} instead of an object with question, chosen and rejected.")
    index = line.get("idx")
    yield FoundPair(
        prompt=pair.get("question"),
        chosen=pair.get("chosen"),
        rejected=pair.get("rejected"),
        images=line.get("image") or line.get("image_path"),
        id=line.get("origin_split_inner_idx") if index is None else index,
        metadata=rest(line, _USED),
    )
