"""From one record to token ids: where the prompt ends, and which tokens of an answer are scored.

A record is a dict in one of TRL's preference formats: ``prompt``, ``chosen`` and ``rejected`` as plain strings or as lists of
messages; ``prompt`` may be missing when both answers repeat it; ``images`` (or ``image``) and ``videos`` are optional.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from torch import Tensor
from trl.data_utils import (
    apply_chat_template,
    common_prefix_length,
    extract_prompt,
    is_conversational,
    prepare_multimodal_messages,
)

from mpo.data.images import check_unmoved, open_picture
from mpo.data.video import Frame, open_frames, with_frames
from mpo.packing.controls import check_texts

Record = dict[str, Any]
Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Answer:
    """The tokens behind the prompt; ``scored[i]`` says whether token ``i`` belongs to what the assistant wrote."""

    ids: list[int]
    scored: list[bool]


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer's rendered text."""

    text: str
    scored: bool


@dataclass(frozen=True)
class RenderedPair:
    """A record as text. ``images`` holds the pictures that the prompt has placeholders for, in order."""

    prompt: str
    chosen: list[Piece]
    rejected: list[Piece]
    images: list[Any]
    conversational: bool


def record_images(record: Mapping[str, Any]) -> list[Any]:
    """The pictures of a record: ``images``, or the one ``image``, or none, and frames of its videos; opened (`mpo.data.images`).

    Arrays, tensors and None are left as they are.

    Raises:
        ValueError: for a picture that cannot be opened, naming the record.
    """
    name = describe(record)
    pictures = encoded_images(with_frames(record, where=name))
    places: dict[str, list[int]] = {}
    if record.get("prompt_id") is not None:  # of load_pairs, whose paths are the real ones; others may have links
        for path in {path for picture in pictures if (path := _file_of(picture)) is not None}:
            check_unmoved(path, name)
    for place, picture in enumerate(pictures):
        if isinstance(picture, Frame):
            places.setdefault(picture.path, []).append(place)
        elif picture is not None and not isinstance(picture, (np.ndarray, Tensor)):
            pictures[place] = open_picture(picture, where=f"{name}: picture {place + 1} of {len(pictures)}")
    for path, own in places.items():
        frames = open_frames(path, [pictures[place] for place in own], where=name)
        for place, frame in zip(own, frames, strict=True):
            pictures[place] = frame
    return pictures


def _file_of(picture: Any) -> str | None:
    """The path that a record's picture or frame is read from, if it is one."""
    if isinstance(picture, Mapping):
        return picture.get("path") if picture.get("bytes") is None else None
    return picture.path if isinstance(picture, Frame) else None


def encoded_images(record: Mapping[str, Any]) -> list[Any]:
    """The pictures of a record as they stand in it."""
    images = record.get("images")
    if images is None:
        images = record.get("image")
    if images is None:
        return []
    several = isinstance(images, Sequence) and not isinstance(images, (str, bytes))
    return list(images) if several else [images]


def render(record: Record, processing_class: Any, *, split_turns: bool = True) -> RenderedPair:
    """Render a record with the chat template of `processing_class`.

    Args:
        record: a preference record (see the head of this file); ``tools`` and ``chat_template_kwargs`` are passed on.
        processing_class: a tokenizer or processor with a chat template (not needed for plain-text records).
        split_turns: cut an answer of several messages into what the assistant wrote and the rest.

    Raises:
        ValueError: when ``chosen`` or ``rejected`` is missing or empty, both are the same, a picture is None or cannot be opened,
            the numbers of pictures and placeholders differ, or a text holds a picture's token (`mpo.packing.controls`).
    """
    for column in ("chosen", "rejected"):
        if record.get(column) is None:
            raise ValueError(
                f"{describe(record)} has no '{column}'. A preference record needs 'chosen' and 'rejected' "
                f"(and 'prompt' unless both answers repeat it); this one has {sorted(record)}."
            )
    _check_answers(record)
    record = with_frames(record, where=describe(record))
    images = record_images(record)
    for place, image in enumerate(images):
        if image is None:
            raise ValueError(f"{describe(record)}: picture {place + 1} of {len(images)} is None. Give the picture or leave it out.")
    pair = {key: record[key] for key in ("prompt", "chosen", "rejected") if record.get(key) is not None}
    if "prompt" not in pair:
        pair = extract_prompt(pair)
    check_texts(pair, len(images), processing_class, describe(record))
    if not is_conversational(pair):
        answers = {key: [Piece(pair[key], scored=True)] for key in ("chosen", "rejected")}
        return RenderedPair(pair["prompt"], answers["chosen"], answers["rejected"], images, conversational=False)

    if is_processor(processing_class):  # processors want message contents as lists of typed parts
        try:
            pair["prompt"] = prepare_multimodal_messages(pair["prompt"], images=images)
        except ValueError as error:
            raise ValueError(f"{describe(record)}: {error}") from error
        pair["chosen"] = prepare_multimodal_messages(pair["chosen"])
        pair["rejected"] = prepare_multimodal_messages(pair["rejected"])
    tools = record.get("tools")
    template_kwargs = {
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(record.get("chat_template_kwargs") or {}),
    }
    try:
        text = apply_chat_template(dict(pair), processing_class, **template_kwargs)
    except TemplateError as error:  # such as for roles in an order that it does not know
        raise ValueError(f"{describe(record)}: the chat template refuses its messages: {error}") from error

    def pieces(side: str) -> list[Piece]:
        if len(pair[side]) == 1 or not split_turns:
            return [Piece(text[side], scored=True)]
        return _turns(pair["prompt"], pair[side], text["prompt"], processing_class, template_kwargs, describe(record))

    return RenderedPair(text["prompt"], pieces("chosen"), pieces("rejected"), images, conversational=True)


def _check_answers(record: Mapping[str, Any]) -> None:
    for side in ("chosen", "rejected"):
        answer = record[side]
        last = answer[-1] if isinstance(answer, list) and answer else answer
        content = last.get("content") if isinstance(last, Mapping) else last
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content)
        calls = isinstance(last, Mapping) and last.get("tool_calls")
        if not calls and not (content or "").strip():
            raise ValueError(f"{describe(record)}: '{side}' is empty. Give the answer its text or leave the record out.")
    if record["chosen"] == record["rejected"]:
        raise ValueError(
            f"{describe(record)}: 'chosen' and 'rejected' are the same, so there is nothing to prefer. Leave the record out."
        )


def _turns(
    prompt: list[Any], answer: list[Any], prompt_text: str, processing_class: Any, kwargs: dict[str, Any], where: str
) -> list[Piece]:
    """Cut an answer of several messages into pieces; only what the assistant wrote is scored."""
    pieces = []
    done = prompt_text

    def extend(scored: bool, upto: int, generation_prompt: bool) -> None:
        nonlocal done
        text = processing_class.apply_chat_template(
            prompt + answer[:upto], tokenize=False, add_generation_prompt=generation_prompt, **kwargs
        )
        if not text.startswith(done):
            raise ValueError(
                f"{where}: the chat template renders earlier turns differently once later ones follow, so the turns of "
                "an answer of several messages cannot be told apart. Keep only its last assistant message as the "
                "answer and put the others into the prompt."
            )
        pieces.append(Piece(text[len(done) :], scored))
        done = text

    for index, message in enumerate(answer):
        by_assistant = message["role"] == "assistant"
        if by_assistant and index > 0:
            extend(scored=False, upto=index, generation_prompt=True)
        extend(scored=by_assistant, upto=index + 1, generation_prompt=False)
    return pieces


def encode_answer(pieces: list[Piece], tokenize: Tokenize, end_of_turn: int | None) -> Answer:
    """Tokenise an answer on its own, piece by piece, and mark the tokens to score (see `mark_turn`)."""
    ids: list[int] = []
    scored: list[bool] = []
    for piece in pieces:
        piece_ids = tokenize(piece.text)
        ids += piece_ids
        scored += mark_turn(piece_ids, end_of_turn) if piece.scored else [False] * len(piece_ids)
    return _without_unscored_tail(Answer(ids, scored))


def encode_with_prompt(
    prompt: str, answers: Sequence[list[Piece]], tokenize: Tokenize, end_of_turn: int | None
) -> tuple[list[int], list[Answer]]:
    """Tokenise prompt and answer as one text, as TRL does without pictures: tokens may merge across the boundary.

    Returns:
        the prompt's ids up to where the tokenised prompt and all tokenised rows agree, and the answers behind them.
    """
    prompt_ids = tokenize(prompt)
    rows: list[tuple[list[int], list[bool] | None]] = []
    for pieces in answers:
        if len(pieces) == 1:
            rows.append((tokenize(prompt + pieces[0].text), None))
        else:
            answer = encode_answer(pieces, tokenize, end_of_turn)
            rows.append((prompt_ids + answer.ids, [False] * len(prompt_ids) + answer.scored))
    length = min(common_prefix_length(prompt_ids, ids) for ids, _ in rows)
    return prompt_ids[:length], [
        _without_unscored_tail(Answer(ids[length:], mark_turn(ids[length:], end_of_turn) if scored is None else scored[length:]))
        for ids, scored in rows
    ]


def mark_turn(ids: list[int], end_of_turn: int | None) -> list[bool]:
    """Which tokens of an assistant turn are scored: all up to and including its last end-of-turn token.

    >>> mark_turn([5, 6, 2, 9], end_of_turn=2)  # 9 is the newline that the template puts behind the turn
    [True, True, True, False]
    >>> mark_turn([5, 6], end_of_turn=2)  # no such token: to the end
    [True, True]
    """
    if end_of_turn is None or end_of_turn not in ids:
        return [True] * len(ids)
    last = len(ids) - 1 - ids[::-1].index(end_of_turn)
    return [position <= last for position in range(len(ids))]


def _without_unscored_tail(answer: Answer) -> Answer:
    length = max((i + 1 for i, scored in enumerate(answer.scored) if scored), default=0)
    return Answer(answer.ids[:length], answer.scored[:length])


def is_processor(processing_class: Any) -> bool:
    """Whether it processes pictures too, rather than being a tokenizer alone."""
    return hasattr(processing_class, "tokenizer")


def end_of_turn_token(processing_class: Any) -> int | None:
    """The id of the token that ends an assistant turn: the first special token the chat template puts behind one.

    It is `<|im_end|>` for InternVL, also where the tokenizer's eos differs. Without a chat template, or when the template
    puts no special token there, the tokenizer's eos.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not getattr(processing_class, "chat_template", None):
        return _optional_int(tokenizer.eos_token_id)
    marker = "\N{SNOWMAN}"
    question, answer = [{"role": "user", "content": "?"}], [{"role": "assistant", "content": marker}]
    if is_processor(processing_class):
        question, answer = prepare_multimodal_messages(question), prepare_multimodal_messages(answer)
    text = processing_class.apply_chat_template(question + answer, tokenize=False)
    behind = tokenizer(text[text.rindex(marker) + 1 :], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((int(token) for token in behind if token in special), _optional_int(tokenizer.eos_token_id))


def _optional_int(value: Any) -> int | None:
    return None if value is None else int(value)


def describe(record: Mapping[str, Any]) -> str:
    """How errors call a record: by its id, or else by the start of its prompt."""
    if record.get("id") is not None:
        return f"record {record['id']!r}"
    prompt = str(record.get("prompt", ""))
    return f"the record with prompt {prompt[:80]!r}" if prompt else "a record"
