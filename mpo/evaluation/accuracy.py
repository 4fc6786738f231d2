"""Accuracy of responses that reason before their final answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpo.evaluation.statistics import wilson_interval
from mpo.generation.generator import Generator, Request
from mpo.schema import Question
from mpo.verification import verify


@dataclass(frozen=True)
class Accuracy:
    """The full response to each question, whether it is correct, and how many are `unparsable`: incorrect for want of an answer."""

    responses: list[str]
    correct: list[bool]
    unparsable: int

    @property
    def share(self) -> float:
        """The fraction of correct responses, 0 to 1."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of `share`."""
        return wilson_interval(sum(self.correct), len(self.correct))


def measure_accuracy(
    generator: Generator, questions: Sequence[Request], ground_truths: Sequence[str], *, max_new_tokens: int = 1024
) -> Accuracy:
    """Respond to questions greedily and compare the final answers with the ground truth.

    Args:
        generator: the model.
        questions: the questions; at least one.
        ground_truths: the known answers, in the same order.
        max_new_tokens: maximum length of a response in tokens.

    Raises:
        ValueError: when there are no questions, or the numbers of questions and ground truths differ.
    """
    if not questions or len(questions) != len(ground_truths):
        raise ValueError(
            f"Expected one ground truth per question and at least one question; got {len(questions)} questions and "
            f"{len(ground_truths)} ground truths."
        )
    responses = [sampled[0].text for sampled in generator.generate(questions, temperature=0.0, max_new_tokens=max_new_tokens)]
    verdicts = [
        verify(response, Question(request.messages, ground_truths=[truth]))
        for response, request, truth in zip(responses, questions, ground_truths, strict=True)
    ]
    return Accuracy(responses, [verdict.correct for verdict in verdicts], sum(verdict.method == "none" for verdict in verdicts))
