"""Check a record, open its images, and render it as text: a prompt and completions in pieces.

A record is a dict in one of TRL's preference formats: ``prompt``, ``chosen`` and ``rejected`` as plain strings or as lists of
messages; ``prompt`` may be missing when both completions repeat it; ``images`` (or ``image``) and ``videos`` are optional. A
conversation, ``messages``, is a prompt up to the assistant's first turn and one ``completion`` (`as_completion`).
"""

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from trl.data_utils import extract_prompt

from mpo.data.images import open_image
from mpo.data.messages import check_messages, check_turns, check_unplaced, checked_text, image_parts, is_empty, text_of
from mpo.data.paths import check_unmoved
from mpo.data.unused import MESSAGE, check_unused, texts_in
from mpo.data.video import Frame, open_frames, with_frames
from mpo.encoding.chat import Chat, Piece, check_tool_calls, pieces_of_turns, probe
from mpo.io import bad_record
from mpo.models.control_tokens import check_texts
from mpo.schema import BAD, CONVERSATION_COLUMNS, IMAGE_COLUMNS, LOADED, TRL_COLUMNS, InternalKey, names
from mpo.schema import SIDES as SIDES

Record = dict[str, Any]
CONVERSATION = ("completion",)
"""The column of the one completion that a conversation is encoded with."""


@dataclass(frozen=True)
class Rendered:
    """A prompt with its completions as text.

    ``images`` holds the images that it has placeholders for, in order: the last ``later_images`` of them in its only completion,
    in turns of the user, the others in the prompt.
    """

    prompt: str
    completions: list[list[Piece]]
    images: list[Any]
    conversational: bool
    later_images: int = 0

    @property
    def with_images(self) -> str:
        """The text that has all placeholders: the prompt, or with `later_images` the whole conversation."""
        return self.prompt + "".join(piece.text for piece in self.completions[0]) if self.later_images else self.prompt


Opened = dict[str | bytes, Image.Image]
"""Opened images by their file's path, or their encoded bytes; or a `mpo.encoding.images.Opening`."""


def record_images(record: Mapping[str, Any], opened: Opened | None = None) -> list[Any]:
    """The opened images of a record (`mpo.data.images`): ``images`` or ``image``, if any, and the frames of its videos.

    Arrays, tensors and None are returned unchanged. `opened`: images that other records of the batch have opened, which are not
    opened again; those of this one are added.
    """
    name, opened = describe(record), {} if opened is None else opened
    images = encoded_images(with_frames(record, where=name))
    places: dict[str, list[int]] = {}
    if all(record.get(column) is not None for column in LOADED):  # their paths are resolved; others may contain links
        for path in {path for image in images if (path := _file_of(image)) is not None}:
            check_unmoved(path, name)
    for place, image in enumerate(images):
        if isinstance(image, Frame):
            places.setdefault(image.path, []).append(place)
        elif image is not None and not isinstance(image, (np.ndarray, Tensor)):
            source = _file_of(image) or image.get("bytes") if isinstance(image, Mapping) else image
            known = opened.get(source) if isinstance(source, str | bytes) else None
            opening = getattr(opened, "open", open_image)
            images[place] = known or opening(image, where=f"{name}: image {place + 1} of {len(images)}")
            if isinstance(source, str | bytes):
                opened[source] = images[place]
    for path, own in places.items():
        for place, frame in zip(own, open_frames(path, [images[place] for place in own], where=name), strict=True):
            images[place] = frame
    return images


def _file_of(image: Any) -> str | None:
    if isinstance(image, Mapping):
        return image.get("path") if image.get("bytes") is None else None
    return image.path if isinstance(image, Frame) else None


def encoded_images(record: Mapping[str, Any]) -> list[Any]:
    """The images of a record, unopened."""
    given = [record[name] for name in IMAGE_COLUMNS if record.get(name) is not None]
    if not given:
        return []
    if len(given) > 1:
        raise ValueError(f"{describe(record)} has both 'images' and 'image'. Drop one of the columns.")
    images = given[0]
    return list(images) if isinstance(images, Sequence) and not isinstance(images, (str, bytes)) else [images]


def render(
    record: Record, processing_class: Any, *, sides: Sequence[str] = SIDES, split_turns: bool = True, opened: Opened | None = None
) -> Rendered:
    """Render a prompt and its completions with the chat template of `processing_class`.

    A prompt that ends in an assistant message is continued: its text and the completion's first message are one turn, as with
    transformers' ``continue_final_message``.

    Args:
        record: a record (see the top of this file); ``tools`` and ``chat_template_kwargs`` are passed on. None in a
            message, a tool call or a tool is the padding of Arrow's structs and is removed; in JSON text it is kept. A conversation
            comes from `as_completion`; its completion may have images.
        processing_class: a tokenizer or processor with a chat template (not needed for plain-text records).
        sides: the columns of the completions; none for a prompt to generate from.
        split_turns: split a completion of several messages into what the assistant wrote and the rest.
        opened: see `record_images`.

    Raises:
        ValueError: when a completion is missing or empty, two are the same, a column, or a field of a message, is not used
            but may be part of the prompt (`mpo.data.unused`), a text is that of messages, messages are in the wrong place, an
            image is None or cannot be opened, the numbers of images and placeholders differ, the chat template cannot render
            the messages, or a text contains an image token (`mpo.models.control_tokens`).
    """
    where = describe(record)
    _check_completions(record, sides)
    with bad_record(where):
        check_fields(record, sides, processing_class)
    record = with_frames(record, where=where)
    images = record_images(record, opened)
    for place, image in enumerate(images):
        if image is None:
            raise ValueError(f"{where}: image {place + 1} of {len(images)} is None. Give the image or leave it out.")
    texts = _texts(record, sides)
    check_texts(texts, len(images), processing_class, where)
    if _are_plain(texts, where):
        return Rendered(texts["prompt"], [[Piece(texts[side], labelled=True)] for side in sides], images, conversational=False)

    is_whole = tuple(sides) == CONVERSATION
    later = sum(map(image_parts, texts[sides[0]])) if is_whole else 0
    first = max(len(images) - later, 0)
    chat = Chat(record, texts["prompt"], images[:first], processing_class, where)
    if not (is_whole and images):
        _check_asked(chat)
    if not sides:
        return Rendered(chat.opening(chat.continues), [], images, conversational=True)
    conversations = [chat.completed(texts[side], side, images[first:]) for side in sides]
    whole = [chat.text(messages) for messages, _ in conversations]
    # A generation prompt may differ from the rendered turn (DeepSeek-R1's <think>): the prompt is the common prefix of all.
    continued = any(given is not chat.prompt for _, given in conversations)
    prompt = os.path.commonprefix([chat.opening(continued), *whole])
    chat.check_prompt(prompt)
    completions = []
    for side, text, (messages, given) in zip(sides, whole, conversations, strict=True):
        if "labelled" in record:
            check_tool_calls(messages, text, where)
        if len(texts[side]) == 1 or not split_turns:
            completions.append([Piece(text[len(prompt) :], labelled=True)])
        else:
            completions.append(pieces_of_turns(chat, given, messages[len(given) :], prompt, record.get("labelled")))
    return Rendered(prompt, completions, images, conversational=True, later_images=later)


def _check_asked(chat: Chat) -> None:
    said = [text_of(message) for message in chat.prompt if message["role"] == "user"]
    if not probe(chat.processing_class).asks and any(map(str.strip, said)):
        raise ValueError(
            f"{chat.where}: the chat template leaves out what the user says; it is for SFT on images and their captions. Use "
            "another (LLaVA-1.5: chat_template=vicuna), or leave the record out."
        )


def _texts(record: Record, sides: Sequence[str]) -> dict[str, Any]:
    texts = {key: record[key] for key in ("prompt", *sides) if record.get(key) is not None}
    if not sides:
        return {"prompt": "", **texts}
    if "prompt" in texts:
        return texts
    if len({type(text) for text in texts.values()}) > 1:
        raise ValueError(f"{describe(record)}: {_listed(sides)} are of different types. Give both as text, or both as messages.")
    return dict(extract_prompt(texts))


def _are_plain(texts: Mapping[str, Any], where: str) -> bool:
    for key, value in texts.items():
        if not isinstance(value, (str, list)):
            raise ValueError(f"{where}: '{key}' is of type {type(value).__name__} instead of text or a list of messages.")
    as_text = [key for key, value in texts.items() if isinstance(value, str)]
    if as_text and len(as_text) < len(texts):
        raise ValueError(f"{where}: {' and '.join(as_text)} are text and the rest messages. Give all of them as one or the other.")
    return bool(as_text)


def check_fields(record: Record, sides: Sequence[str], processing_class: Any = None) -> None:
    """Refuse a record with a column, or a field of a message, that is not used but may be part of the prompt (`mpo.data.unused`).

    A message's field is used if it is part of every message or if the chat template of `processing_class` reads it. A text that is
    the JSON of messages is refused too. The record's videos may be frames already; `sides` as in `render`.
    """
    columns = sides if tuple(sides) == SIDES else CONVERSATION_COLUMNS if sides else (*SIDES, *CONVERSATION_COLUMNS)
    known = _KNOWN.union(columns)
    unused = {name: value for name, value in record.items() if name not in known and not isinstance(name, InternalKey)}
    used = {name: record[name] for name in ("prompt", *(columns if sides else ())) if record.get(name) is not None}
    own = record.get("chat_template_kwargs")
    template = own.get("chat_template") if isinstance(own, Mapping) else None
    template = template or getattr(processing_class, "chat_template", None)
    read = _read_by(" ".join(template.values()) if isinstance(template, dict) else template or "")
    shown = [*encoded_images(record), *(record.get("videos") or ())]
    advice = "remove {!r} (dataset.remove_columns; dataset.map for fields of messages)"
    labelled = () if tuple(sides) in (SIDES, ()) else CONVERSATION_COLUMNS
    used_fields = {*MESSAGE, *read, *(["train"] if labelled else [])}
    check_unused(unused, used, shown, known=used_fields, advice=advice, labelled=labelled)
    for name, value in used.items():
        for text in texts_in(value):
            checked_text(text, repr(name))


_KNOWN = {*names(), *TRL_COLUMNS, "labelled"} - {*SIDES}


@cache
def _read_by(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"(?:\.|[\[(]['\"])(\w+)", template)) - {"image", "images", "video", "videos", "image_url"}


def _check_completions(record: Mapping[str, Any], sides: Sequence[str]) -> None:
    where = describe(record)
    if isinstance(sides, str):
        raise ValueError(f"sides must be a list of columns, such as [{sides!r}]; got the text {sides!r}.")
    for side in sides:
        if record.get(side) is None:
            raise ValueError(
                f"{where} has no '{side}'. The record needs {_listed(sides)} (and 'prompt' unless all completions repeat it); this "
                f"one has {sorted(record)}."
            )
    for side in sides:
        completion = record[side]
        messages = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        if not messages or is_empty(messages[-1]):
            raise ValueError(f"{where}: '{side}' is empty. Give the completion its text or leave the record out.")
    if any(record[one] == record[other] for one, other in combinations(sides, 2)):
        raise ValueError(f"{where}: {_listed(sides)} are the same, so there is nothing to prefer. Leave the record out.")


def _listed(sides: Sequence[str]) -> str:
    return " and ".join(map(repr, sides))


def describe(record: Mapping[str, Any]) -> str:
    """The name of a record in errors: its id, or else the beginning of its prompt."""
    if record.get("id") is not None:
        return f"record {record['id']!r}"
    prompt = record.get("prompt") or record.get("messages") or ""
    prompt = str(prompt[:2] if isinstance(prompt, list) else prompt)
    return f"the record with prompt {prompt[:80]!r}" if prompt else "a record"


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
    turns = [place for place, message in enumerate(completion) if message["role"] == "assistant"]
    by_default = {"all": turns, "last": turns[-1:], "flagged": []}[train_on]
    flags = [message.get("train") for message in completion]
    for place, flag in enumerate(flags):
        if flag is not None and not isinstance(flag, bool) or (flag and place not in turns):
            got = f"{flag!r} in one of role {completion[place]['role']!r}"
            raise ValueError(f"{where}: 'train' is true or false, in messages of the assistant; got {got}.")
    found = [place in by_default if flag is None else bool(flag) for place, flag in enumerate(flags)]
    if turns and not any(found):
        none = f"none of the assistant's turns is labelled (train_on={train_on!r}), so there is nothing to learn"
        raise ValueError(f'{where}: {none}. Set "train": true in one, or leave the record out.')
    return found
