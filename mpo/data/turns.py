"""The turns of a conversation: their order, their contents and their flags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpo.schema import IMAGE_COLUMNS

_FOLLOWS = {
    "system": ("beginning",),
    "user": ("beginning", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("tool call", "tool"),
}
"""What a message of a role may follow."""
_PARTS = {"text": {"type", "text"}, "image": {"type"}, "video": {"type"}}
"""The types of parts, and the keys of each that may have a value."""
_OTHERS_FLAGS = ("weight", "loss")
"""Names that other formats have for ``train``."""


def check_messages(messages: Any, name: str, record: Mapping[str, Any], where: str) -> None:
    """Refuse what is no list of messages whose contents are text, or parts that are text and placeholders."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: '{name}' is of type {type(messages).__name__} instead of a list of messages.")
    has_images = any(record.get(column) for column in IMAGE_COLUMNS)
    for place, message in enumerate(messages, start=1):
        this = f"{where}: message {place} of '{name}'"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in _FOLLOWS:
            raise ValueError(f"{this} has the role {role!r} instead of one of {', '.join(_FOLLOWS)}.")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else [] if content is None else content
        if not isinstance(parts, list):
            raise ValueError(f"{this} has a content of type {type(content).__name__} instead of text or a list of parts.")
        for part in parts:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind not in _PARTS:
                raise ValueError(f"{this} has a part of type {kind!r} instead of one of {', '.join(_PARTS)}.")
            if others := sorted(key for key, value in part.items() if value not in (None, "") and key not in _PARTS[kind]):
                raise ValueError(f"{this} has {others[0]!r} in a part of type {kind!r}. Images belong in the record's 'images'.")
            text = part.get("text")
            if kind == "text" and not (text is None or isinstance(text, str)):
                raise ValueError(f"{this} has a text of type {type(text).__name__}.")
            if text and (role == "user" or (has_images and "<image>" in text)):
                check_unplaced(text, "its text", this)
        if role != "assistant" and message.get("tool_calls"):
            raise ValueError(f"{this}, of role {role!r}, has tool_calls, which only the assistant makes. Remove them.")
        for flag in _OTHERS_FLAGS:
            if message.get(flag) is not None:
                raise ValueError(f'{this} has {flag!r}, which would be ignored. Set "train": false where a turn is not labelled.')
        if image_parts(message, ("video",)) and not record.get("videos"):
            raise ValueError(f"{this} has a part of type 'video', and the record has 0 videos. Give their paths in 'videos'.")
        if role != "user" and image_parts(message, ("image", "video")):
            raise ValueError(f"{this}, of role {role!r}, has an image. Images belong to the user's messages.")


def check_unplaced(text: str, name: str, where: str) -> None:
    """Refuse a placeholder that is text, for which the model would see no image."""
    if found := next((one for one in ("<image>", "<video>") if one in text), None):
        part = f'{{"type": "{found[1:-1]}"}}'
        raise ValueError(f"{where}: {name} has {found!r}, and places are parts of messages here: {part}. Replace it.")


def check_turns(messages: list[Any], where: str) -> None:
    """Refuse a conversation without turns of the assistant, with turns out of order, and with an empty one."""
    before = "beginning"
    for place, message in enumerate(messages, start=1):
        role = message["role"]
        if before not in _FOLLOWS[role]:
            raise ValueError(f"{where}: its turns are out of order: message {place}, of role {role!r}, follows the {before}.")
        if role in ("user", "assistant") and is_empty(message) and not image_parts(message, ("image", "video")):
            raise ValueError(f"{where}: message {place}, of role {role!r}, is empty. Give it text or leave the record out.")
        before = "tool call" if message.get("tool_calls") else role
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where} has no message of the assistant, so there is nothing to learn. Leave the record out.")
    if (last := messages[-1]["role"]) != "assistant":
        raise ValueError(f"{where} ends with a message of role {last!r} instead of the assistant's. Remove what follows that.")


def image_parts(message: Any, kinds: Sequence[str] = ("image",)) -> int:
    """The number of image parts of a message, or of parts of other `kinds`."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return sum(isinstance(part, Mapping) and part.get("type") in kinds for part in content) if isinstance(content, list) else 0


def is_empty(message: Any) -> bool:
    """Whether a message has neither tool calls nor text that can be seen."""
    if not isinstance(message, Mapping):
        return False
    return not message.get("tool_calls") and not any(one.isprintable() and one != " " for one in text_of(message))


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message, without images."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") if isinstance(part, Mapping) else "" for part in content)
    return str(content or "")
