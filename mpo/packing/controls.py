"""Tokenizers' control tokens, such as <|im_end|> and <IMG_CONTEXT>, that are written out in a record's texts.

A tokenizer takes them there for the real ones. Those that stand for images are counted against the images, so a record that has
them in its texts cannot be put into a batch; others train the model to write them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SIDES = ("prompt", "chosen", "rejected")


def check_texts(pair: Mapping[str, Any], images: int, processing_class: Any, where: str) -> None:
    """Refuse a pair whose own texts hold a token that the processor puts in the place of an image or a video.

    Args:
        pair: ``prompt``, ``chosen`` and ``rejected``, as strings or messages. A prompt that is a string has no other way to say
            where its images stand, and may hold the image token once for each.
        images: how many the pair has.
        processing_class: a processor, or a tokenizer, which counts none.
        where: what errors call the pair.

    Raises:
        ValueError: naming the pair and the token.
    """
    if not hasattr(processing_class, "tokenizer"):
        return
    image, video = (getattr(processing_class, name, None) for name in ("image_token", "video_token"))
    for side in _SIDES:
        text = texts_of(pair[side])
        placed = images if side == "prompt" and isinstance(pair[side], str) else 0
        if image and text.count(image) > placed:
            _refuse(where, side, image)
        if video and side == "prompt" and images and video in text:  # completions, and prompts of text, are not searched for it
            _refuse(where, side, video)


def _refuse(where: str, side: str, token: str) -> None:
    raise ValueError(
        f"{where}: the text of '{side}' holds {token!r}, which the processor takes for the place of an image or video that is not "
        "there. Take it out of the text, or leave the record out."
    )


def texts_of(content: Any) -> str:
    r"""All that is text in a string or in messages, their tool calls included; texts that will stand side by side do here too.

    >>> texts_of([{"role": "user", "content": [{"type": "text", "text": "A "}, {"type": "text", "text": "cat?"}]}])
    'user\nA cat?\n'
    """
    return content if isinstance(content, str) else "".join(_texts(content))


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping) and content.get("type") == "text":
        yield str(content.get("text") or "")
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _texts(value)
            yield "\n"
    elif isinstance(content, (list, tuple)):
        for one in content:
            yield from _texts(one)


def control_tokens(processing_class: Any) -> list[str]:
    """A tokenizer's control tokens, as they would stand in a text; the longest first."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))


def added_start(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer puts in front of a text unasked, such as that of BOS; none for most."""
    with_added, alone = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if not alone:  # a vocabulary without this letter
        return list(with_added[:1]) if with_added[:1] == [tokenizer.bos_token_id] else []
    for place in range(len(with_added) - len(alone) + 1):
        if with_added[place : place + len(alone)] == alone:
            return list(with_added[:place])
    return []
