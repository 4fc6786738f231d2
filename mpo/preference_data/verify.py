"""Is a final answer right?"""

from __future__ import annotations

from decimal import Decimal, InvalidOperation


def is_correct(answer: str, ground_truth: str) -> bool:
    """Whether an answer says the same as the ground truth.

    It does when both are the same text but for case, white space and a full stop at the end, or the same number.

    Args:
        answer: a final answer, as parsed from a response.
        ground_truth: what is known to be right.

    >>> is_correct("Twelve.", "twelve"), is_correct("12.0", "12"), is_correct("1,200", "1200"), is_correct("12", "120")
    (True, True, True, False)
    """
    said, known = _plain(answer), _plain(ground_truth)
    if said == known:
        return True
    said_number, known_number = _number(said), _number(known)
    return said_number is not None and said_number == known_number


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
