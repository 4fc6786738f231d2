"""A conversation as a prompt and one completion with labelled turns; its order, contents and flags are checked."""

from typing import Any

from mpo.data.messages import check_messages, check_turns, check_unplaced, image_parts
from mpo.data.video import with_frames
from mpo.encoding.turns import CONVERSATION, Record, describe
from mpo.schema import BAD, IMAGE_COLUMNS

TRAIN_ON = ("all", "last", "flagged")
"""Which of the assistant's turns are labelled: all, the last, or those whose message has ``"train": true``."""


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
            if not any(record.get(name) for name in IMAGE_COLUMNS):
                check_unplaced(prompt, "'prompt'", where)
            return {**record, "labelled": [True]}
        check_messages(prompt, "prompt", record, where)
        check_messages(completion, "completion", record, where)
        if completion and completion[0]["role"] == "assistant":  # render says what else it may not begin with
            check_turns([*prompt, *completion], where)
        return {**record, "labelled": _labelled(completion, train_on, where)}
    if given != ["messages"]:
        raise ValueError(f"{where} needs 'messages', or 'prompt' and 'completion'; it has {given or sorted(record)}.")
    messages = record["messages"]
    check_messages(messages, "messages", record, where)
    check_turns(messages, where)
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


def _labelled(completion: list[Any], train_on: str, where: str) -> list[bool]:
    """Whether each message of a completion is labelled."""
    turns = [place for place, message in enumerate(completion) if message["role"] == "assistant"]
    by_default = {"all": turns, "last": turns[-1:], "flagged": []}[train_on]
    flags = [message.get("train") for message in completion]
    for place, flag in enumerate(flags):
        if flag is not None and not isinstance(flag, bool) or (flag and place not in turns):
            found = f"{flag!r} in one of role {completion[place]['role']!r}"
            raise ValueError(f"{where}: 'train' is true or false, in messages of the assistant; got {found}.")
    found = [place in by_default if flag is None else bool(flag) for place, flag in enumerate(flags)]
    if turns and not any(found):
        none = f"none of the assistant's turns is labelled (train_on={train_on!r}), so there is nothing to learn"
        raise ValueError(f'{where}: {none}. Set "train": true in one, or leave the record out.')
    return found
