"""Read RLHF-V-Dataset: ``text`` is JSON with ``question``, ``chosen``, ``rejected``; ``image`` or ``image_path`` is the image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import FoundPair, rest
from mpo.io import BadRecord, json_kind, parse_json

NAME = "rlhf_v"
NEEDS = "text (JSON with question, chosen, rejected), image (bytes or path) or image_path"
_OTHER_FIELDS = ("question", "prompt", "chosen", "rejected")
_USED = ("image", "text", "system", "idx", "origin_split_inner_idx")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line is in this format: its ``text`` holds a pair, or no other field can be part of one."""
    if "text" not in line or not ("image" in line or "image_path" in line):
        return False
    return not any(name in line for name in _OTHER_FIELDS) or _holds_pair(line["text"])


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """Read the pair of a line."""
    text = line.get("text")
    pair = parse_json(text, "'text', which holds the pair in rlhf_v's lines") if isinstance(text, str) else text
    if not isinstance(pair, Mapping):
        raise BadRecord("", f"'text' holds {json_kind(pair)} instead of rlhf_v's object with question, chosen, rejected.")
    index = line.get("idx")
    yield FoundPair(
        prompt=pair.get("question"),
        chosen=pair.get("chosen"),
        rejected=pair.get("rejected"),
        images=line.get("image") or line.get("image_path"),
        system=line.get("system"),
        id=line.get("origin_split_inner_idx") if index is None else index,
        metadata=rest(line, _USED),
    )


def _holds_pair(text: Any) -> bool:
    try:
        pair = parse_json(text, "'text'") if isinstance(text, str) else text
    except BadRecord:
        return False
    return isinstance(pair, Mapping) and all(name in pair for name in ("question", "chosen", "rejected"))
