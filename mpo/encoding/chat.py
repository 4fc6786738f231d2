"""What a chat template accepts, and the messages of a record as it renders them, with the completion in pieces, labelled or not."""

from __future__ import annotations

import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from jinja2 import TemplateError
from trl.data_utils import prepare_multimodal_messages

from mpo.data.messages import check_ends, is_empty, text_of, unpadded
from mpo.io import bad_record, parse_json

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


@dataclass(frozen=True)
class Piece:
    """A part of a completion's rendered text."""

    text: str
    labelled: bool


class Chat:
    """The conversation of a record, in the message format of its chat template.

    Attributes:
        prompt: its messages, without an empty assistant message at the end, which the completion replaces.
        continues: whether the prompt ends in an assistant message that the completion's first message continues.
    """

    def __init__(self, record: Mapping[str, Any], prompt: list[Any], images: list[Any], processing_class: Any, where: str) -> None:
        self.processing_class, self.where = processing_class, where
        tools = record.get("tools")
        with bad_record(where):
            tools = parse_json(tools, "'tools'") if isinstance(tools, str) else tools
        own = record.get("chat_template_kwargs") or {}
        for column, value, kind in (("tools", tools or [], list), ("chat_template_kwargs", own, Mapping)):
            if not isinstance(value, kind):
                raise ValueError(f"{where}: {column!r} must be {'a list' if kind is list else 'an object'}; got {value!r:.50}.")
        self._kwargs = {"tools": unpadded(tools) or None, **unpadded(own)}
        if getattr(processing_class, "chat_template", None) is None and "chat_template" not in self._kwargs:
            found = f"{where} is a conversation, and {type(processing_class).__name__} has no chat template"
            raise ValueError(f"{found}. Set its chat_template, or give prompt and completions as plain text.")
        self.prompt = self._as_taken(prompt, "prompt", images)
        if self.prompt and self.prompt[-1]["role"] == "assistant" and is_empty(self.prompt[-1]):
            self.prompt = self.prompt[:-1]
        if not self.prompt:
            raise ValueError(f"{where}: its prompt has no message. Give one to respond to, or leave the record out.")
        self.continues = self.prompt[-1]["role"] == "assistant" and not self.prompt[-1].get("tool_calls")

    def completed(self, completion: list[Any], side: str, images: Sequence[Any] = ()) -> tuple[list[Any], list[Any]]:
        """All messages including the completion's, and the prompt's messages before the completion's first turn."""
        completion = self._as_taken(completion, side, images)
        for place, message in enumerate(completion):
            if message["role"] == "assistant" and is_empty(message):
                raise ValueError(f"{self.where}: message {place + 1} of '{side}' is empty. Give it text or leave the record out.")
        check_ends(completion, f"{self.where}: '{side}'")
        if completion[0]["role"] != "assistant" or self.prompt[-1]["role"] != "assistant":
            return [*self.prompt, *completion], self.prompt
        if not self.continues:
            found = f"its prompt ends in a tool call, and '{side}' begins with a message of the assistant"
            raise ValueError(f"{self.where}: {found}. Put the tool's result between them.")
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
            found = "the chat template renders the prompt's last message differently before a completion, so this has no beginning"
            raise ValueError(f"{self.where}: {found}. Use a template that does not, or end the prompt in a user message.")

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
            found = f"{self.where} has images, but the chat template of {type(self.processing_class).__name__} accepts text only"
            raise ValueError(f"{found}. Use the one of the model's own checkpoint.")
        return messages if template.parts else [_as_text(message, f"{self.where}: '{side}'") for message in messages]


def _as_text(message: dict[str, Any], where: str) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if any(part.get("type") != "text" for part in content):
        raise ValueError(f"{where} has an image placeholder, but the chat template accepts text only.")
    return {**message, "content": text_of(message)}


def _joined(message: dict[str, Any], more: dict[str, Any], where: str) -> dict[str, Any]:
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


def check_tool_calls(messages: list[Any], text: str, where: str) -> None:
    """Refuse a tool call that the chat template leaves out: the model would learn to write nothing."""
    for call in (call for message in messages for call in message.get("tool_calls") or ()):
        name = call.get("function", call).get("name")
        if str(name) not in text:
            found = f"the chat template does not render its tool call of {name!r}"
            raise ValueError(f"{where}: {found}. Use a template for tools, or leave it out.")


def _without_padding(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without the keys that Arrow adds to all structs; tool calls, which may be JSON, keep a content of None."""
    found = {key: unpadded(value) for key, value in message.items() if value is not None or key == "content"}
    calls = found.get("tool_calls")
    return {**found, "tool_calls": parse_json(calls, "'tool_calls'")} if isinstance(calls, str) else found


def pieces_of_turns(
    chat: Chat, prompt: list[Any], completion: list[Any], prompt_text: str, labelled: Sequence[bool] | None = None
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
            found = "the chat template renders turns differently when others follow, so those of a completion cannot be separated"
            raise ValueError(f"{chat.where}: {found}. Put all but its last assistant message into the prompt.")
        pieces.append(Piece(text[len(done) :], labelled))
        done = text

    for index, message in enumerate(completion):
        by_assistant = message["role"] == "assistant"
        if by_assistant and index > 0:
            extend(labelled=False, upto=index, generation_prompt=True)
        extend(labelled=by_assistant if labelled is None else labelled[index], upto=index + 1)
    return pieces
