"""What a person sees and edits of a line, each text with its paths in the line."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from mpo.data.conversations import CONVERSATIONS, PAIRS
from mpo.data.formats import FORMATS, detect
from mpo.io import BadRecord, parse_json

Path = tuple[str | int, ...]
"""Where a value stands in a line: keys and indices. A step into a text is one into the JSON that it holds."""
PROMPTS = ("question", "prompt", "conversations", "messages", "query")
TRUTHS = ("ground_truths", "ground_truth", "answers", "answer", "answer_gt")
OPTIONS = ("choices", "options", *"ABCDEFGH")
TYPES = ("kind", "type", "question_type", "instruction_type", "category", "task")
SOURCES = ("source", "ds_name", "origin_dataset", "benchmark")
FILES = ("image", "images", "img_path", "image_path", "video", "videos")
VERDICTS = ("correct", "wrong_answer", "wrong_format")
EDITED_TRUTH = {"mmpr": "answer_gt", "trl": "ground_truth", "question": "answer", "responses": "ground_truths"}
"""What a known answer is called where a record has none, by its format or kind."""
PLACEHOLDERS = re.compile("(<(image|video)>\n)+")


@dataclass
class Document:
    """A line as it is shown.

    Attributes:
        kind: ``pair``, ``conversation``, ``question``, ``responses`` (of a pipeline, with verdicts), ``answers`` (of an evaluation)
            or ``unknown``.
        turns: the prompt or the conversation: ``role`` and ``parts``, each a text with its ``paths``, an image or a video.
        completions: with ``name``, ``turns`` and ``details``.
        details: what else can be edited: ``name``, ``paths``, ``value`` (text, or a list of texts) and, for one of a few, ``of``.
        files: the values of its images, and of its videos, as in the line.
        about: what else the line holds.
    """

    kind: str
    id: str = ""
    turns: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    details: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, list[Any]] = field(default_factory=lambda: {"image": [], "video": []})
    about: dict[str, Any] = field(default_factory=dict)

    def texts(self) -> Iterator[dict[str, Any]]:
        """Everything that can be edited: texts and details."""
        for turn in (*self.turns, *(turn for one in self.completions for turn in one["turns"])):
            yield from (part for part in turn["parts"] if part.get("paths"))
        yield from self.details
        for one in self.completions:
            yield from one["details"]

    def key(self) -> str:
        """Identify the content: id, texts and names of files. Where files lie, and placeholders in front of texts, do not count."""
        names = [_name(one) for own in self.files.values() for one in own]
        texts = [[one["paths"], one["text"][len(front(one["text"])) :] if "text" in one else one["value"]] for one in self.texts()]
        content = [self.id, names, texts]
        return hashlib.blake2b(json.dumps(content, default=str).encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


@contextmanager
def shaped() -> Iterator[None]:
    """Raise BadRecord for a line whose fields have other types than those of a record."""
    try:
        yield
    except (TypeError, AttributeError, LookupError) as error:
        raise BadRecord("", f"a field has not the type that it has in a record ({error}).") from error


def kind_of(line: Mapping[str, Any]) -> str:
    """The kind of a line; see `Document`."""
    if isinstance(line.get("responses"), list) and all(isinstance(one, Mapping) and "text" in one for one in line["responses"]):
        return "responses"
    if isinstance(line.get("greedy"), list):
        return "answers"
    if any(line.get(name) for name in PAIRS) or _matches(FORMATS["rlhf_v"], line):
        return "pair"
    if any(line.get(name) for name in TRUTHS) and _prompt(line):
        return "question"
    if any(_matches(one, line) for one in CONVERSATIONS.values()) and _has_assistant(line):
        return "conversation"
    return "question" if _prompt(line) else "unknown"


def _matches(one: Any, line: Mapping[str, Any]) -> bool:
    try:
        return bool(one.matches(line))
    except ValueError:
        return False


def _prompt(line: Mapping[str, Any]) -> str | None:
    return next((name for name in PROMPTS if line.get(name) not in (None, "", [])), None)


def _has_assistant(line: Mapping[str, Any]) -> bool:
    turns = line.get("conversations") or line.get("messages") or ()
    said = [one.get("role", one.get("from")) for one in turns if isinstance(one, Mapping)] if isinstance(turns, list) else ()
    return (
        any(role in ("assistant", "gpt", "function_call", "tool_call") for role in said) or "completion" in line or "query" in line
    )


@shaped()
def read_line(line: Mapping[str, Any]) -> Document:
    """Read a line of any kind. What is in none of the known places is shown as `about`, or not at all."""
    kind = kind_of(line)
    found = Document(kind, "" if line.get("id") is None else str(line["id"]))
    name, used = kind, {"id", *FILES}
    prompt = _prompt(line)
    for system in ("system", "system_prompt"):
        if isinstance(line.get(system), str):
            found.turns += _turns(line[system], (system,), "system")
            used.add(system)
    if kind == "pair":
        name = _pair(line, found, used)
    elif kind == "responses":
        found.turns += _turns(line.get("messages"), ("messages",), "user")
        found.completions = [_response(one, ("responses", place), place) for place, one in enumerate(line["responses"])]
        used |= {"messages", "responses", "asked", "format"}
    elif kind == "answers":
        for mode in ("greedy", "sampled"):
            for place, one in enumerate(line.get(mode) or ()):
                found.completions.append(_response(one, (mode, place), len(found.completions), mode))
        used |= {"greedy", "sampled", "cluster", "classes", "ranks"}
    elif prompt is not None:
        for own in ("history", prompt, "completion", "response"):
            if own in line:
                found.turns += _turns(line[own], (own,), "assistant" if own in ("completion", "response") else "user")
                used.add(own)
    for kinds, names in (("image", FILES[:4]), ("video", FILES[4:])):
        given: Any = next((line[one] for one in names if line.get(one) not in (None, "", [])), [])
        found.files[kinds] = list(given) if isinstance(given, list | tuple) else [given]
    for one in (*TRUTHS, *OPTIONS, *TYPES):
        inner = line.get("metadata")
        path: Path = (one,) if line.get(one) is not None else ("metadata", one)
        value = line.get(one) if len(path) == 1 else inner.get(one) if isinstance(inner, Mapping) else None
        if one not in used and value is not None and (detail := _detail(one, value, path)):
            found.details.append(detail)
            used.add(one)
    truth = EDITED_TRUTH.get(name)
    if truth and not used & set(TRUTHS):
        found.details.append({"name": truth, "paths": [(truth,)], "value": [] if truth == "ground_truths" else ""})
    found.about = {one: value for one, value in line.items() if one not in used and value not in (None, "", [], {})}
    return found


def _pair(line: Mapping[str, Any], found: Document, used: set[str]) -> str:
    try:
        name = detect(line).NAME
    except ValueError:
        name = ""
    sides: dict[str, list[dict[str, Any]]] = {}
    if name == "vlfeedback":
        found.turns += _turns(line.get("prompt"), ("prompt",), "user")
        given = line.get("completions")
        columns = given if isinstance(given, Mapping) else None
        for place, text in enumerate(columns.get("response", ()) if columns else given or ()):
            path: Path = ("completions", "response", place) if columns else ("completions", place, "response")
            text = text if columns else text.get("response") if isinstance(text, Mapping) else None
            found.completions.append({"name": f"response {place + 1}", "turns": _turns(text, path, "assistant"), "details": []})
        used |= {"prompt"}
        return name
    if name == "swift":
        start = last_user(line)
        shared = _turns(line["messages"][:start], ("messages",), "user")
        found.turns += shared
        sides["chosen"] = _turns(line["messages"][start:], ("messages",), "assistant", start)
        other = line.get("rejected_messages")
        if isinstance(other, list) and not line.get("rejected_response"):
            _stand_twice(shared, _turns(other[:start], ("rejected_messages",), "user"))
            sides["rejected"] = _turns(other[start:], ("rejected_messages",), "assistant", start)
        else:
            sides["rejected"] = _turns(line.get("rejected_response"), ("rejected_response",), "assistant")
        used |= {"messages", "rejected_messages", "rejected_response"}
    else:
        base: Path = ("text",) if name == "rlhf_v" and isinstance(line.get("text"), str | Mapping) else ()
        prompt = "question" if base else _prompt(line)
        given = {side: at(line, (*base, side)) for side in ("chosen", "rejected")}
        sides = {side: _turns(value, (*base, side), "assistant") for side, value in given.items()}
        begins = _shared(*given.values())
        shared, other = (sides[side][:begins] for side in ("chosen", "rejected"))
        if shared:
            _stand_twice(shared, other)
            sides = {side: turns[begins:] for side, turns in sides.items()}
            if prompt == "prompt" and isinstance(line["prompt"], str):  # a prompt that the completions begin with
                _stand_twice(shared[-1:], _turns(line["prompt"], ("prompt",), "user"))
            found.turns += shared
        elif prompt is not None:
            found.turns += _turns(at(line, (*base, prompt)), (*base, prompt), "user")
        used |= {"text"} if base else {prompt or "", "chosen", "rejected"}
    used |= {"completions"}
    found.completions = [{"name": side, "turns": turns, "details": []} for side, turns in sides.items()]
    return name


def _shared(one: Any, other: Any) -> int:
    if not (isinstance(one, list) and isinstance(other, list)):
        return 0
    alike = [*takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False))]
    return max(0, min(len(alike), len(one) - 1, len(other) - 1))


def _stand_twice(turns: Sequence[Any], same: Sequence[Any]) -> None:
    for turn, other in zip(turns, same, strict=False):
        for part, again in zip(turn["parts"], other["parts"], strict=False):
            if part.get("paths") and part.get("text") == again.get("text"):
                part["paths"] += again["paths"]


def last_user(line: Mapping[str, Any]) -> int:
    """The place after the last turn of the user, where the completion begins; without one, the place of the last turn."""
    roles = [one.get("role") if isinstance(one, Mapping) else None for one in line["messages"]]
    return max((place + 1 for place, role in enumerate(roles) if role == "user"), default=max(0, len(roles) - 1))


def _response(one: Any, path: Path, place: int, mode: str = "") -> dict[str, Any]:
    one = one if isinstance(one, Mapping) else {"text": one}
    details = [{"name": "verdict", "paths": [(*path, "verdict")], "value": one.get("verdict") or "", "of": VERDICTS}]
    if mode:
        details = [{"name": "score", "paths": [(*path, "score")], "value": str(one.get("score", "")), "of": ("0.0", "1.0")}]
    about = {name: value for name, value in one.items() if name not in ("text", "verdict", "score") and value not in (None, "")}
    turns = _turns(one.get("text"), (*path, "text"), "assistant")
    return {"name": f"{mode or 'response'} {place + 1}", "turns": turns, "details": details, "about": about}


def _detail(name: str, value: Any, path: Path) -> dict[str, Any] | None:
    is_list = isinstance(value, list)
    if all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in (value if is_list else [value])):
        return {"name": name, "paths": [path], "value": [*map(str, value)] if is_list else str(value)}
    return None


def _turns(value: Any, path: Path, role: str, start: int = 0) -> list[dict[str, Any]]:
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "parts": [{"text": value, "paths": [path]}]}]
    if isinstance(value, Mapping):
        return [_message(value, path, role)]
    if not isinstance(value, Sequence):
        return [{"role": role, "parts": [{"text": str(value), "paths": []}]}]
    turns = []
    for place, one in enumerate(value, start):
        if isinstance(one, list):
            for at, text in enumerate(one[:2]):
                turns += _turns(text, (*path, place, at), ("user", "assistant")[at])
        else:
            turns.append(_message(one, (*path, place), role))
    return turns


def _message(one: Any, path: Path, role: str) -> dict[str, Any]:
    if not isinstance(one, Mapping):
        return {"role": role, "parts": [{"text": str(one), "paths": [path] if isinstance(one, str) else []}]}
    name = "content" if one.get("content") is not None or "value" not in one else "value"
    content, said = one.get(name), str(one.get("role", one.get("from", role)))
    parts: list[dict[str, Any]] = []
    for place, part in enumerate(content if isinstance(content, list) else () if content is None else [content]):
        own = (*path, name, place) if isinstance(content, list) else (*path, name)
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            parts.append({"file": str(part["type"])})
        elif isinstance(part, Mapping):
            parts.append({"text": str(part.get("text") or ""), "paths": [(*own, "text")]})
        else:
            parts.append({"text": str(part), "paths": [own] if isinstance(part, str) else []})
    if one.get("tool_calls"):
        parts.append({"text": json.dumps(one["tool_calls"], ensure_ascii=False, default=str), "paths": []})
    return {"role": {"human": "user", "gpt": "assistant"}.get(said, said), "parts": parts}


def front(text: str) -> str:
    """The placeholders in front of a text, which a file may leave out."""
    found = PLACEHOLDERS.match(text)
    return found[0] if found else ""


def _name(file: Any) -> str:
    given = (file.get("path") if file.get("bytes") is None else file["bytes"]) if isinstance(file, Mapping) else file
    if isinstance(given, bytes | bytearray):
        return hashlib.blake2b(given, digest_size=12).hexdigest()
    return str(given).replace("\\", "/").rpartition("/")[2]


def at(value: Any, path: Sequence[str | int]) -> Any:
    """The value at a path; None where there is nothing."""
    for step in path:
        value = parse_json(value, "the text") if isinstance(value, str) else value
        try:
            value = value[step]
        except (LookupError, TypeError):
            return None
    return value
