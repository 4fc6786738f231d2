"""Convert text or messages to checked messages, whose contents are parts, with images at their placeholders.

A message is ``{"role", "content"}``, a part ``{"type": "text", "text": ...}`` or ``{"type": "image", "text": None}`` (``"video"``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpo.data.fields import OWN_DATA_SET
from mpo.io import BadRecord, json_kind, parse_json
from mpo.schema import IMAGE_COLUMNS, Message

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
NEEDED = "A pair needs a prompt, a chosen and a rejected completion."
TURNS_NEEDED = "A conversation needs turns of the user and of the assistant."
EMPTY, PLACEHOLDERS = "empty text", "placeholders and images"
"""Kinds of bad records."""
ROLES = {
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
PLACES = ("user", "tool")
"""Roles whose texts are split at placeholders: the input of the model. In other roles, a placeholder is text or a mistake."""
_PLACEHOLDERS = {"video": VIDEO_PLACEHOLDER, "image": IMAGE_PLACEHOLDER}
# In this order, so that images come before videos when both are put first.
_SPLIT = re.compile(f"({IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER})")
MESSAGES_AS_TEXT = re.compile(
    r"""\s*"?\[?\s*\{(?=.*["'](?:role|from)\\?["']\s*:\s*\\?["'](?:system|user|assistant|tool|human|gpt|observation)\\?["'])"""
    r"""(?=.*["'](?:content|value)\\?["']\s*:)|\s*\[\s*\{\s*["']type["']\s*:\s*["'](?:text|image|image_url|video)["']\s*[,}]""",
    re.DOTALL,
)
"""The JSON, or Python's text, of messages or of the parts of a message: a list that was written as text."""


def there(value: Any, name: str, needed: str = NEEDED) -> Any:
    """Refuse a prompt or a completion that is missing, empty, or neither text nor a list that may be messages."""
    if value is None:
        raise ValueError(f"{name} is missing. {needed}")
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise BadRecord("", f"{name} is empty. {needed}", EMPTY)
    if not isinstance(value, (str, list)):
        raise ValueError(f"{name} is {json_kind(value)} instead of text or a list of messages.")
    return value


def completion_messages(value: str | list[Any], name: str) -> list[Message]:
    """Convert a completion to messages, which have only text and end with one of the assistant; refuse any other completion."""
    given: list[Message] = [{"role": "assistant", "content": value}]
    messages = given if isinstance(value, str) else [_message(message, name) for message in value]
    check_ends(messages, name)
    for message in messages:
        message["content"] = _parts(message["content"], name)
    if any(part["type"] != "text" for message in messages for part in message["content"]):
        raise ValueError(f"{name} has an image, but images belong to the prompt. Move it there or leave the record out.")
    by_assistant = [message["content"] for message in messages if message["role"] == "assistant"]
    if not all("".join(part["text"] for part in content).strip() for content in by_assistant):
        raise BadRecord("", f"{name} is empty. Give the completion its text or leave the record out.", EMPTY)
    return messages


def prompt_messages(
    value: str | list[Any],
    name: str,
    wanted: Mapping[str, int],
    elsewhere: Mapping[str, str] | None = None,
    *,
    is_whole: bool = False,
) -> list[Message]:
    """Convert a prompt to messages, with image parts at the placeholders or, without any placeholders, in front.

    If image parts of `value` already place all images, text is left unchanged. `wanted` is the number of images and of videos, by
    ``image`` and ``video``; `elsewhere` are other texts of the record, by name, in which none are allowed. A whole conversation
    (`is_whole`) may have ``tool_calls`` (as JSON) and ``train``, and images only in turns of the user, as in TRL's SFTTrainer.

    Raises ValueError for an invalid prompt, and for placeholders that do not match the images or are not allowed there.
    """
    given = [{"role": "user", "content": value}] if isinstance(value, str) else value
    messages = [_message(message, name, is_whole) for message in given]
    needed, places = (TURNS_NEEDED, PLACES[:1]) if is_whole else (NEEDED, PLACES)
    if not any(message["role"] == "user" for message in messages):
        raise ValueError(f"{name} has no message of the user. Add one or leave the record out.")
    written = "".join(one["content"] for one in messages if one["role"] in places and isinstance(one["content"], str))
    for message in messages:
        message["content"] = _parts(message["content"], name)
    placed = {kind: sum(part["type"] == kind for one in messages for part in one["content"]) for kind in _PLACEHOLDERS}
    all_placed = any(placed.values()) and placed == wanted and not any(text in written for text in _PLACEHOLDERS.values())
    if not all_placed:
        for kind in _PLACEHOLDERS:
            _check_placeholders(messages, kind, placed[kind], wanted[kind], elsewhere or {}, places)
        for message in messages:
            if message["role"] in places:
                message["content"] = [segment for part in message["content"] for segment in _split_text(part)]
    if not any(part["type"] != "text" or part["text"].strip() for message in messages for part in message["content"]):
        raise BadRecord("", f"{name} is empty. {needed}", EMPTY)
    return messages


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Put a record's ``system`` text in front of its prompt, unless it is empty or there; refuse a different one, and no text."""
    if system in (None, ""):
        return messages
    first = {"role": "system", "content": [text_part(checked_text(system, "'system'"))]}
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0] != first:
        raise ValueError("there is a system message in 'system' and another in the prompt. Keep one of them.")
    return messages


def text_part(text: str) -> dict[str, Any]:
    """Make a text part."""
    return {"type": "text", "text": text}


def checked_text(value: Any, name: str) -> str:
    """Check that a value is text that can be encoded as Unicode. Raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"{name} has {json_kind(value)} where text is expected.")
    if value.lstrip()[:1] in ("{", "[", '"') and MESSAGES_AS_TEXT.match(value):
        raise ValueError(f"{name} is the text of messages ({value:.60}...). Give it as a list, as json.loads makes it.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):x}"
            raise ValueError(f"{name} has half of a character ({half}), not valid Unicode. Fix the text.") from None
    return value


# Messages and their parts


def _message(message: Any, name: str, whole: bool = False) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{name} has {json_kind(message)} where a message (role, content) is expected.")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{name} has a message of role {role!r}; the role must be one of {', '.join(ROLES)}.")
    own: Message = {}
    if whole:
        calls = as_json(message.get("tool_calls"), f"'tool_calls' of {name}")
        content = "" if calls and content is None else content
        own = {key: value for key, value in (("tool_calls", calls), ("train", message.get("train"))) if value is not None}
    elif message.get("tool_calls"):
        raise ValueError(f"{name} has tool_calls, which records cannot hold. {OWN_DATA_SET}")
    if not isinstance(content, (str, list)):
        raise ValueError(f"{name} has a message whose content is {json_kind(content)} instead of text or a list of parts.")
    return {"role": role, "content": content, **own}


def as_json(value: Any, name: str) -> str | None:
    """Refuse all but a list of objects that name functions; return its JSON, which Arrow cannot change. JSON keeps its null."""
    found = parse_json(value, name) if isinstance(value, str) and value else unpadded(value)
    if found in (None, "", []):
        return None
    if not isinstance(found, list) or not all(isinstance(one, Mapping) for one in found):
        raise ValueError(f"{name} has {json_kind(found)} instead of a list of objects.")
    for one in found:
        function = one.get("function", one)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"{name} has an entry without the name of a function: {one!r:.80}.")
    return json.dumps(found, ensure_ascii=False, default=str)


def unpadded(value: Any) -> Any:
    """A value without the null that Arrow adds to objects in a list, for the fields of the others; null in lists stays.

    >>> unpadded({"city": "Rome", "x": None, "tags": [None, {"a": None, "b": 0}]})
    {'city': 'Rome', 'tags': [None, {'b': 0}]}
    """
    if isinstance(value, Mapping):
        return {name: unpadded(one) for name, one in value.items() if one is not None}
    return list(map(unpadded, value)) if isinstance(value, list) else value


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
                raise ValueError(f"{name} has an image inside its messages. Move it into 'images' and leave an empty part here.")
            parts.append({"type": kind, "text": None})
        else:
            raise ValueError(f"{name} has a part that is not text, image or video: {json_kind(part)} of type {kind!r}.")
    return parts


# Placeholders


def _check_placeholders(
    messages: list[Message], kind: str, placed: int, wanted: int, elsewhere: Mapping[str, str], places: Sequence[str]
) -> None:
    """Refuse placeholders that do not match the images (or videos); without any placeholders, put them in front."""
    placeholder = _PLACEHOLDERS[kind]
    found = placed + sum(_count(one, placeholder) for one in messages if one["role"] in places)
    if found == wanted:
        return
    turns, strays = [], []  # with placeholders or images, and where no placeholder is allowed
    for place, one in enumerate(messages, start=1):
        turn, count = f"turn {place} ({one['role']})", _count(one, placeholder)
        if (count and one["role"] in places) or any(part["type"] == kind for part in one["content"]):
            turns.append(turn)
        if count and one["role"] not in places:
            strays.append(turn)
    strays += [name for name, text in elsewhere.items() if placeholder in text]
    if not found and not strays:
        content = next(message["content"] for message in messages if message["role"] == "user")
        after = content.pop(0)["text"] if content and content[0]["type"] == "text" else ""
        content.insert(0, text_part(placeholder * wanted + after))
        return
    several = len(messages) > 1
    reason = f"the {'prompt' if several else 'question'} has {found} {placeholder} placeholders for {wanted} {kind}s"
    reason += f" (in {', '.join(turns)}). " if turns and several else ". "
    if strays:
        reason += f"{placeholder} in {', '.join(strays)} places nothing: {kind}s are not allowed there. "
    advice = f"Put one for each into turns of the {' or a '.join(places)}, or none anywhere to put all in front."
    raise BadRecord("", reason + advice, PLACEHOLDERS)


def _count(message: Message, placeholder: str) -> int:
    return sum(part["text"].count(placeholder) for part in message["content"] if part["type"] == "text")


def _split_text(part: dict[str, Any]) -> list[dict[str, Any]]:
    """Split a text part at its placeholders; a line break after a placeholder is dropped, as the chat template adds it."""
    if part["type"] != "text" or "<" not in part["text"]:
        return [part] if part["text"] != "" else []
    parts: list[dict[str, Any]] = []
    for piece in _SPLIT.split(part["text"]):
        if piece in _PLACEHOLDERS.values():
            parts.append({"type": piece[1:-1], "text": None})
            continue
        if parts and parts[-1]["type"] != "text":
            piece = piece.removeprefix("\n")
        if piece:
            parts.append(text_part(piece))
    return parts


# The turns of a conversation: their order, their contents and their flags


def check_messages(messages: Any, name: str, record: Mapping[str, Any], where: str) -> None:
    """Refuse what is no list of messages whose contents are text, or parts that are text and placeholders."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: '{name}' is of type {type(messages).__name__} instead of a list of messages.")
    has_images = any(record.get(column) for column in IMAGE_COLUMNS)
    for place, message in enumerate(messages, start=1):
        this = f"{where}: message {place} of '{name}'"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise ValueError(f"{this} has the role {role!r} instead of one of {', '.join(ROLES)}.")
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


def check_ends(completion: Sequence[Message], name: str) -> None:
    """Refuse a completion that does not begin with the assistant, or the result of a tool, or does not end with the assistant."""
    for message, verb, roles, advice in (
        (completion[0], "begins", ("assistant", "tool"), "Move it into the prompt."),
        (completion[-1], "ends", ("assistant",), "End it with one."),
    ):
        if message["role"] not in roles:
            raise ValueError(f"{name} {verb} with a message of role {message['role']!r} instead of the assistant's. {advice}")


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
        if before not in ROLES[role]:
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
