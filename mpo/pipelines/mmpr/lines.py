"""Turn questions and sampled responses into lines of an MMPR file."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from mpo.pipelines.mmpr.pairing import Negative, Verdict, judge, pair_completions


@dataclass
class PairingReport:
    """Counts of questions, responses and pairs.

    Attributes:
        questions: number of questions.
        responses: number of responses by verdict: `correct`, `wrong_answer`, `wrong_format`.
        all_right: questions with only correct responses, which give no pair.
        all_wrong: questions with only incorrect responses, which give no pair.
        paired: questions with at least one pair. Every pair of the remaining questions was excluded.
        pairs: number of pairs by the kind of their rejected response.
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
    """Judge sampled responses and pair correct with incorrect ones.

    Args:
        questions: lines `{"id", "image", "question", "ground_truth"}`.
        responses: for each question, in order, the full sampled responses.
        max_pairs: maximum number of pairs per question.
        seed: random seed of their selection, which does not depend on the other questions.

    Returns:
        Lines `{"id", "image", "question", "chosen", "rejected", "answer_gt", "rejected_meta"}` as in MMPR, and the counts.
        `rejected_meta` is the kind of the rejected response: wrong answer or wrong format.

    Raises:
        ValueError: when the numbers of questions and lists of responses differ.
    """
    if len(questions) != len(responses):
        raise ValueError(f"Expected one list of responses per question; got {len(questions)} questions and {len(responses)} lists.")
    lines: list[dict[str, Any]] = []
    report = PairingReport()
    for question, texts in zip(questions, responses, strict=True):
        judged = [judge(text, question["ground_truth"]) for text in texts]
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
                "answer_gt": question["ground_truth"],
                "rejected_meta": {"negative": pair.negative},
            }
            for number, pair in enumerate(pairs)
        ]
    return lines, report
