"""Accuracy of answers that reason first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mpo.evaluation.intervals import wilson_interval
from mpo.inference.sampler import Question, Sampler
from mpo.preference_data.verify import is_correct

_FINAL_ANSWER = re.compile(r"(?:Final answer:|Answer:)\s*(.*)", re.IGNORECASE)


@dataclass(frozen=True)
class Accuracy:
    """What a model answered, and how often it was right.

    Attributes:
        responses: the whole response to each question.
        correct: whether it was right, for each question.
        unparsable: responses without a final answer; they count as wrong.
    """

    responses: list[str]
    correct: list[bool]
    unparsable: int

    @property
    def share(self) -> float:
        """Right answers among all, 0 to 1."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of `share`."""
        return wilson_interval(sum(self.correct), len(self.correct))


def extract_answer(response: str) -> str | None:
    r"""The final answer, by the rule of InternVL's evaluation with chain of thought: what follows `Final answer:` or `Answer:`.

    It is laxer than `mpo.preference_data.answers.parse_response`, which decides what may serve as an example. The last one counts.

    >>> extract_answer("3 + 4 = 7\nanswer: 7"), extract_answer("seven")
    ('7', None)
    """
    found = _FINAL_ANSWER.findall(response)
    return (found[-1].strip() or None) if found else None


def measure_accuracy(
    sampler: Sampler, questions: Sequence[Question], ground_truths: Sequence[str], *, max_new_tokens: int = 1024
) -> Accuracy:
    """Answers questions greedily and compares with the ground truth.

    Args:
        sampler: the model.
        questions: what to ask; at least one.
        ground_truths: the right answers, in the same order.
        max_new_tokens: the longest response, in tokens.

    Raises:
        ValueError: when there are no questions, or not as many ground truths.
    """
    if not questions or len(questions) != len(ground_truths):
        raise ValueError(f"{len(questions)} questions and {len(ground_truths)} ground truths: one each, at least one question.")
    responses = [answers[0] for answers in sampler.generate(questions, temperature=0.0, max_new_tokens=max_new_tokens)]
    answers = [extract_answer(response) for response in responses]
    correct = [answer is not None and is_correct(answer, known) for answer, known in zip(answers, ground_truths, strict=True)]
    return Accuracy(responses, correct, unparsable=answers.count(None))
