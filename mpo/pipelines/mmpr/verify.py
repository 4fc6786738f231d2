"""Judge sampled responses by the known answer: right, wrong, or without an answer in the format that was asked for."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpo import verification
from mpo.data.questions import LETTERS, SELECTION
from mpo.generation.generator import Response
from mpo.io import atomic_write, did_you_mean, json_line
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.step import Record, Step, question_of
from mpo.schema import Question
from mpo.verification import final_answer, verify
from mpo.verification.dress import boxed
from mpo.verification.matching import check_rules, match

FORMATS = ("line", "boxed", "any")
TRIGGERS = ("Final answer:", "Final Answer:", "答案:", "答案：")
"""The phrases that introduce the final answer in the format ``line``."""
BY_PERSON = "review"
"""The ``method`` of a verdict that a person gave, which is kept."""
SHORTEST = 20
"""A response of so many characters or fewer has no rationale before its box."""


@dataclass(frozen=True)
class Judged:
    """``correct``, ``wrong_answer`` or ``wrong_format``; the final answer, None without one in the format; and how and why."""

    verdict: str
    answer: str | None
    method: str
    reason: str


def line_answer(response: str) -> str | None:
    r"""The final answer of a response that ends in a line `Final answer: ...`; None of one in another format.

    The rules are those of the `en` prompt in InternVL's reasoning data pipeline (`utils/accuracy_reward.py`): one trigger, once or
    twice (the last one counts); at least two line breaks; reasoning before the trigger; one line after it.

    >>> line_answer("The digits are 3 4\n3 + 4 = 7\nFinal answer: 7"), line_answer("7")
    ('7', None)
    """
    trigger = next((trigger for trigger in TRIGGERS if trigger in response), None)
    if trigger is None or response.count(trigger) > 2 or response.count("\n") < 2:
        return None
    rationale, answer = (part.strip() for part in response.rsplit(trigger, maxsplit=1))
    return answer if rationale and answer and "\n" not in answer else None


def judge(response: str, question: Question, format: str = "line") -> Judged:
    r"""Judge a response.

    Args:
        response: its full text.
        question: the question, with its ground truths and what else is known of its answer.
        format: ``line``: as `line_answer`; ``boxed``: a ``\boxed{}`` after any thoughts; ``any``: any other, too.

    Raises:
        ValueError: as `mpo.verification.verify`.

    >>> judge("I see 3 4\n3 + 4 = 7\nFinal answer: 7", Question([], ground_truths=["7"])).verdict
    'correct'
    """
    said = response
    if format == "any":
        answer = final_answer(response, question).answer
    elif format == "line":
        answer = line_answer(response)
        said = f"Final answer: {answer}"
    else:
        _, closed, rest = response.rpartition("</think>")
        boxes = boxed(rest) if (closed or "<think>" not in rest) and len(response) > SHORTEST else []
        answer = boxes[-1][2].strip() or None if boxes else None
        said = f"\\boxed{{{answer}}}"
    if answer is None and format != "any":
        return Judged("wrong_format", None, "none", f"no answer in the format {format!r}")
    found = verify(said, question)
    verdict = "correct" if found.correct else "wrong_answer" if answer is not None else "wrong_format"
    return Judged(verdict, answer, found.method, found.reason)


def unanswerable(question: Question) -> str:
    """Why no response to a question can be judged; "" if it can."""
    choices = question.choices or ()
    try:
        check_rules(question.kind, question.choices, question.tolerance)
    except ValueError as error:
        return str(error)
    named = {*question.ground_truths} & {*choices, *LETTERS[: len(choices)]}
    if not choices or question.kind not in (None, "choice", SELECTION) or named:
        return ""
    if any(
        match(truth if question.kind == SELECTION else one, truth, question.kind, choices=choices).correct
        for truth in question.ground_truths
        for one in choices
    ):
        return ""
    return f"its ground truth {question.ground_truths[0]!r:.50} is none of its {len(choices)} choices. Give a letter, or its text."


class Verify(Step):
    """Give each of a question's ``responses`` a ``verdict``, ``answer``, ``method``, ``reason``, and the question its ``accuracy``.

    Args:
        format: as in `judge`; None for that of the prompt.
        kind: the kind of answer of all questions (`mpo.verification`); None for their own.
        tolerance: that of all questions; None for their own.

    Raises:
        ValueError: for an unknown format or kind, or an impossible tolerance.
    """

    verb, measure = "verify", "accuracy"

    def __init__(self, *, format: str | None = None, kind: str | None = None, tolerance: float | None = None) -> None:
        if format is not None and format not in FORMATS:
            raise ValueError(f"Expected the format to be {', '.join(FORMATS)}; got {format!r}.{did_you_mean(format, FORMATS)}")
        check_rules(kind, None, tolerance)
        self.format, self.kind, self.tolerance = format, kind, tolerance

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:
        """The question with its verdicts."""
        return with_verdicts(record, self.verdicts(record))

    def verdicts(self, record: Record) -> list[Judged]:
        """The verdict of each response. Raises ValueError for a question without a ground truth, or without responses."""
        if not record.get("ground_truths"):
            raise ValueError("it has no ground truth. Add its answer, or take the open route (mpo mmpr continue).")
        if not record.get("responses"):
            raise ValueError("it has no responses. Sample some (mpo mmpr sample).")
        own: dict[str, Any] = {name: value for name in ("kind", "tolerance") if (value := getattr(self, name)) is not None}
        question, format = replace(question_of(record), **own), self.format or record.get("format", "any")
        by_person = (Judged(*(one.get(part.name) for part in fields(Judged))) for one in record["responses"])
        return [
            kept if kept.method == BY_PERSON else judge(one["text"], question, format)
            for kept, one in zip(by_person, record["responses"], strict=True)
        ]


def with_verdicts(record: Record, verdicts: Sequence[Judged]) -> Record:
    """A question whose responses have their verdicts, with its accuracy."""
    judged = [{**one, **vars(verdict)} for one, verdict in zip(record["responses"], verdicts, strict=True)]
    return {**record, "responses": judged, "accuracy": sum(one.verdict == "correct" for one in verdicts) / len(verdicts)}


def verified(records: Iterable[Record], verify: Verify, path: Path) -> Iterator[tuple[Record, str]]:
    """Verify records, whose verdicts are kept in a file: under the same rules only records that are new or changed are judged.

    Yields each record with its verdicts, and ""; or as it is, and why it cannot be judged.
    """
    code = b"".join(one.read_bytes() for one in sorted(Path(verification.__file__).parent.glob("*.py")))
    rules = json_line({"rules": verify.settings(), "code": content_hash(code)}).encode()
    with ExitStack() as stack, open(path, "a+b") as file:
        file.seek(0)
        if file.readline() != rules:
            file.truncate(0)
            file.write(rules)
        changed = None  # a file in place of this one, from the first record that has changed
        for record in records:
            key, place, line = content_hash(json_line(record).encode()), file.tell(), file.readline()
            try:
                kept, found = json.loads(line) if line.endswith(b"\n") else ("", [])
            except ValueError:
                kept = ""
            if kept != key:
                try:
                    found = [astuple(one) for one in verify.verdicts(record)]
                except ValueError as error:
                    found = str(error)
                if line and changed is None:
                    changed = stack.enter_context(atomic_write(path, "wb"))
                    file.seek(0)
                    changed.write(file.read(place))
                    file.readline()
                line = json_line([key, found]).encode()
                if changed is None:
                    file.write(line)
            if changed is not None:
                changed.write(line)
            yield (record, found) if isinstance(found, str) else (with_verdicts(record, [Judged(*one) for one in found]), "")
