"""Read questions, with their known answers, one at a time."""

from __future__ import annotations

import json
import math
import os
import re
from array import array
from ast import literal_eval
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpo.data.fields import ROLES
from mpo.data.files import open_files
from mpo.data.ids import id_hash, refuse_repeated
from mpo.data.messages import checked_text
from mpo.data.records import PROMPTS, to_prompt
from mpo.data.unused import check_unused
from mpo.io import BadRecord, bad_record, json_kind
from mpo.schema import Question

ANSWERS = ("ground_truths", "ground_truth", "answers", "answer", "answer_gt")
CHOICES = ("choices", "options")
OTHERS = ("id", "system", "image", "images", "video", "videos", "kind", "unit", "tolerance", "source")
SELECTION = "choices"
"""The kind of a multiple-choice question with several right choices, all of which an answer names."""
WHOLE = ("list", "box", "interval", SELECTION)
"""Kinds whose answer is itself a list."""
LETTERS = tuple("ABCDEFGH")
"""Fields of benchmarks that hold a choice each."""
BAD = "bad"
"""Name in the metadata of a line that is no question: the reason."""


class Questions:
    """The questions of a file, read anew each time they are iterated over, so that they take no memory.

    Args:
        path: JSONL, JSON or Parquet, as in `mpo.data.files.open_files`.
        image_root: folder that image paths are relative to, and inside which they stay; None for that of the file.
        limit: the number of questions to read from the start; None for all.
        keep_bad: give a line that is no question, such as one whose image is gone, as a Question without messages, with the reason
            in its metadata (`BAD`), instead of raising.

    Raises:
        ValueError: for a missing file or one of another type. While iterating: BadRecord for a line that is no question, naming its
            place, and, at the end, for the first id that is there twice.
    """

    def __init__(
        self, path: str | Path, *, image_root: str | Path | None = None, limit: int | None = None, keep_bad: bool = False
    ) -> None:
        self.path, self.limit, self.keep_bad = os.path.abspath(path), limit, keep_bad
        self.image_root = Path(image_root if image_root is not None else os.path.dirname(self.path))
        open_files(self.path)

    def __iter__(self) -> Iterator[Question]:
        hashes = array("Q")
        for _, question in self._placed():
            hashes.append(id_hash(question.id))
            yield question
        refuse_repeated(hashes, ((where, question.id) for where, question in self._placed()))

    def _placed(self) -> Iterator[tuple[str, Question]]:
        read = 0
        for shard in open_files(self.path):
            for where, line in shard.lines():
                if read == self.limit:
                    return
                try:
                    if isinstance(line, BadRecord):
                        raise line
                    question = to_question(line, where=where, image_root=self.image_root)
                except BadRecord as error:
                    if not self.keep_bad:
                        raise
                    given = line.get("id") if isinstance(line, Mapping) else None
                    name = given if isinstance(given, str) and given else _place(where)
                    question = Question(messages=[], id=name, metadata={BAD: error.reason})
                yield where, question
                read += 1


def load_questions(path: str | Path, **settings: Any) -> Questions:
    """Open a file of questions; arguments and errors as in `Questions`.

    A line has ``question``, ``prompt``, ``messages`` or ``conversations`` (whose last turn of the assistant, beside an
    answer, becomes metadata: ``response``); optional are ``id`` (by default its place, ``FILE:LINE``), ``image`` or
    ``images``, ``video`` or ``videos``, ``system``, the known answers (``answer``, ``ground_truth``, or a list of several,
    each of which is right; where the kind is ``list``, ``box`` or ``interval``, a list is one answer, unless the field is
    called ``answers`` or ``ground_truths``; so do several different choices, whose kind is ``choices``: all of them are to be
    named), ``choices`` (a list, also as text, with or without their letters; ``options``; or fields ``A``, ``B``, ...), and
    ``kind``, ``unit``, ``tolerance`` and ``source`` as in `mpo.schema.Question`. Everything else is metadata; what may be
    something the model should see is refused (`mpo.data.unused`), outside of a field ``metadata``.
    """
    return Questions(path, **settings)


def to_question(line: Mapping[str, Any], *, where: str, image_root: Path) -> Question:
    """Convert a line to a question. Image paths are relative to `image_root`.

    Raises BadRecord for a line that is no question, and for a field that is not read and may be something the model should see.
    """
    with bad_record(where):
        prompt, answer, choices = (_only(line, names) for names in (PROMPTS, ANSWERS, CHOICES))
        if prompt is None:
            raise ValueError(f"expected a question; got the fields {', '.join(line) or 'none'}. Name it {' or '.join(PROMPTS)}.")
        line = _with_listed(line, prompt, answer, choices)
        choices = choices or ("choices" if line.get("choices") else None)
        metadata = {name: value for name, value in line.items() if name not in (*OTHERS, prompt, answer, choices)}
        nested = metadata.pop("metadata", None)
        asked = {name: value for name, value in line.items() if name in OTHERS[:6]}
        found = to_prompt({**asked, "prompt": line[prompt]}, where="", image_root=image_root)
        check_unused(metadata, {prompt: line[prompt]}, found["images"], advice="put it into 'metadata'")
        tolerance = line.get("tolerance")
        if tolerance is not None and (isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0):
            raise ValueError(f"'tolerance' is {tolerance!r:.50} instead of a number of 0 or more.")
        return Question(
            messages=found["prompt"],
            images=[one["path"] if one["bytes"] is None else one["bytes"] for one in found["images"]],
            videos=found.get("videos", ()),
            ground_truths=[text for text in _texts(line, answer) if text.strip()],
            kind=_text(line, "kind"),
            choices=_unlettered(_texts(line, choices)) or None,
            unit=_text(line, "unit"),
            tolerance=tolerance,
            id=found["id"] or _place(where),
            source=_text(line, "source") or "",
            metadata={**(nested if isinstance(nested, Mapping) else {} if nested is None else {"metadata": nested}), **metadata},
        )


def _with_listed(line: Mapping[str, Any], prompt: str, answer: str | None, choices: str | None) -> dict[str, Any]:
    """A line of a conversation as messages up to the turn that asks; fields A, B, ... and a list in a text as choices."""
    new = dict(line)
    listed = prompt in ("messages", "conversations") and isinstance(line[prompt], list)
    if listed and all(isinstance(turn, Mapping) for turn in line[prompt]):
        turns = [{**turn} for turn in line[prompt]]
        if any("from" in turn for turn in turns):
            turns = [{"role": ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")} for turn in turns]
        if answer is not None and len(turns) > 1 and turns[-1].get("role") == "assistant":
            new["metadata"] = {**(line.get("metadata") or {}), "response": turns.pop().get("content")}
        new[prompt] = turns
    given = [letter for letter in LETTERS if line.get(letter) not in (None, "")]
    if choices is None and len(given) > 1 and given == [*LETTERS[: len(given)]]:
        new = {name: value for name, value in new.items() if name not in LETTERS} | {"choices": [line[one] for one in given]}
    if choices is not None and isinstance(line[choices], str) and line[choices].lstrip()[:1] == "[":
        try:
            new[choices] = literal_eval(line[choices])
        except (ValueError, SyntaxError, RecursionError):
            raise ValueError(f"{choices!r} looks like a list but cannot be read as one: {line[choices]!r:.80}.") from None
    if choices is not None and not isinstance(new[choices], list):
        raise ValueError(f"{choices!r} has {json_kind(new[choices])} where a list is expected: {line[choices]!r:.80}.")
    if answer and not answer.endswith("s") and new.get("choices" if choices is None else choices):
        given = line[answer] if isinstance(line[answer], list) else re.split(r"\s*[,;，、；]\s*|\s+and\s+", str(line[answer]))
        texts = _unlettered([str(one) for one in new[choices or "choices"]])
        given = [*given[0]] if len(given) == 1 and re.fullmatch("A?B?C?D?E?F?G?H?", str(given[0])) else given  # "AC"
        letters = LETTERS[: len(texts)]
        named = [texts.index(one) if one in texts else letters.index(one) for one in map(str, given) if one in (*texts, *letters)]
        if len({*named}) == len(given) > 1 and str(line[answer]) not in texts and line.get("kind") in (None, "", SELECTION):
            return new | {"kind": SELECTION, answer: ", ".join(LETTERS[place] for place in sorted(named))}
    if answer and not answer.endswith("s") and line.get("kind") in WHOLE and isinstance(line[answer], list):
        new[answer] = json.dumps(line[answer], ensure_ascii=False)
    return new


def _unlettered(choices: list[str]) -> list[str]:
    """Choices without the letters that number all of them (``A. red``, ``(A) red``), which prompts and verdicts put there."""
    found = [re.fullmatch(rf"\s*[(（]?{chr(65 + at)}[.):：．、）]\s*(\S.*)", one, re.DOTALL) for at, one in enumerate(choices[:26])]
    return [one[1] for one in found if one] if len(choices) == len(found) > 1 and all(found) else choices


def _place(where: str) -> str:
    return f"{os.path.basename(where.rpartition(':')[0])}:{where.rpartition(':')[2]}"


def _only(line: Mapping[str, Any], names: Iterable[str]) -> str | None:
    found = [name for name in names if line.get(name) not in (None, "", [])]
    if len(found) > 1:
        raise ValueError(f"the line has both {found[0]!r} and {found[1]!r}. Keep one of them.")
    return found[0] if found else None


def _texts(line: Mapping[str, Any], name: str | None) -> list[str]:
    value = line.get(name) if name else None
    given = value if isinstance(value, list) else [] if value is None else [value]
    for one in given:
        if isinstance(one, bool) or not isinstance(one, str | int | float) or (isinstance(one, float) and not math.isfinite(one)):
            shown = one if isinstance(one, float) else json_kind(one)
            raise ValueError(f"{name!r} has {shown} where text or a number is expected.")
    return [checked_text(one if isinstance(one, str) else str(one), repr(name)) for one in given]


def _text(line: Mapping[str, Any], name: str) -> str | None:
    value = line.get(name)
    return None if value in (None, "") else checked_text(value, repr(name))
