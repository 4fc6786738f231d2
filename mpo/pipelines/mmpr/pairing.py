"""Judge the responses to one question and pair correct with incorrect ones."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mpo.pipelines.mmpr.strict_format import parse_response
from mpo.verification import match

Negative = Literal["wrong_answer", "wrong_format"]
Verdict = Literal["correct", "wrong_answer", "wrong_format"]


@dataclass(frozen=True)
class JudgedResponse:
    """A response and its verdict.

    Attributes:
        text: the full response.
        answer: its final answer; None when it has none in the expected format.
        verdict: `wrong_format` for a response without a final answer, whatever its reasoning.
    """

    text: str
    answer: str | None
    verdict: Verdict


@dataclass(frozen=True)
class CompletionPair:
    """A chosen and a rejected completion for the same question.

    Attributes:
        chosen: the full correct response.
        rejected: the full incorrect response.
        negative: the kind of the rejected response.
    """

    chosen: str
    rejected: str
    negative: Negative


def judge(response: str, ground_truth: str) -> JudgedResponse:
    """Compare a response's final answer with the ground truth."""
    parsed = parse_response(response)
    if parsed is None:
        return JudgedResponse(response, None, "wrong_format")
    return JudgedResponse(response, parsed.answer, "correct" if match(parsed.answer, ground_truth).correct else "wrong_answer")


def pair_completions(responses: Iterable[JudgedResponse], *, max_pairs: int = 15, rng: random.Random) -> list[CompletionPair]:
    """Pair every correct response with every incorrect one, and keep at most `max_pairs` at random.

    As in InternVL's reasoning data pipeline, a pair is excluded when the correct final answer is contained in the incorrect one
    (`7` in `7 or 8`), because the two may differ only in format. Repeated responses count once; empty ones are ignored.

    Args:
        responses: the judged responses to one question.
        max_pairs: maximum number of pairs; 15 in MMPR.
        rng: random generator that selects them.

    Returns:
        The pairs, in the order of their responses. Empty when all responses are correct, or all are incorrect.

    Raises:
        ValueError: when `max_pairs` is below 1.
    """
    if max_pairs < 1:
        raise ValueError(f"max_pairs must be 1 or more; got max_pairs={max_pairs}.")
    distinct = list({response.text: response for response in responses if response.text.strip()}.values())
    positives = [response for response in distinct if response.verdict == "correct"]
    negatives = [response for response in distinct if response.verdict != "correct"]
    pairs = [
        CompletionPair(positive.text, negative.text, "wrong_format" if negative.answer is None else "wrong_answer")
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
