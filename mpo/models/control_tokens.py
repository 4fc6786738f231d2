"""Find tokenizers' control tokens, such as <|im_end|> and <IMG_CONTEXT>, in the text of a record.

A tokenizer encodes them as control tokens. Image placeholders have to match the number of images, so a record with one in its
text cannot be collated; other control tokens train the model to write them.
"""

from collections.abc import Iterator, Mapping
from typing import Any


def check_texts(texts: Mapping[str, Any], images: int, processing_class: Any, where: str) -> None:
    """Refuse a record, `where`, whose text contains a placeholder of the processor for an image or a video.

    `texts`: ``prompt`` and the completions by their names, as strings or messages. A prompt that is a string places its `images`
    with the image token, and may contain it once per image. A tokenizer has no placeholders.
    """
    if not hasattr(processing_class, "tokenizer"):
        return
    image, video = (getattr(processing_class, name, None) for name in ("image_token", "video_token"))
    for side, content in texts.items():
        text = texts_of(content)
        placed = images if side == "prompt" and isinstance(content, str) else 0
        refused = [image] if image and text.count(image) > placed else []
        if video and side == "prompt" and images and video in text:  # not replaced in completions and in prompts without images
            refused.append(video)
        if refused:
            raise ValueError(
                f"{where}: the text of '{side}' holds {refused[0]!r}, which the processor reads as the placeholder of an image or "
                "video that the record does not have. Remove it from the text, or leave the record out."
            )


def texts_of(content: Any) -> str:
    r"""All text of a string or of messages, with their tool calls; adjacent texts stay adjacent.

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
    """A tokenizer's control tokens as text, the longest first."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=lambda token: (-len(token), token))


def added_start(tokenizer: Any) -> list[int]:
    """The ids that a tokenizer adds before a text by default, such as BOS; empty for most."""
    with_added, alone = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    if not alone:  # a vocabulary without this letter
        return list(with_added[:1]) if with_added[:1] == [tokenizer.bos_token_id] else []
    for place in range(len(with_added) - len(alone) + 1):
        if with_added[place : place + len(alone)] == alone:
            return list(with_added[:place])
    return []


def added_text(tokenizer: Any) -> str:
    """The text of the tokens of `added_start`."""
    return "".join(tokenizer.convert_ids_to_tokens(added_start(tokenizer)))
