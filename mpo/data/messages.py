"""Text or messages of any origin -> messages, checked, whose contents are parts, with images where their marks stand.

A message is ``{"role", "content"}``, a part ``{"type": "text", "text": ...}`` or ``{"type": "image", "text": None}`` (``"video"``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpo.data.pairs import OWN_DATA_SET, BadRecord, json_kind

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
NEEDED = "A pair needs a question, a chosen and a rejected answer."
ROLES = ("system", "user", "assistant", "tool")
PLACES = ("user", "tool")
"""Roles whose texts are cut at their marks: what is shown to the model. In the others, a mark is text or a mistake."""
_PLACEHOLDERS = {
    "video": VIDEO_PLACEHOLDER,
    "image": IMAGE_PLACEHOLDER,
}  # in this order, so that in front images stand before videos
_KINDS = {"video": "videos", "image": "images"}
Message = dict[str, Any]


def there(value: Any, name: str, needed: str = NEEDED) -> Any:
    """A prompt or an answer that is neither missing nor empty: text, or a list that may be messages.

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
    """An answer as messages: text alone, and the assistant's in the end.

    Raises:
        BadRecord: for what is no answer, and one with an image.
    """
    messages: list[Message]
    if isinstance(value, str):
        messages = [{"role": "assistant", "content": [text_part(checked_text(value, name))]}]
        written = value
    else:
        messages = [_message(message, name) for message in value]
        if messages[0]["role"] in ("system", "user"):
            raise BadRecord(
                "", f"{name} begins with a message of the {messages[0]['role']}: what is asked belongs into the prompt."
            )
        if messages[-1]["role"] != "assistant":
            raise BadRecord("", f"{name} ends with a message of role {messages[-1]['role']!r} instead of the assistant's.")
        messages = [{**message, "content": _parts(message["content"], name)} for message in messages]
        if any(part["type"] != "text" for message in messages for part in message["content"]):
            raise BadRecord("", f"{name} has an image, and images belong to the prompt.")
        by_assistant = [message for message in messages if message["role"] == "assistant"]
        texts = ("".join(part["text"] for part in message["content"]) for message in by_assistant)
        written = min(texts, key=lambda text: len(text.strip()))
    if not written.strip():
        raise BadRecord("", f"{name} is empty. Give the answer its text or leave the record out.")
    return messages


def prompt_messages(
    value: str | list[Any], name: str, wanted: Mapping[str, int], elsewhere: Mapping[str, str] | None = None
) -> list[Message]:
    """A prompt as messages, with parts where its images stand: at their marks, or where there are no marks at all, in front.

    Args:
        value: text, or messages. Text beside parts that place all images already is left as it is.
        name: how errors call it.
        wanted: how many there are of each kind, ``image`` and ``video``.
        elsewhere: other texts of the record, by their names, in which no image can stand.

    Raises:
        BadRecord: for what is no prompt, and marks that do not go with the images, or stand where no image can.
    """
    given = [{"role": "user", "content": value}] if isinstance(value, str) else value
    messages = [_message(message, name) for message in given]
    if not any(message["role"] == "user" for message in messages):
        raise BadRecord("", f"{name} has no message of the user.")
    written = "".join(one["content"] for one in messages if one["role"] in PLACES and isinstance(one["content"], str))
    for message in messages:
        message["content"] = _parts(message["content"], name)
    placed = {kind: sum(part["type"] == kind for one in messages for part in one["content"]) for kind in _PLACEHOLDERS}
    all_placed = any(placed.values()) and placed == wanted and not any(mark in written for mark in _PLACEHOLDERS.values())
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
    """A prompt that begins with what a record has as ``system``, None or empty: nothing. It may begin with the same already.

    Raises:
        BadRecord: for two that differ, and what is no text.
    """
    if system in (None, ""):
        return messages
    first = {"role": "system", "content": [text_part(checked_text(system, "'system'"))]}
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0] != first:
        raise BadRecord("", "a system message stands in 'system', and another in the prompt. Keep one of them.")
    return messages


def text_part(text: str) -> dict[str, Any]:
    """A part of text."""
    return {"type": "text", "text": text}


def texts_of(messages: Sequence[Message]) -> str:
    """All text of messages, part after part."""
    return "\n".join(part["text"] for message in messages for part in message["content"] if part["type"] == "text")


def checked_text(value: Any, name: str) -> str:
    """Text that is Unicode.

    Raises:
        BadRecord: for anything else.
    """
    if not isinstance(value, str):
        raise BadRecord("", f"{name} has {json_kind(value)} where text is expected.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise BadRecord("", f"{name} has half a character (\\u{ord(value[error.start]):x}), which is no Unicode.") from None
    return value


# Messages and their parts


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise BadRecord("", f"{name} has {json_kind(message)} where a message (role, content) is expected.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRecord("", f"{name} has a message of role {role!r}; roles are {', '.join(ROLES)}.")
    if message.get("tool_calls"):
        raise BadRecord("", f"{name} has tool_calls, which records have no place for. {OWN_DATA_SET}")
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
                raise BadRecord("", f"{name} holds an image inside its messages. Put it into 'images', and leave its place here.")
            parts.append({"type": kind, "text": None})
        else:
            raise BadRecord("", f"{name} has a part that is not text, image or video: {json_kind(part)} of type {kind!r}.")
    return parts


# Marks


def _count_placeholders(message: Message, kind: str) -> int:
    return sum(part["text"].count(_PLACEHOLDERS[kind]) for part in message["content"] if part["type"] == "text")


def _check_placeholders(messages: list[Message], kind: str, placed: int, wanted: int, elsewhere: Mapping[str, str]) -> None:
    """Refuse marks of one kind that do not go with what is there; where there are none at all, put them in front."""
    marks = sum(_count_placeholders(message, kind) for message in messages if message["role"] in PLACES)
    if marks + placed == wanted:
        return
    if marks or placed or _strays(messages, kind, elsewhere):
        raise _misplaced(messages, kind, marks + placed, wanted, elsewhere)
    content = next(message["content"] for message in messages if message["role"] == "user")
    after = content.pop(0)["text"] if content and content[0]["type"] == "text" else ""
    content.insert(0, text_part(_PLACEHOLDERS[kind] * wanted + after))


def _strays(messages: Sequence[Message], kind: str, elsewhere: Mapping[str, str]) -> list[str]:
    """The names of all texts with a mark where nothing can stand."""
    turns = [
        _turn(place, one) for place, one in enumerate(messages) if one["role"] not in PLACES and _count_placeholders(one, kind)
    ]
    return turns + [name for name, text in elsewhere.items() if _PLACEHOLDERS[kind] in text]


def _misplaced(messages: Sequence[Message], kind: str, found: int, wanted: int, elsewhere: Mapping[str, str]) -> BadRecord:
    mark, what = _PLACEHOLDERS[kind], _KINDS[kind]
    marked = [
        _turn(place, one)
        for place, one in enumerate(messages)
        if (one["role"] in PLACES and _count_placeholders(one, kind)) or any(part["type"] == kind for part in one["content"])
    ]
    turns = f" (in {', '.join(marked)})" if marked and len(messages) > 1 else ""
    reason = f"the {'prompt' if len(messages) > 1 else 'question'} has {found} {mark} marks for {wanted} {what}{turns}. "
    if strays := _strays(messages, kind, elsewhere):
        reason += f"{mark} in {', '.join(strays)} places nothing: no {what[:-1]} can stand there. "
    return BadRecord("", reason + "Give one mark for each in turns of the user or a tool, or none anywhere to put all in front.")


def _turn(place: int, message: Message) -> str:
    return f"turn {place + 1} ({message['role']})"


def _split_text(part: dict[str, Any]) -> list[dict[str, Any]]:
    """A part of text with marks -> parts; a line break after a mark is left to the chat template."""
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
