"""A conversation as a prompt and one completion with labelled turns; its order, contents and flags are checked."""

from collections.abc import Mapping
from typing import Any

from mpo.data.video import with_frames
from mpo.encoding.turns import CONVERSATION, Record, describe, image_parts, is_empty
from mpo.schema import BAD, IMAGE_COLUMNS

TRAIN_ON = ("all", "last", "flagged")
"""Which of the assistant's turns are labelled: all, the last, or those whose message has ``"train": true``."""
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


def as_completion(record: Record, train_on: str = "all") -> Record:
    """Split a conversation at the assistant's first turn, into a prompt and one completion.

    Args:
        record: ``messages``, or TRL's ``prompt`` and ``completion``, in which the prompt's turns are never labelled. Images are
            parts of the user's messages; without such parts, all of them precede the user's first text. ``"train": false`` in a
            message of the assistant leaves it unlabelled.
        train_on: one of `TRAIN_ON`.

    Returns:
        the record with ``prompt``, ``completion`` and ``labelled``, a flag for each message of the completion.

    Raises:
        ValueError: for turns that are missing, out of order, empty or unlabelled, and for an image outside the user's turns.
    """
    if BAD in record:
        raise record[BAD]
    where = describe(record)
    given = [name for name in ("messages", "prompt", *CONVERSATION) if record.get(name) is not None]
    if given == ["prompt", *CONVERSATION]:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return {**record, "labelled": [True]}
        _check_messages(prompt, "prompt", record, where)
        _check_messages(completion, "completion", record, where)
        return {**record, "labelled": _labelled(completion, train_on, where)}
    if given != ["messages"]:
        raise ValueError(f"{where} needs 'messages', or 'prompt' and 'completion'; it has {given or sorted(record)}.")
    messages = record["messages"]
    _check_messages(messages, "messages", record, where)
    _check_turns(messages, where)
    record = with_frames({**record, "prompt": messages}, where=where)
    messages = record.pop("prompt")
    if any(map(image_parts, messages)):  # all contents in one form, or images would be put before the first text
        texts = [isinstance(message.get("content"), str) for message in messages]
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]} if is_text else message
            for message, is_text in zip(messages, texts, strict=True)
        ]
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    completion = messages[first:]
    del record["messages"]
    return {**record, "prompt": messages[:first], "completion": completion, "labelled": _labelled(completion, train_on, where)}


def _check_messages(messages: Any, name: str, record: Record, where: str) -> None:
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
            if text and has_images and "<image>" in text:
                raise ValueError(f'{this} has the text \'<image>\', and images are parts here: {{"type": "image"}}. Replace it.')
        for flag in _OTHERS_FLAGS:
            if message.get(flag) is not None:
                raise ValueError(f'{this} has {flag!r}, which would be ignored. Set "train": false where a turn is not labelled.')
        if image_parts(message, ("video",)) and not record.get("videos"):
            raise ValueError(f"{this} has a part of type 'video', and the record has 0 videos. Give their paths in 'videos'.")
        if role != "user" and image_parts(message, ("image", "video")):
            raise ValueError(f"{this}, of role {role!r}, has an image. Images belong to the user's messages.")


def _check_turns(messages: list[Any], where: str) -> None:
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


def _labelled(completion: list[Any], train_on: str, where: str) -> list[bool]:
    """Whether each message of a completion is labelled."""
    turns = [place for place, message in enumerate(completion) if message["role"] == "assistant"]
    by_default = {"all": turns, "last": turns[-1:], "flagged": []}[train_on]
    flags = [message.get("train") for message in completion]
    for place, flag in enumerate(flags):
        if flag is not None and not isinstance(flag, bool) or (flag and place not in turns):
            role = completion[place]["role"]
            raise ValueError(
                f"{where}: 'train' is true or false, in messages of the assistant; got {flag!r} in one of role {role!r}."
            )
    found = [place in by_default if flag is None else bool(flag) for place, flag in enumerate(flags)]
    if turns and not any(found):
        raise ValueError(
            f"{where}: none of the assistant's turns is labelled (train_on={train_on!r}), so there is nothing to learn. Set "
            '"train": true in one, or leave the record out.'
        )
    return found
