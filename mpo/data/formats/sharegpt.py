"""Read LLaMA-Factory's ranking data in ShareGPT form: ``conversations`` of ``{from, value}``, ``chosen`` and ``rejected`` likewise.

``messages`` of ``{role, content}``, LLaMA-Factory's OpenAI format, are read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import FoundPair, images, one_of, refuse, rest
from mpo.io import BadRecord, json_kind

NAME = "sharegpt"
NEEDS = "conversations (or messages), chosen, rejected; optional: images or videos"
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_USED = ("conversations", "messages", "chosen", "rejected", "system", "image", "images", "video", "videos", "id")
_CANNOT = "records have no field for it. Remove it or leave the record out"


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line is in this format; next to a prompt, ``messages`` only repeat TRL's prompt and completion."""
    if "conversations" in line:
        return True
    has_prompt = line.get("prompt") not in (None, "", [])
    return "messages" in line and ("chosen" in line or "rejected" in line) and not has_prompt


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """Read the pair of a line."""
    refuse(line, {"tools": _CANNOT, "audios": _CANNOT})
    turns = one_of(line, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise BadRecord("", f"'conversations' must be a list of turns; got {'an empty one' if turns == [] else json_kind(turns)}.")
    prompt = [_message(turn, f"turn {place + 1}") for place, turn in enumerate(turns)]
    if prompt[-1]["role"] not in ("user", "tool"):
        raise BadRecord(
            "", f"the last turn is the {prompt[-1]['role']}'s, but 'chosen' and 'rejected' reply to a human. Remove that turn."
        )
    yield FoundPair(
        prompt=prompt,
        chosen=_completion(line, "chosen"),
        rejected=_completion(line, "rejected"),
        images=images(line),
        videos=one_of(line, "video", "videos"),
        system=line.get("system"),
        id=line.get("id"),
        metadata=rest(line, _USED),
    )


def _completion(line: Mapping[str, Any], side: str) -> Any:
    given = line.get(side)
    return [_message(given, f"{side!r}")] if isinstance(given, Mapping) else given


def _message(turn: Any, what: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise BadRecord("", f"{what} is {json_kind(turn)} instead of an object with 'from' and 'value'.")
    role = one_of(turn, "from", "role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord("", f"{what} is from {role!r}; 'from' must be one of {', '.join(ROLES)}.")
    return {"role": ROLES[role], "content": one_of(turn, "value", "content")}
