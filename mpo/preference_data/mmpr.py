"""Questions and sampled responses -> lines of an MMPR file."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mpo.preference_data.pairing import Negative, Verdict, judge, pair_completions


@dataclass
class PairingReport:
    """What became of the questions.

    Attributes:
        questions: how many there were.
        responses: responses by verdict: `correct`, `wrong_answer`, `wrong_format`.
        all_right: questions without a wrong response, which give no pair.
        all_wrong: questions without a right response, which give no pair.
        paired: questions with at least one pair. The remaining ones had pairs, but all were left out.
        pairs: pairs by what is wrong with their rejected answer.
    """

    questions: int = 0
    responses: dict[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Verdict), 0))
    all_right: int = 0
    all_wrong: int = 0
    paired: int = 0
    pairs: dict[str, int] = field(default_factory=lambda: dict.fromkeys(get_args(Negative), 0))


def build_pairs(
    questions: Sequence[Mapping[str, Any]],
    responses: Sequence[Sequence[str]],
    *,
    max_pairs: int = 15,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], PairingReport]:
    """Judges sampled responses and pairs right with wrong ones.

    Args:
        questions: lines `{"id", "image", "question", "answer"}`; `answer` is the ground truth.
        responses: for each question, in order, the whole responses that were sampled.
        max_pairs: at most so many pairs per question.
        seed: of their choice. It does not depend on the other questions.

    Returns:
        Lines `{"id", "image", "question", "chosen", "rejected", "answer_gt", "rejected_meta"}` as in MMPR, and what became of the
        questions. `rejected_meta` tells negatives of wrong answer from those of wrong format.

    Raises:
        ValueError: when there are not as many lists of responses as questions.
    """
    if len(questions) != len(responses):
        raise ValueError(f"{len(questions)} questions, but responses for {len(responses)}: they must belong together one by one.")
    lines: list[dict[str, Any]] = []
    report = PairingReport()
    for question, texts in zip(questions, responses, strict=True):
        judged = [judge(text, question["answer"]) for text in texts]
        right = sum(response.verdict == "correct" for response in judged)
        pairs = pair_completions(judged, max_pairs=max_pairs, rng=random.Random(f"{seed}/{question['id']}"))
        report.questions += 1
        report.all_right += right == len(judged)
        report.all_wrong += right == 0
        report.paired += bool(pairs)
        for response in judged:
            report.responses[response.verdict] += 1
        for pair in pairs:
            report.pairs[pair.negative] += 1
        lines += [
            {
                "id": f"{question['id']}/{number}",
                "image": question["image"],
                "question": question["question"],
                "chosen": pair.chosen,
                "rejected": pair.rejected,
                "answer_gt": question["answer"],
                "rejected_meta": {"negative": pair.negative},
            }
            for number, pair in enumerate(pairs)
        ]
    return lines, report


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines beside the file and moves them into its place, so that it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    unfinished.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
