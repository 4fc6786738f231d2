"""Find the message format that a chat template accepts, by rendering a conversation of two messages with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MARKER, ASKED = "\N{SNOWMAN}", "\N{UMBRELLA}"
_PARTS_AS_TEXT = re.compile(rf"""['"]text['"]: ?['"]{MARKER}""")
"""A list of parts as rendered by a template for strings: in Python's or JSON's form."""


@dataclass(frozen=True)
class Template:
    """The message format that a chat template accepts."""

    parts: bool  # whether contents may be lists of typed parts
    text: bool  # whether contents may be strings
    needs_system: bool  # whether a conversation has to begin with a system message
    after: str  # the text after the assistant's content at the end of a conversation
    asks: bool  # whether it renders what the user says; one for images and their captions does not


def is_processor(processing_class: Any) -> bool:
    """Whether it is a processor, which also processes images, and not a tokenizer."""
    return hasattr(processing_class, "tokenizer")


def check_processor(processing_class: Any) -> None:
    """Refuse a tokenizer for records with images."""
    if not is_processor(processing_class):
        raise ValueError(
            "The records have images, but the processing class is a tokenizer. Pass the model's processor "
            "(AutoProcessor.from_pretrained) as `processing_class`, or drop the image column."
        )


def probe(processing_class: Any) -> Template:
    """Find the message format that a chat template accepts; one that renders neither form of contents is a ValueError."""
    return _probe(processing_class, str(processing_class.chat_template))


@lru_cache(maxsize=16)
def _probe(processing_class: Any, template: str) -> Template:
    reason: Any = "the text of the assistant's message is missing from its output"
    for needs_system in (False, True):
        after: dict[bool, tuple[str, bool]] = {}
        for parts in (False, True):
            roles = [*(["system"] if needs_system else []), "user", "assistant"]
            texts = [{"assistant": MARKER, "user": ASKED}.get(role, "?") for role in roles]
            contents = [[{"type": "text", "text": text}] if parts else text for text in texts]
            chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            try:
                text = processing_class.apply_chat_template(chat, tokenize=False)
            except Exception as error:  # a template is a program and may raise anything
                reason = error
                continue
            if MARKER in text and not _PARTS_AS_TEXT.search(text):
                after[parts] = text[text.rindex(MARKER) + len(MARKER) :], ASKED in text
        if after:
            preferred = after[True] if True in after and (is_processor(processing_class) or False not in after) else after[False]
            return Template(True in after, False in after, needs_system, *preferred)
    raise ValueError(
        f"The chat template of {type(processing_class).__name__} cannot render a user message and an assistant message, neither "
        f"with strings nor with lists of parts as contents: {reason}. Set chat_template to the one of the model's checkpoint."
    )
