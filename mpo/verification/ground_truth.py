"""Compare a final answer with the ground truth."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation


def is_correct(answer: str, ground_truth: str) -> bool:
    """Whether a final answer equals the ground truth.

    Both must be the same number, or the same text except for case, white space and a final full stop.

    Args:
        answer: a final answer, as parsed from a response.
        ground_truth: the known answer.

    >>> is_correct("Twelve.", "twelve"), is_correct("12.0", "12"), is_correct("1,200", "1200"), is_correct("12", "120")
    (True, True, True, False)
    """
    given, known = _plain(answer), _plain(ground_truth)
    if given == known:
        return True
    given_number, known_number = _number(given), _number(known)
    return given_number is not None and given_number == known_number


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
