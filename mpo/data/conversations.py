"""Read the formats of conversations for supervised training, a class each, as `mpo.data.formats` does those of pairs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mpo.data import fields
from mpo.data.messages import check_ends
from mpo.data.unused import FLAGS
from mpo.io import json_kind, parse_json
from mpo.schema import unlabelled

CALLS = ("function_call", "tool_call")
"""Roles of turns that are calls of tools, as JSON: ShareGPT's and ms-swift's."""
ALL_ROLES = {**fields.ROLES, "tool_response": "tool", **dict.fromkeys(CALLS, "assistant")}
PAIRS = ("chosen", "rejected", "rejected_response", "rejected_messages", "completions")
"""Fields of preference records."""


class _Conversation(fields.Format):
    USES: tuple[str, ...] = (*fields.IMAGE, *fields.VIDEO, *fields.SYSTEM, "id", "tools", "metadata")

    def read(self, line: fields.Line) -> Iterator[fields.Found]:
        fields.refuse(line, ("audio", "audios", "objects", "loss_scale"), fields.CANNOT)
        fields.refuse(line, ["chat_template_kwargs"], fields.TRL_CANNOT)
        fields.refuse(line, ["clip"], "only whole videos can be read. Trim the video file and remove 'clip'")
        own = {name: line.get(name) for name in ("prompt_id", "source", "tools") if name in self.uses(line)}
        yield fields.read_common(line, messages=self.turns(line), **own)

    def turns(self, line: fields.Line) -> list[dict[str, Any]]:
        raise NotImplementedError


class _ShareGPT(_Conversation):
    """``conversations`` of ``{from, value}``: LLaVA's and ShareGPT's lines, and the annotations of InternVL and MMInstruct."""

    NAME = "sharegpt"
    NEEDS = "conversations, a list of turns with from (human, gpt, system, tool, function_call) and value; optional: image or video"
    USES = (*_Conversation.USES, "conversations")

    def matches(self, line: fields.Line) -> bool:
        return "conversations" in line

    def turns(self, line: fields.Line) -> list[dict[str, Any]]:
        return turns_of(line.get("conversations"), "'conversations'")


class _TRL(_Conversation):
    """TRL's ``messages``, or ``prompt`` and ``completion``, and saved rows of `mpo.data.load_conversations`."""

    NAME = "trl"
    NEEDS = "messages, or prompt and completion as text or messages; optional: images, videos, tools"
    _SIDES = ("prompt", "completion")

    def uses(self, line: fields.Line) -> tuple[str, ...]:
        return (*self.USES, "prompt_id", "source", *(["messages"] if self._is_whole(line) else self._SIDES))

    def matches(self, line: fields.Line) -> bool:
        return "messages" in line or all(name in line for name in self._SIDES)

    def turns(self, line: fields.Line) -> list[dict[str, Any]]:
        """Turns of the assistant in the prompt are not labelled, as in TRL."""
        if self._is_whole(line):
            fields.refuse(line, ["completion"], "the line has 'messages' too. Keep one of them, or say metadata=['completion']")
            return turns_of(line["messages"], "'messages'")
        asked, said = (line.get(name) for name in self._SIDES)
        texts = (("user", asked), ("assistant", said))
        whole = [[{"role": role, "content": side}] if isinstance(side, str) else side for role, side in texts]
        prompt, completion = (turns_of(side, repr(name)) for side, name in zip(whole, self._SIDES, strict=True))
        check_ends(completion, "'completion'")
        return [*unlabelled(prompt), *completion]

    @staticmethod
    def _is_whole(line: fields.Line) -> bool:
        return not fields.is_nothing(line.get("messages")) or not any(line.get(name) for name in _TRL._SIDES)


class _Swift(_TRL):
    """ms-swift's ``query``, ``response`` and ``history``; its messages are read as TRL's."""

    NAME = "swift"
    NEEDS = "query and response; optional: history (a list of [query, response]), system, images; or messages as in trl"
    _OWN = ("query", "response", "history")

    def uses(self, line: fields.Line) -> tuple[str, ...]:
        return (*self.USES, *self._OWN) if "query" in line else super().uses(line)

    def matches(self, line: fields.Line) -> bool:
        return "query" in line

    def turns(self, line: fields.Line) -> list[dict[str, Any]]:
        if "query" not in line:
            return super().turns(line)
        history = line.get("history") or []
        if not isinstance(history, list) or not all(isinstance(one, list) and len(one) == 2 for one in history):
            raise ValueError("'history' must be a list of lists, each of a query and its response.")
        rounds = [*history, [line["query"], line.get("response")]]
        return [{"role": role, "content": text} for one in rounds for role, text in zip(("user", "assistant"), one, strict=True)]


_SHAREGPT = _ShareGPT()
CONVERSATIONS: dict[str, fields.Format] = {one.NAME: one for one in (_SHAREGPT, _TRL(), _Swift())}
"""In the order of detection."""
CONVERSATIONS |= dict.fromkeys(("llava", "internvl", "mminstruct"), _SHAREGPT)


def turns_of(given: Any, name: str) -> list[dict[str, Any]]:
    """Convert turns of any format to messages, with calls of tools as ``tool_calls`` and the flag of each turn as ``train``.

    Their order and contents are checked later, as in all fields.
    """
    if not isinstance(given, list) or not given:
        raise ValueError(f"{name} must be a list of turns; got {'an empty one' if given == [] else json_kind(given)}.")
    messages: list[dict[str, Any]] = []
    after_call = False
    for place, turn in enumerate(given, start=1):
        what = f"turn {place}"
        message = fields.message_of(turn, what, ALL_ROLES)
        flags = {flag: value for flag in FLAGS if (value := message.pop(flag, None)) is not None}
        if wrong := next((flag for flag, value in flags.items() if value not in (0, 1)), None):
            raise ValueError(f"{wrong!r} of {what} is {flags[wrong]!r:.50} instead of true or false.")
        if len(set(map(bool, flags.values()))) > 1:
            raise ValueError(f"{what} has {' and '.join(map(repr, flags))} with different values. Keep one of them.")
        fields.refuse(message, ("loss_scale", "reasoning_content", "thinking"), fields.CANNOT)
        if any(flags.values()) and message["role"] != "assistant":
            raise ValueError(f"{what}, of role {message['role']!r}, has {next(iter(flags))!r}, but only the assistant is labelled.")
        if flags and message["role"] == "assistant":
            message["train"] = any(flags.values())
        is_call = fields.one_of(turn, "from", "role") in CALLS
        if is_call:
            content = message["content"]
            called = parse_json(content, what) if isinstance(content, str) else content
            calls = [{"type": "function", "function": call} for call in (called if isinstance(called, list) else [called])]
            message |= {"content": None, "tool_calls": json.dumps(calls, ensure_ascii=False)}
            before = messages[-1] if messages else {}
            if before.get("role") == "assistant" and (after_call or not before.get("tool_calls")):
                earlier = json.loads(before["tool_calls"]) if after_call else []  # of one turn, as templates write it
                before["tool_calls"] = json.dumps([*earlier, *calls], ensure_ascii=False)
                continue
        after_call = is_call
        messages.append(message)
    return messages
