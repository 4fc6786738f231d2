"""ms-swift's RLHF data: ``messages``, whose last one is the chosen answer, and ``rejected_response`` or ``rejected_messages``.

``rejected_images`` may be there if they are the same: a pair has one prompt, and one set of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import BadRecord, FoundPair, images, json_kind, one_of, refuse, rest

NAME = "swift"
NEEDS = (
    "messages (the last one the chosen answer) and rejected_response or rejected_messages; images or videos, where there are some"
)
_REJECTED = ("rejected_response", "rejected_messages")
_USED = (
    *_REJECTED,
    "messages",
    "system",
    "image",
    "images",
    "video",
    "videos",
    "rejected_images",
    "rejected_videos",
    "id",
    "margin",
)
_CANNOT = ("tools", "objects", "audios", "rejected_tools", "rejected_audios")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line looks like it."""
    return "messages" in line and any(name in line for name in (*_REJECTED, "rejected_images"))


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """The pair of a line."""
    refuse(line, dict.fromkeys(_CANNOT, "records have no place for it"))
    for kind in ("images", "videos"):
        other = line.get(f"rejected_{kind}")
        if other is not None and other != line.get(kind):
            raise BadRecord("", f"'rejected_{kind}' are not the 'images': both answers of a pair are about the same {kind}.")
    prompt, chosen = _split(line.get("messages"), "messages")
    rejected = one_of(line, *_REJECTED)
    if line.get("rejected_messages") is not None:
        other_prompt, rejected = _split(rejected, "rejected_messages")
        if other_prompt != prompt:
            raise BadRecord("", "'rejected_messages' differ from 'messages' before the answer, and a pair has one prompt.")
    yield FoundPair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        images=images(line),
        videos=one_of(line, "video", "videos"),
        system=line.get("system"),
        id=line.get("id"),
        margin=line.get("margin"),
        metadata=rest(line, _USED),
    )


def _split(messages: Any, name: str) -> tuple[list[Any], list[Any]]:
    """A conversation -> the prompt, and its last message, the answer."""
    if not isinstance(messages, list) or len(messages) < 2:
        found = f"a list of {len(messages)}" if isinstance(messages, list) else json_kind(messages)
        raise BadRecord("", f"{name!r} is a list of at least two messages, the last one the answer; got {found}.")
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise BadRecord("", f"the last of {name!r} is the answer, and so a message of the assistant.")
    return messages[:-1], [last]
