"""What a chat template can take, found by rendering a conversation of two messages with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MARKER = "\N{SNOWMAN}"
_PARTS_AS_TEXT = re.compile(rf"""['"]text['"]: ?['"]{MARKER}""")
"""What a template that takes strings makes of a list of parts: Python's or JSON's form of it."""


@dataclass(frozen=True)
class Template:
    """What a chat template takes.

    Attributes:
        parts: contents that are lists of typed parts.
        text: contents that are strings.
        needs_system: a conversation has to begin with a system message.
        after: the text that it puts after an assistant's content at the end of a conversation.
    """

    parts: bool
    text: bool
    needs_system: bool
    after: str


def is_processor(processing_class: Any) -> bool:
    """Whether it processes images too, rather than being a tokenizer alone."""
    return hasattr(processing_class, "tokenizer")


def probe(processing_class: Any) -> Template:
    """Find what the chat template of a tokenizer or processor takes.

    Raises:
        ValueError: for a template that renders neither form of contents, with what it said.
    """
    return _probe(processing_class, str(processing_class.chat_template))


@lru_cache(maxsize=16)
def _probe(processing_class: Any, template: str) -> Template:
    reason: Any = "the text of the assistant's message is not in what it renders"
    for needs_system in (False, True):
        after: dict[bool, str] = {}
        for parts in (False, True):
            roles = [*(["system"] if needs_system else []), "user", "assistant"]
            texts = [MARKER if role == "assistant" else "?" for role in roles]
            contents = [[{"type": "text", "text": text}] if parts else text for text in texts]
            chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
            try:
                text = processing_class.apply_chat_template(chat, tokenize=False)
            except Exception as error:  # of any kind: a template is a program
                reason = error
                continue
            if MARKER in text and not _PARTS_AS_TEXT.search(text):
                after[parts] = text[text.rindex(MARKER) + len(MARKER) :]
        if after:
            preferred = after[True] if True in after and (is_processor(processing_class) or False not in after) else after[False]
            return Template(True in after, False in after, needs_system, preferred)
    raise ValueError(
        f"The chat template of {type(processing_class).__name__} cannot render a message of the user and one of the assistant, "
        f"whose contents are strings or lists of parts: {reason}. Set chat_template to the one of the model's checkpoint."
    )
