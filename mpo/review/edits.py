"""The line that a person's edits, and a swap of the completions, make of a line."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from mpo.data.formats import FORMATS, detect
from mpo.io import BadRecord, json_kind, parse_json
from mpo.review.documents import VERDICTS, at, front, kind_of, last_user, read_line, shaped


class Stale(ValueError):
    """A decision that was made about another content of a record."""


def put(value: Any, path: Sequence[str | int], new: Any) -> Any:
    """Return a value, changed in place where it can be, with another one at a path."""
    if not path:
        return new
    if isinstance(value, str):
        return json.dumps(put(parse_json(value, "the text"), path, new), ensure_ascii=False)
    value[path[0]] = put(at(value, path[:1]), path[1:], new)
    return value


@shaped()
def corrected(line: Mapping[str, Any], action: str, edits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The line that edits (``paths``, the ``old`` value there, the new ``value``) make of a line, and then ``swap``.

    A swap exchanges all that is said of the chosen and of the rejected completion, and drops ``margin``, by how much the one was
    said to be better. Raises Stale for another value than the old one.
    """
    from mpo.pipelines.mmpr.verify import BY_PERSON  # its imports take a second

    new: dict[str, Any] = _copy(line)
    for edit in edits:
        for path in edit["paths"]:
            found, value = at(new, path), edit["value"]
            before = front(found) if isinstance(found, str) and isinstance(edit["old"], str) and found != edit["old"] else ""
            if before and found == before + edit["old"]:
                value = before + value
            elif found != edit["old"]:
                raise Stale(f"{'/'.join(map(str, path))} is {found!r:.60} and was {edit['old']!r:.60} when it was edited.")
            put(new, path, value)
            if path[-1] == "verdict":
                put(new, [*path[:-1], "answer"], at(new, [*path[:-1], "answer"]))  # pairs are told by it
                put(new, [*path[:-1], "method"], BY_PERSON)
    judged = new.get("responses")
    if "accuracy" in new and isinstance(judged, list) and judged:
        new["accuracy"] = sum(one.get("verdict") == "correct" for one in judged) / len(judged)
    return _swapped(new) if action == "swap" else new


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copy(one) for name, one in value.items()}
    return [_copy(one) for one in value] if isinstance(value, list | tuple) else value


def _swapped(new: dict[str, Any]) -> dict[str, Any]:
    name = detect(new).NAME if kind_of(new) == "pair" else ""
    if name in ("", "vlfeedback"):
        raise ValueError("only a chosen and a rejected completion can be swapped. Edit the record, or reject it.")
    if name == "swift":
        start = last_user(new)
        if new.get("rejected_response") not in (None, "", []):
            tail, other = new["messages"][start:], new["rejected_response"]
            single = isinstance(other, str) and len(tail) == 1 and isinstance(tail[0].get("content"), str)
            new["rejected_response"] = tail[0]["content"] if single else tail
            other = {"role": "assistant", "content": other} if isinstance(other, str) else other
            new["messages"][start:] = [other] if isinstance(other, Mapping) else other
        else:
            new["messages"], new["rejected_messages"] = new["rejected_messages"], new["messages"]
    new = _turned(new, FORMATS[name].USES)
    for own in ("text", "metadata") if name == "rlhf_v" else ("metadata",):
        with suppress(ValueError):  # a text that holds no JSON
            given = new.get(own)
            inner = parse_json(given, own) if isinstance(given, str) else given
            if isinstance(inner, dict) and (turned := _turned(inner)) != inner:
                new[own] = json.dumps(turned, ensure_ascii=False) if isinstance(given, str) else turned
    metas: Any = [new.get(f"{side}_meta") for side in ("chosen", "rejected")]
    if all(isinstance(one, dict) for one in metas) and "negative" in metas[0]:  # it says why a completion is the rejected one
        metas[1]["negative"] = metas[0].pop("negative")
    new.pop("margin", None)
    return new


def _turned(own: Mapping[str, Any], kept: Sequence[str] = ()) -> dict[str, Any]:
    """Let what is said of one completion be said of the other; a name for one side alone turns, but for those `kept`."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    names = {name: re.sub("chosen|rejected", lambda found: sides[found[0]], name) for name in own}
    return {name if names[name] in own or name in kept else names[name]: own.get(names[name], value) for name, value in own.items()}


def new_value(old: Any, given: Any) -> Any:
    """What is put in the place of a value for what a person wrote: a number stays one where it can.

    Raises:
        ValueError: for anything but text, or a list of texts for a list.
    """
    if isinstance(old, list) or (old is None and isinstance(given, list)):
        if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
            raise ValueError(f"expected a list of texts, got {json_kind(given)}.")
        kept = {str(one): one for one in old or () if not isinstance(one, str)}
        return [kept.get(one, one) for one in given]
    if not isinstance(given, str):
        raise ValueError(f"expected text, got {json_kind(given)}.")
    if given.encode("utf-8", "replace") != given.encode("utf-8", "surrogatepass"):
        raise ValueError("the text has half of a character (a lone surrogate). Write it again.")
    if isinstance(old, int | float) and not isinstance(old, bool):
        try:
            found = parse_json(given, "the number")
        except BadRecord:
            return given
        return found if isinstance(found, int | float) and not isinstance(found, bool) else given
    return given


def refused(line: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """Why a corrected line cannot be read as what it was, if the line itself could be; files are not looked for."""
    found = [_reason(one) for one in (line, new)]
    return found[1] if found[1] != found[0] else None


def _reason(line: Mapping[str, Any]) -> str | None:
    from mpo.data.records import to_records

    kind = kind_of(line)
    if kind in ("pair", "conversation"):
        try:
            to_records(line, where="", find=lambda path, _: path, kind=kind)
        except BadRecord as error:
            return error.reason
        return None
    texts = [one for one in read_line(line).turns if any(part.get("text", "").strip() for part in one["parts"])]
    if kind == "question" and not texts:
        return "a question needs a text."
    if kind == "responses" and any(one.get("verdict") not in (None, *VERDICTS) for one in line["responses"]):
        return f"a verdict is one of {', '.join(VERDICTS)}."
    return None
