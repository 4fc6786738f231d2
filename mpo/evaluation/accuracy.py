"""Accuracy of responses that reason before their final answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mpo.evaluation.intervals import wilson_interval
from mpo.generation.generator import Generator, Request
from mpo.verification.ground_truth import is_correct

_FINAL_ANSWER = re.compile(r"(?:Final answer:|Answer:)\s*(.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Accuracy:
    """The responses of a model, and how many are correct.

    Attributes:
        responses: the full response to each question.
        correct: whether its final answer is correct, for each question.
        unparsable: responses without a final answer; they count as incorrect.
    """

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


def extract_answer(response: str) -> str | None:
    r"""Extract the final answer by the rule of InternVL's chain-of-thought evaluation: the text after `Final answer:` or `Answer:`.

    The last match counts. The rule is less strict than `mpo.verification.responses.parse_response`, which selects training
    examples.

    >>> extract_answer("3 + 4 = 7\nanswer: 7"), extract_answer("seven")
    ('7', None)
    """
    found = _FINAL_ANSWER.findall(response)
    return (found[-1].strip() or None) if found else None


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
    answers = [extract_answer(response) for response in responses]
    correct = [answer is not None and is_correct(answer, known) for answer, known in zip(answers, ground_truths, strict=True)]
    return Accuracy(responses, correct, unparsable=answers.count(None))
