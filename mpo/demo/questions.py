"""The questions of the demo and their worked solutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class QuestionKind:
    """One kind of question about the digits of an image.

    Attributes:
        name: short name, used in files and tables.
        text: the question as the model reads it.
        work: digits -> (the steps as text, the ground truth).
    """

    name: str
    text: str
    work: Callable[[Sequence[int]], tuple[str, str]]

    def ground_truth(self, digits: Sequence[int]) -> str:
        """The ground truth for digits read from left to right.

        >>> KINDS["sum"].ground_truth([3, 8, 1])
        '12'
        """
        return self.work(digits)[1]

    def worked_example(self, digits: Sequence[int]) -> str:
        """A worked example in three lines: the digits, the steps, the final answer.

        >>> print(KINDS["sum"].worked_example([3, 8, 1]))
        The digits are 3 8 1
        3 + 8 = 11 , 11 + 1 = 12
        Final answer: 12
        """
        steps, ground_truth = self.work(digits)
        return f"The digits are {' '.join(map(str, digits))}\n{steps}\nFinal answer: {ground_truth}"


def _sum(digits: Sequence[int]) -> tuple[str, str]:
    steps, total = [], digits[0]
    for digit in digits[1:]:
        steps.append(f"{total} + {digit} = {total + digit}")
        total += digit
    return " , ".join(steps), str(total)


def _order(digits: Sequence[int]) -> tuple[str, str]:
    ordered = [str(digit) for digit in sorted(digits)]
    return "In order " + " , ".join(ordered), " ".join(ordered)


def _double(digits: Sequence[int]) -> tuple[str, str]:
    steps = [f"{digit} + {digit} = {2 * digit}" for digit in digits]
    return " , ".join(steps), " ".join(str(2 * digit) for digit in digits)


KINDS: dict[str, QuestionKind] = {
    kind.name: kind
    for kind in (
        QuestionKind("sum", "What is the sum of all digits?", _sum),
        QuestionKind("order", "What are the digits from smallest to largest?", _order),
        QuestionKind("double", "What is twice each digit?", _double),
    )
}
"""Every kind of question, by name.

Each ground truth depends on every digit, so that a misread image rarely leads to a correct final answer.
"""
