"""Read ms-swift's RLHF data: ``messages``, the last one the chosen completion, and ``rejected_response`` or ``rejected_messages``.

``rejected_images`` must equal ``images``: a pair has one prompt and one set of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import FoundPair, images, one_of, refuse, rest
from mpo.io import BadRecord, json_kind

NAME = "swift"
NEEDS = "messages (the last one the chosen completion) and rejected_response or rejected_messages; optional: images or videos"
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
    """Whether a line is in this format."""
    return "messages" in line and any(name in line for name in (*_REJECTED, "rejected_images"))


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """Read the pair of a line."""
    refuse(line, dict.fromkeys(_CANNOT, "records have no field for it. Remove it or leave the record out"))
    for kind in ("images", "videos"):
        other = line.get(f"rejected_{kind}")
        if other is not None and other != line.get(kind):
            raise BadRecord(
                "", f"'rejected_{kind}' differ from {kind!r}, but a pair has one set of {kind}. Remove 'rejected_{kind}'."
            )
    prompt, chosen = _split(line.get("messages"), "messages")
    rejected = one_of(line, *_REJECTED)
    if line.get("rejected_messages") is not None:
        other_prompt, rejected = _split(rejected, "rejected_messages")
        if other_prompt != prompt:
            raise BadRecord(
                "",
                "'rejected_messages' differ from 'messages' before the last message, but a pair has one prompt. Use the same "
                "prompt.",
            )
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
    """Split a conversation into the prompt and its last message, the completion."""
    if not isinstance(messages, list) or len(messages) < 2:
        found = f"a list of {len(messages)}" if isinstance(messages, list) else json_kind(messages)
        raise BadRecord("", f"{name!r} must be a list of at least two messages, the last one the completion; got {found}.")
    last = messages[-1]
    if not isinstance(last, Mapping) or last.get("role") != "assistant":
        raise BadRecord("", f"the last of {name!r} must be a message of the assistant, the completion; got {last!r:.100}.")
    return messages[:-1], [last]
