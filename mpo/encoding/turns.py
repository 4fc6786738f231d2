"""Convert a record to token ids: where the prompt ends, and which tokens of a completion are labelled.

A record is a dict in one of TRL's preference formats: ``prompt``, ``chosen`` and ``rejected`` as plain strings or as lists of
messages; ``prompt`` may be missing when both completions repeat it; ``images`` (or ``image``) and ``videos`` are optional. A
conversation, ``messages``, is a prompt up to the assistant's first turn and one ``completion`` (`mpo.encoding.conversations`).
"""

import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from trl.data_utils import common_prefix_length, extract_prompt, prepare_multimodal_messages
from trl.trainer.utils import remove_none_values

from mpo.data.images import open_image
from mpo.data.messages import checked_text
from mpo.data.paths import check_unmoved
from mpo.data.turns import image_parts, is_empty, text_of
from mpo.data.unused import MESSAGE, check_unused, texts_in
from mpo.data.video import Frame, open_frames, with_frames
from mpo.encoding.templates import is_processor, probe
from mpo.io import bad_record, parse_json
from mpo.models.control_tokens import check_texts
from mpo.schema import CONVERSATION_COLUMNS, IMAGE_COLUMNS, LOADED, TRL_COLUMNS, InternalKey, names
from mpo.schema import SIDES as SIDES

Record = dict[str, Any]
CONVERSATION = ("completion",)
"""The column of the one completion that a conversation is encoded with."""
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Completion:
    """The tokens after the prompt; ``loss_mask[i]`` is whether token ``i`` was written by the assistant."""

    ids: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True)
class Piece:
    """A part of a completion's rendered text."""

    text: str
    labelled: bool


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
"""Opened images by their file's path, or their encoded bytes; or a `mpo.encoding.features.Opening`."""


def record_images(record: Mapping[str, Any], opened: Opened | None = None) -> list[Any]:
    """The opened images of a record (`mpo.data.images`): ``images`` or ``image``, if any, and the frames of its videos.

    Arrays, tensors and None are returned unchanged.

    Args:
        opened: images that other records of the batch have opened, which are not opened again; those of this one are added.

    Raises:
        ValueError: for an image that cannot be opened, naming the record.
    """
    name = describe(record)
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
            known = None if opened is None or not isinstance(source, str | bytes) else opened.get(source)
            opening = getattr(opened, "open", open_image)
            images[place] = known or opening(image, where=f"{name}: image {place + 1} of {len(images)}")
            if opened is not None and isinstance(source, str | bytes):
                opened[source] = images[place]
    for path, own in places.items():
        frames = open_frames(path, [images[place] for place in own], where=name)
        for place, frame in zip(own, frames, strict=True):
            images[place] = frame
    return images


def _file_of(image: Any) -> str | None:
    """The path of the file that a record's image or frame is read from, if any."""
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
    several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    return list(images) if several else [images]


def render(
    record: Record,
    processing_class: Any,
    *,
    sides: Sequence[str] = SIDES,
    split_turns: bool = True,
    opened: Opened | None = None,
) -> Rendered:
    """Render a prompt and its completions with the chat template of `processing_class`.

    A prompt that ends in an assistant message is continued: its text and the completion's first message are one turn, as with
    transformers' ``continue_final_message``.

    Args:
        record: a record (see the top of this file); ``tools`` and ``chat_template_kwargs`` are passed on. None in a
            message, a tool call or a tool is the padding of Arrow's structs and is removed; in JSON text it is kept. A conversation
            comes from `mpo.encoding.conversations.as_completion`; its completion may have images.
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
    if isinstance(sides, str):
        raise ValueError(f"sides must be a list of columns, such as [{sides!r}]; got the text {sides!r}.")
    _check_completions(record, sides)
    with bad_record(where):
        check_fields(record, sides, processing_class)
    record, images = _with_images(record, opened)
    texts = {key: record[key] for key in ("prompt", *sides) if record.get(key) is not None}
    if not sides:
        texts.setdefault("prompt", "")
    elif "prompt" not in texts:
        if len({type(text) for text in texts.values()}) > 1:
            raise ValueError(f"{where}: {_listed(sides)} are of different types. Give both as text, or both as messages.")
        texts = extract_prompt(texts)
    check_texts(texts, len(images), processing_class, where)
    for key, value in texts.items():
        if not isinstance(value, (str, list)):
            raise ValueError(f"{where}: '{key}' is of type {type(value).__name__} instead of text or a list of messages.")
    as_text = [key for key, value in texts.items() if isinstance(value, str)]
    if as_text and len(as_text) < len(texts):
        raise ValueError(f"{where}: {' and '.join(as_text)} are text and the rest messages. Give all of them as one or the other.")
    if as_text:
        return Rendered(texts["prompt"], [[Piece(texts[side], labelled=True)] for side in sides], images, conversational=False)

    later = sum(map(image_parts, texts[sides[0]])) if tuple(sides) == CONVERSATION else 0
    first = max(len(images) - later, 0)
    chat = _Chat(record, texts["prompt"], images[:first], processing_class, where)
    captions = tuple(sides) == CONVERSATION and images
    if not captions and not probe(processing_class).asks and any(text_of(m).strip() for m in chat.prompt if m["role"] == "user"):
        raise ValueError(
            f"{where}: the chat template leaves out what the user says; it is for SFT on images and their captions. Use another "
            "(LLaVA-1.5: chat_template=vicuna), or leave the record out."
        )
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
            _check_tool_calls(messages, text, where)
        if len(texts[side]) == 1 or not split_turns:
            completions.append([Piece(text[len(prompt) :], labelled=True)])
        else:
            completions.append(_turns(chat, given, messages[len(given) :], prompt, record.get("labelled")))
    return Rendered(prompt, completions, images, conversational=True, later_images=later)


def check_fields(record: Record, sides: Sequence[str], processing_class: Any = None) -> None:
    """Refuse a record with a column, or a field of a message, that is not used but may be part of the prompt (`mpo.data.unused`).

    A message's field is used if it is part of every message or if the chat template reads it.

    Args:
        record: a record; its videos may be frames already.
        sides: as in `render`.
        processing_class: whose chat template says which fields of messages it reads.

    Raises:
        ValueError: naming the column or field, and for a text that is the JSON of messages.
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
    """The fields that a chat template reads, of messages or anything else, without images."""
    return frozenset(re.findall(r"(?:\.|[\[(]['\"])(\w+)", template)) - {"image", "images", "video", "videos", "image_url"}


def _with_images(record: Record, opened: Opened | None) -> tuple[Record, list[Any]]:
    """The record with the frames of its videos, and its opened images."""
    record = with_frames(record, where=describe(record))
    images = record_images(record, opened)
    for place, image in enumerate(images):
        if image is None:
            raise ValueError(f"{describe(record)}: image {place + 1} of {len(images)} is None. Give the image or leave it out.")
    return record, images


def _check_completions(record: Mapping[str, Any], sides: Sequence[str]) -> None:
    where = describe(record)
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


class _Chat:
    """The conversation of a record, in the message format of its chat template.

    Attributes:
        prompt: its messages, without an empty assistant message at the end, which the completion replaces.
        continues: whether the prompt ends in an assistant message that the completion's first message continues.
    """

    def __init__(self, record: Record, prompt: list[Any], images: list[Any], processing_class: Any, where: str) -> None:
        self.processing_class, self.where = processing_class, where
        tools = record.get("tools")
        with bad_record(where):
            tools = parse_json(tools, "'tools'") if isinstance(tools, str) else tools
        own = record.get("chat_template_kwargs") or {}
        for column, value, kind in (("tools", tools or [], list), ("chat_template_kwargs", own, Mapping)):
            if not isinstance(value, kind):
                raise ValueError(f"{where}: {column!r} must be {'a list' if kind is list else 'an object'}; got {value!r:.50}.")
        self._kwargs = {"tools": _unpadded(tools) or None, **_unpadded(own)}
        if getattr(processing_class, "chat_template", None) is None and "chat_template" not in self._kwargs:
            raise ValueError(
                f"{where} is a conversation, and {type(processing_class).__name__} has no chat template. Set its chat_template, or "
                "give prompt, chosen and rejected as plain text."
            )
        self.prompt = self._as_taken(prompt, "prompt", images)
        if self.prompt and self.prompt[-1]["role"] == "assistant" and is_empty(self.prompt[-1]):
            self.prompt = self.prompt[:-1]
        if not self.prompt:
            raise ValueError(
                f"{where}: its prompt has no message. Give it a message that the completions respond to, or leave the record out."
            )
        self.continues = self.prompt[-1]["role"] == "assistant" and not self.prompt[-1].get("tool_calls")

    def completed(self, completion: list[Any], side: str, images: Sequence[Any] = ()) -> tuple[list[Any], list[Any]]:
        """All messages including the completion's, and the prompt's messages before the completion's first turn."""
        completion = self._as_taken(completion, side, images)
        for place, message in enumerate(completion):
            if message["role"] == "assistant" and is_empty(message):
                raise ValueError(f"{self.where}: message {place + 1} of '{side}' is empty. Give it text or leave the record out.")
        if completion[0]["role"] not in ("assistant", "tool"):
            raise ValueError(
                f"{self.where}: '{side}' begins with a message of role {completion[0]['role']!r} instead of the assistant's. Put "
                "the question into the prompt."
            )
        if completion[-1]["role"] != "assistant":
            raise ValueError(
                f"{self.where}: '{side}' ends with a message of role {completion[-1]['role']!r} instead of the "
                "assistant's. Remove the messages after the assistant's last one."
            )
        if completion[0]["role"] != "assistant" or self.prompt[-1]["role"] != "assistant":
            return [*self.prompt, *completion], self.prompt
        if not self.continues:
            raise ValueError(
                f"{self.where}: its prompt ends in a tool call, and '{side}' begins with a message of the assistant. Put the "
                "tool's result between them."
            )
        before = self.prompt[:-1]
        return [*before, _joined(self.prompt[-1], completion[0], f"{self.where}: '{side}'"), *completion[1:]], before

    def opening(self, continued: bool) -> str:
        """The text of the prompt, up to where the assistant continues."""
        if continued:
            return self.text(self.prompt, continue_final_message=True)
        return self.text(self.prompt, add_generation_prompt=self.prompt[-1]["role"] != "assistant")

    def check_prompt(self, text: str) -> None:
        """Refuse a template that renders the prompt's last message differently before a completion: it would be labelled."""
        last = text_of(self.prompt[-1]).strip()
        if last and last not in text and last in self.opening(self.continues):
            raise ValueError(
                f"{self.where}: the chat template renders the prompt's last message differently before a completion, so the "
                "beginning of the completion cannot be found. Use a template that renders it the same, or end the prompt "
                "in a user message."
            )

    def text(self, messages: list[Any], **how: bool) -> str:
        """Render messages with the template."""
        try:
            rendered = self.processing_class.apply_chat_template(messages, tokenize=False, **how, **self._kwargs)
        except TemplateError as error:  # such as for an unexpected order of roles
            raise ValueError(f"{self.where}: the chat template refuses its messages: {error}") from error
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{self.where}: the chat template cannot render its messages: {error}") from error
        return str(rendered)

    def _as_taken(self, messages: list[Any], side: str, images: Sequence[Any] = ()) -> list[Any]:
        """Messages without padding, in the template's message format, with images at their placeholders."""
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"{self.where}: '{side}' has a message without a role: {message!r:.80}.")
            if message.get("content") is None and not message.get("tool_calls"):
                raise ValueError(f"{self.where}: '{side}' has a message of role {message['role']!r} without content.")
        with bad_record(self.where):
            messages = [_without_padding(message) for message in messages]
        template = probe(self.processing_class)
        if template.parts and (is_processor(self.processing_class) or not template.text):
            roles = [message["role"] for message in messages]
            messages = [{**one, "role": "assistant"} if one["role"] == "tool" else one for one in messages]  # TRL skips a tool's
            try:
                placed = prepare_multimodal_messages(messages, images=list(images))
            except ValueError as error:
                raise ValueError(f"{self.where}: {error}") from error
            return [{**message, "role": role} for message, role in zip(placed, roles, strict=True)]
        if images and is_processor(self.processing_class):
            raise ValueError(
                f"{self.where} has images, but the chat template of {type(self.processing_class).__name__} accepts text only. Use "
                "the chat template of the model's own checkpoint."
            )
        return messages if template.parts else [_as_text(message, f"{self.where}: '{side}'") for message in messages]


def _as_text(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with one string as its content, for templates that do not support parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if any(part.get("type") != "text" for part in content):
        raise ValueError(f"{where} has an image placeholder, but the chat template accepts text only.")
    return {**message, "content": text_of(message)}


def _joined(message: dict[str, Any], more: dict[str, Any], where: str) -> dict[str, Any]:
    """Join two messages: the second continues the first."""
    different = [key for key in message.keys() & more.keys() - {"role", "content"} if message[key] != more[key]]
    if different:
        raise ValueError(f"{where} continues the prompt's last message, and both have {different[0]!r}. Keep one of them.")
    first, second = message.get("content"), more.get("content")
    if isinstance(first, str) and isinstance(second, str):
        content: Any = first + second
    elif second is None:
        content = first
    else:
        first, second = ([{"type": "text", "text": one}] if isinstance(one, str) else list(one or []) for one in (first, second))
        if first and second and first[-1].get("type") == second[0].get("type") == "text":  # or templates may separate parts
            middle = {"type": "text", "text": first[-1].get("text", "") + second[0].get("text", "")}
            content = [*first[:-1], middle, *second[1:]]
        else:
            content = [*first, *second]
    return {**message, **more, "content": content}


def _check_tool_calls(messages: list[Any], text: str, where: str) -> None:
    """Refuse a tool call that the chat template leaves out: the model would learn to write nothing."""
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        name = call.get("function", call).get("name")
        if str(name) not in text:
            raise ValueError(
                f"{where}: the chat template does not render its tool call of {name!r}. Use a template for tools, or leave it out."
            )


def _without_padding(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that Arrow adds to all structs; tool calls, which may be JSON, keep a content of None."""
    found = {key: _unpadded(value) for key, value in message.items() if value is not None or key == "content"}
    calls = found.get("tool_calls")
    return {**found, "tool_calls": parse_json(calls, "'tool_calls'")} if isinstance(calls, str) else found


def _unpadded(value: Any) -> Any:
    """Remove keys with the value None on every level; None in lists stays.

    >>> _unpadded({"city": "Rome", "x": None, "tags": [None, {"a": None, "b": 0}]})
    {'city': 'Rome', 'tags': [None, {'b': 0}]}
    """
    return remove_none_values(value) if isinstance(value, (list, Mapping)) else value


def _turns(
    chat: _Chat, prompt: list[Any], completion: list[Any], prompt_text: str, labelled: Sequence[bool] | None = None
) -> list[Piece]:
    """Split a completion of several messages into pieces; the assistant's are labelled, or those of `labelled`."""
    pieces = []
    done = prompt_text

    @cache
    def rendered(upto: int, generation_prompt: bool = False) -> str:
        return chat.text(prompt + completion[:upto], add_generation_prompt=generation_prompt)

    def extend(labelled: bool, upto: int, generation_prompt: bool = False) -> None:
        nonlocal done
        text = rendered(upto, generation_prompt)
        if generation_prompt:  # as for the prompt: up to where the next turn differs
            text = os.path.commonprefix([text, rendered(upto + 1)])
        if not text.startswith(done):
            raise ValueError(
                f"{chat.where}: the chat template renders turns differently when others follow, so the turns of a completion of "
                "several messages cannot be separated. Keep only its last assistant message as the completion and put the others "
                "into the prompt."
            )
        pieces.append(Piece(text[len(done) :], labelled))
        done = text

    for index, message in enumerate(completion):
        by_assistant = message["role"] == "assistant"
        if by_assistant and index > 0:
            extend(labelled=False, upto=index, generation_prompt=True)
        extend(labelled=by_assistant if labelled is None else labelled[index], upto=index + 1)
    return pieces


def encode_with_prompt(
    prompt: str, completions: Sequence[list[Piece]], tokenize: Tokenize, end_of_turn: int | None, where: str = "a record"
) -> tuple[list[int], list[Completion]]:
    """Tokenize prompt and completion as one text, as TRL does without images: tokens may merge across the boundary.

    A piece on its own could get different tokens: SentencePiece puts a space before the beginning of a text.

    Args:
        prompt: the rendered prompt, with one placeholder per image.
        completions: the pieces of each completion.
        tokenize: a function from a text to its ids.
        end_of_turn: as in `label_turn`.
        where: the record's name in error messages.

    Returns:
        the longest common prefix of the tokenized prompt and all tokenized rows, and the completions after it.

    Raises:
        ValueError: for an empty prompt, since nothing would predict a completion's first token.
    """
    prompt_ids = tokenize(prompt)
    if not prompt_ids:
        raise ValueError(f"{where}: its prompt is empty. Give it a prompt of one token or more.")
    rows: list[tuple[list[int], list[int]]] = []
    for pieces in completions:
        texts = [prompt]
        for piece in pieces:
            texts.append(texts[-1] + piece.text)
        ids = tokenize(texts[-1])
        rows.append((ids, [common_prefix_length(tokenize(text), ids) for text in texts[:-1]] + [len(ids)]))
    length = min([len(prompt_ids), *(starts[0] for _, starts in rows)])
    if not length:  # no common prefix, so nothing would predict the first token: tokenize prompt and completions separately
        length = len(prompt_ids)
        rows = [_one_by_one(prompt_ids, pieces, tokenize) for pieces in completions]
    found = []
    for (ids, starts), pieces in zip(rows, completions, strict=True):
        loss_mask: list[bool] = []
        starts[0] = length
        for number, piece in enumerate(pieces):
            own = ids[max(starts[number], length + len(loss_mask)) : starts[number + 1]]
            loss_mask += label_turn(own, end_of_turn) if piece.labelled else [False] * len(own)
        found.append(_without_unlabelled_tail(Completion(ids[length:], loss_mask)))
    return prompt_ids[:length], found


def _one_by_one(prompt_ids: list[int], pieces: list[Piece], tokenize: Tokenize) -> tuple[list[int], list[int]]:
    """A row's ids, each piece tokenized on its own, and the offsets of the pieces and of the end."""
    ids, starts = list(prompt_ids), [len(prompt_ids)]
    for piece in pieces:
        ids += tokenize(piece.text)
        starts.append(len(ids))
    return ids, starts


def is_opened(rendered: Rendered, completion_end: str) -> bool:
    """Whether to add the tokenizer's special tokens (BOS) to a pair's text; for a conversation, the chat template writes them.

    TRL leaves them out for pairs with images, as does ``completion_end="template"``.
    """
    return not (rendered.conversational or (completion_end == "template" and rendered.images))


def with_eos(pieces: list[Piece], rendered: Rendered, eos: str | None, completion_end: str) -> list[Piece]:
    """Append eos to a plain-text completion, so that the model learns to stop. (TRL leaves it out for pairs with images.)"""
    if rendered.conversational or eos is None or not is_opened(rendered, completion_end) or pieces[-1].text.endswith(eos):
        return pieces
    return [*pieces[:-1], Piece(pieces[-1].text + eos, pieces[-1].labelled)]


def label_turn(ids: list[int], end_of_turn: int | None) -> list[bool]:
    """The loss mask of an assistant turn: all tokens up to and including its last end-of-turn token.

    >>> label_turn([5, 6, 2, 9], end_of_turn=2)  # 9 is the newline that the template puts after the turn
    [True, True, True, False]
    >>> label_turn([5, 6], end_of_turn=2)  # no such token: to the end
    [True, True]
    """
    if end_of_turn is None or end_of_turn not in ids:
        return [True] * len(ids)
    last = len(ids) - 1 - ids[::-1].index(end_of_turn)
    return [position <= last for position in range(len(ids))]


def _without_unlabelled_tail(completion: Completion) -> Completion:
    length = max((i + 1 for i, counts in enumerate(completion.loss_mask) if counts), default=0)
    return Completion(completion.ids[:length], completion.loss_mask[:length])


def end_of_turn_token(processing_class: Any) -> int | None:
    """The id of the token that ends an assistant turn: the first special token that the chat template puts after one.

    It is `<|im_end|>` for InternVL, also where the tokenizer's eos differs. Without a chat template, or when the template
    puts no special token there, the tokenizer's eos.

    Raises:
        ValueError: for a chat template that cannot render a conversation.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not getattr(processing_class, "chat_template", None):
        return _optional_int(tokenizer.eos_token_id)
    after = tokenizer(probe(processing_class).after, add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((int(token) for token in after if token in special), _optional_int(tokenizer.eos_token_id))


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def describe(record: Mapping[str, Any]) -> str:
    """The name of a record in errors: its id, or else the beginning of its prompt."""
    if record.get("id") is not None:
        return f"record {record['id']!r}"
    prompt = record.get("prompt") or record.get("messages") or ""
    prompt = str(prompt[:2] if isinstance(prompt, list) else prompt)
    return f"the record with prompt {prompt[:80]!r}" if prompt else "a record"
