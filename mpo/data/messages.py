"""Convert text or messages to checked messages, whose contents are parts, with images at their placeholders.

A message is ``{"role", "content"}``, a part ``{"type": "text", "text": ...}`` or ``{"type": "image", "text": None}`` (``"video"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpo.data.pairs import OWN_DATA_SET
from mpo.io import BadRecord, json_kind

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
NEEDED = "A pair needs a prompt, a chosen and a rejected completion."
ROLES = ("system", "user", "assistant", "tool")
PLACES = ("user", "tool")
"""Roles whose texts are split at placeholders: the input of the model. In other roles, a placeholder is text or a mistake."""
_PLACEHOLDERS = {
    "video": VIDEO_PLACEHOLDER,
    "image": IMAGE_PLACEHOLDER,
}  # in this order, so that images come before videos when both are put first
_KINDS = {"video": "videos", "image": "images"}
Message = dict[str, Any]


def there(value: Any, name: str, needed: str = NEEDED) -> Any:
    """Check that a prompt or a completion is neither missing nor empty: text, or a list that may be messages.

    Raises:
        BadRecord: for anything else.
    """
    if value is None:
        raise BadRecord("", f"{name} is missing. {needed}")
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise BadRecord("", f"{name} is empty. {needed}")
    if not isinstance(value, (str, list)):
        raise BadRecord("", f"{name} is {json_kind(value)} instead of text or a list of messages.")
    return value


def completion_messages(value: str | list[Any], name: str) -> list[Message]:
    """Convert a completion to messages, which have only text and end with one of the assistant.

    Raises:
        BadRecord: for an invalid completion, and for one with an image.
    """
    messages: list[Message]
    if isinstance(value, str):
        messages = [{"role": "assistant", "content": [text_part(checked_text(value, name))]}]
        written = value
    else:
        messages = [_message(message, name) for message in value]
        if messages[0]["role"] in ("system", "user"):
            raise BadRecord(
                "", f"{name} begins with a message of the {messages[0]['role']}, which belongs in the prompt. Move it there."
            )
        if messages[-1]["role"] != "assistant":
            raise BadRecord(
                "", f"{name} ends with a message of role {messages[-1]['role']!r} instead of the assistant's. End it with one."
            )
        messages = [{**message, "content": _parts(message["content"], name)} for message in messages]
        if any(part["type"] != "text" for message in messages for part in message["content"]):
            raise BadRecord("", f"{name} has an image, but images belong to the prompt. Move it there or leave the record out.")
        by_assistant = [message for message in messages if message["role"] == "assistant"]
        texts = ("".join(part["text"] for part in message["content"]) for message in by_assistant)
        written = min(texts, key=lambda text: len(text.strip()))
    if not written.strip():
        raise BadRecord("", f"{name} is empty. Give the completion its text or leave the record out.")
    return messages


def prompt_messages(
    value: str | list[Any], name: str, wanted: Mapping[str, int], elsewhere: Mapping[str, str] | None = None
) -> list[Message]:
    """Convert a prompt to messages, with image parts at the placeholders or, without any placeholders, in front.

    Args:
        value: text, or messages. If image parts already place all images, text is left unchanged.
        name: name of the prompt, for error messages.
        wanted: number of images and videos of the record, by ``image`` and ``video``.
        elsewhere: other texts of the record, by name, in which images are not allowed.

    Raises:
        BadRecord: for an invalid prompt, and for placeholders that do not match the images or are not allowed there.
    """
    given = [{"role": "user", "content": value}] if isinstance(value, str) else value
    messages = [_message(message, name) for message in given]
    if not any(message["role"] == "user" for message in messages):
        raise BadRecord("", f"{name} has no message of the user. Add one or leave the record out.")
    written = "".join(one["content"] for one in messages if one["role"] in PLACES and isinstance(one["content"], str))
    for message in messages:
        message["content"] = _parts(message["content"], name)
    placed = {kind: sum(part["type"] == kind for one in messages for part in one["content"]) for kind in _PLACEHOLDERS}
    all_placed = any(placed.values()) and placed == wanted and not any(text in written for text in _PLACEHOLDERS.values())
    if not all_placed:
        for kind in _PLACEHOLDERS:
            _check_placeholders(messages, kind, placed[kind], wanted[kind], elsewhere or {})
        for message in messages:
            if message["role"] in PLACES:
                message["content"] = [segment for part in message["content"] for segment in _split_text(part)]
    if not any(part["type"] != "text" or part["text"].strip() for message in messages for part in message["content"]):
        raise BadRecord("", f"{name} is empty. {NEEDED}")
    return messages


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Put a record's ``system`` text in front of its prompt, unless it is None, empty, or already there.

    Raises:
        BadRecord: for two different system messages, and for a ``system`` that is not text.
    """
    if system in (None, ""):
        return messages
    first = {"role": "system", "content": [text_part(checked_text(system, "'system'"))]}
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0] != first:
        raise BadRecord("", "there is a system message in 'system' and another in the prompt. Keep one of them.")
    return messages


def text_part(text: str) -> dict[str, Any]:
    """Make a text part."""
    return {"type": "text", "text": text}


def texts_of(messages: Sequence[Message]) -> str:
    """Join the text parts of messages with line breaks."""
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")


def checked_text(value: Any, name: str) -> str:
    """Check that a value is text that can be encoded as Unicode.

    Raises:
        BadRecord: for anything else.
    """
    if not isinstance(value, str):
        raise BadRecord("", f"{name} has {json_kind(value)} where text is expected.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRecord(
                "", f"{name} has half a character (\\u{ord(value[error.start]):x}), which is not Unicode. Fix the text."
            ) from None
    return value


# Messages and their parts


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRecord("", f"{name} has {json_kind(message)} where a message (role, content) is expected.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord("", f"{name} has a message of role {role!r}; the role must be one of {', '.join(ROLES)}.")
    if message.get("tool_calls"):
        raise BadRecord("", f"{name} has tool_calls, which records cannot hold. {OWN_DATA_SET}")
    if not isinstance(content, (str, list)):
        raise BadRecord("", f"{name} has a message whose content is {json_kind(content)} instead of text or a list of parts.")
    return {"role": role, "content": content}


def _parts(content: str | list[Any], name: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [text_part(checked_text(content, name))]
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            parts.append(text_part(checked_text(part.get("text"), name)))
        elif kind in ("image", "video"):
            if any(part.get(key) is not None for key in (kind, "url", "path")):
                raise BadRecord(
                    "", f"{name} has an image inside its messages. Move it into 'images' and leave an empty image part here."
                )
            parts.append({"type": kind, "text": None})
        else:
            raise BadRecord("", f"{name} has a part that is not text, image or video: {json_kind(part)} of type {kind!r}.")
    return parts


# Placeholders


def _count_placeholders(message: Message, kind: str) -> int:
    return sum(part["text"].count(_PLACEHOLDERS[kind]) for part in message["content"] if part["type"] == "text")


def _check_placeholders(messages: list[Message], kind: str, placed: int, wanted: int, elsewhere: Mapping[str, str]) -> None:
    """Refuse placeholders that do not match the images (or videos); without any placeholders, put them in front."""
    placeholders = sum(_count_placeholders(message, kind) for message in messages if message["role"] in PLACES)
    if placeholders + placed == wanted:
        return
    if placeholders or placed or _strays(messages, kind, elsewhere):
        raise _misplaced(messages, kind, placeholders + placed, wanted, elsewhere)
    content = next(message["content"] for message in messages if message["role"] == "user")
    after = content.pop(0)["text"] if content and content[0]["type"] == "text" else ""
    content.insert(0, text_part(_PLACEHOLDERS[kind] * wanted + after))


def _strays(messages: Sequence[Message], kind: str, elsewhere: Mapping[str, str]) -> list[str]:
    """List the names of all texts with a placeholder where none is allowed."""
    turns = [
        _turn(place, one) for place, one in enumerate(messages) if one["role"] not in PLACES and _count_placeholders(one, kind)
    ]
    return turns + [name for name, text in elsewhere.items() if _PLACEHOLDERS[kind] in text]


def _misplaced(messages: Sequence[Message], kind: str, found: int, wanted: int, elsewhere: Mapping[str, str]) -> BadRecord:
    placeholder, what = _PLACEHOLDERS[kind], _KINDS[kind]
    with_any = [
        _turn(place, one)
        for place, one in enumerate(messages)
        if (one["role"] in PLACES and _count_placeholders(one, kind)) or any(part["type"] == kind for part in one["content"])
    ]
    turns = f" (in {', '.join(with_any)})" if with_any and len(messages) > 1 else ""
    text = "prompt" if len(messages) > 1 else "question"
    reason = f"the {text} has {found} {placeholder} placeholders for {wanted} {what}{turns}. "
    if strays := _strays(messages, kind, elsewhere):
        reason += f"{placeholder} in {', '.join(strays)} places nothing: {what} are not allowed there. "
    reason += "Put one placeholder for each into turns of the user or a tool, or none anywhere to put all in front."
    return BadRecord("", reason)


def _turn(place: int, message: Message) -> str:
    return f"turn {place + 1} ({message['role']})"


def _split_text(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a text part at its placeholders; a line break after a placeholder is dropped, as the chat template adds it."""
    if part["type"] != "text":
        return [part]
    if IMAGE_PLACEHOLDER not in part["text"] and VIDEO_PLACEHOLDER not in part["text"]:
        return [part] if part["text"] else []
    parts: list[dict[str, Any]] = []
    for number, between in enumerate(part["text"].split(VIDEO_PLACEHOLDER)):
        if number:
            parts.append({"type": "video", "text": None})
        for place, segment in enumerate(between.split(IMAGE_PLACEHOLDER)):
            if place:
                parts.append({"type": "image", "text": None})
            if parts and parts[-1]["type"] != "text":
                segment = segment.removeprefix("\n")
            if segment:
                parts.append(text_part(segment))
    return parts
