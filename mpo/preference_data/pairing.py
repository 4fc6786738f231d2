"""Right and wrong answers to one question -> pairs."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mpo.preference_data.answers import parse_response
from mpo.preference_data.verify import is_correct

Negative = Literal["wrong_answer", "wrong_format"]
Verdict = Literal["correct", "wrong_answer", "wrong_format"]


@dataclass(frozen=True)
class JudgedResponse:
    """A response and what became of it.

    Attributes:
        text: the whole response.
        answer: its final answer; None when it has none in the expected form.
        verdict: `wrong_format` is a response without a final answer, whatever its reasoning says.
    """

    text: str
    answer: str | None
    verdict: Verdict


@dataclass(frozen=True)
class AnswerPair:
    """A better and a worse answer to the same question.

    Attributes:
        chosen: the whole right response.
        rejected: the whole wrong response.
        negative: what is wrong with it.
    """

    chosen: str
    rejected: str
    negative: Negative


def judge(response: str, ground_truth: str) -> JudgedResponse:
    """Compares a response's final answer with the ground truth."""
    parsed = parse_response(response)
    if parsed is None:
        return JudgedResponse(response, None, "wrong_format")
    return JudgedResponse(response, parsed.answer, "correct" if is_correct(parsed.answer, ground_truth) else "wrong_answer")


def pair_completions(responses: Iterable[JudgedResponse], *, max_pairs: int = 15, rng: random.Random) -> list[AnswerPair]:
    """Pairs every right response with every wrong one and keeps some at random.

    As in InternVL's reasoning data pipeline, a pair is left out when the right final answer is contained in the wrong one (`7` in
    `x = 7`): such an answer may be right but for its form. Repeated responses count once, and empty ones, which say nothing to
    learn from, not at all.

    Args:
        responses: the judged responses to one question.
        max_pairs: keep at most so many; 15 in MMPR.
        rng: picks them.

    Returns:
        The pairs, in the order of their responses. Empty when all responses are right, or all are wrong.

    Raises:
        ValueError: when `max_pairs` is below 1.
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs must be 1 or more, not {max_pairs}.")
    distinct = list({response.text: response for response in responses if response.text.strip()}.values())
    positives = [response for response in distinct if response.verdict == "correct"]
    negatives = [response for response in distinct if response.verdict != "correct"]
    pairs = [
        AnswerPair(positive.text, negative.text, "wrong_format" if negative.answer is None else "wrong_answer")
        for positive in positives
        for negative in negatives
        if not _contains(negative.answer, positive.answer)
    ]
    if len(pairs) <= max_pairs:
        return pairs
    return [pairs[index] for index in sorted(rng.sample(range(len(pairs)), max_pairs))]


def _contains(negative: str | None, positive: str | None) -> bool:
    assert positive is not None, "a response without a final answer was judged correct"
    return negative is not None and positive.lower() in negative.lower()
