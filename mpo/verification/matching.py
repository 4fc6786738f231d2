"""Compare a final answer with the ground truth: one matcher per kind of answer, in one registry."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from mpo.io import did_you_mean
from mpo.verification import sequences
from mpo.verification.choices import same_choices, same_selection
from mpo.verification.dress import plain_vectors, undress
from mpo.verification.expressions import DIFFERENT, other_name, same_expression
from mpo.verification.number import Number, read_number, same_number
from mpo.verification.sequences import read_boxes, read_list, read_ratio, same_boxes
from mpo.verification.texts import (
    document_distance,
    document_words,
    fixed_words,
    read_date,
    read_yes_no,
    same_text,
    same_transcription,
)

LONGEST = 10_000
"""Longest answer and ground truth that are read, in characters."""
_LEADING = re.compile(
    r"(?i)^(?:so |thus |therefore,? )?(?:the )?(?:final )?(?:answer|year|result|total|value|number|it|in)\b(?: is| was| of"
    r"| equals)?\s?[:：]?\s?"
)


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right.

    Attributes:
        correct: it is.
        method: the kind that it was compared as; `equal` for the same characters, `none` where there was nothing to compare.
        reason: what was found, for a person who reads it.
    """

    correct: bool
    method: str
    reason: str


@dataclass(frozen=True)
class Rules:
    """What a question says about its answer beside the ground truth.

    Attributes:
        choices: the texts of a multiple-choice question's choices.
        unit: the unit of a number.
        tolerance: how far an answer may be off, 0 or more, in the kind's own measure; None for the kind's own limit.
    """

    choices: Sequence[str] | None = None
    unit: str | None = None
    tolerance: float | None = None


Matcher = Callable[[str, str, Rules], "tuple[bool, str] | bool"]
"""Takes the answer, the ground truth and the rules; returns whether they match, and why."""


def match(
    answer: str,
    ground_truth: str | Sequence[str],
    kind: str | None = None,
    *,
    choices: Sequence[str] | None = None,
    unit: str | None = None,
    tolerance: float | None = None,
) -> Verdict:
    """Compare a final answer with the ground truth.

    An answer with the characters of the ground truth is right whatever its kind; an empty answer or ground truth never is.

    Args:
        answer: a final answer, as `extract` returns it.
        ground_truth: the known answer, or several, each of them right.
        kind: one of `MATCHERS`; None to detect it from the ground truth and the choices.
        choices: the texts of a multiple-choice question's choices, in order: A, B, ...
        unit: the unit of a number that has none.
        tolerance: how far an answer may be off: a number as a fraction of the ground truth (chart: 0.05), a document as normalised
            edit distance (0.1), a box as one minus its intersection over union (0.5). Other kinds do not read it.

    Raises:
        ValueError: for an unknown kind, an answer or ground truth that is no text, or a tolerance that is no number from 0.
        ValueError: where an expression or a document needs a package of `mpo-trainer[verify]` that is not installed.

    >>> match("3,14", "3.14").correct, match("-5", "5").correct, match("(b)", "blue", choices=["red", "blue"]).correct
    (True, False, True)
    """
    check_rules(kind, choices, tolerance)
    truths: list[str] = list(ground_truth) if isinstance(ground_truth, list | tuple) else [ground_truth]  # type: ignore[list-item]
    if not all(isinstance(text, str) for text in (answer, *truths)):
        raise ValueError(f"match compares texts; got {', '.join(type(text).__name__ for text in (answer, *truths))}.")
    rules = Rules(choices, unit, tolerance)
    verdicts = [Verdict(False, "none", "there is no ground truth")]
    while truths and not verdicts[-1].correct:
        verdicts.append(_match(answer, truths.pop(0), kind, rules))
    return verdicts[-1]


def check_rules(kind: str | None, choices: Sequence[str] | None, tolerance: float | None) -> None:
    """Refuse what no question can say, with ValueError."""
    if kind is not None and kind not in MATCHERS:
        raise ValueError(f"kind={kind!r} is unknown; kinds are {', '.join(MATCHERS)}.{did_you_mean(kind, MATCHERS)}")
    if choices is not None and (isinstance(choices, str) or not choices or not all(isinstance(choice, str) for choice in choices)):
        raise ValueError(f"choices must be a list of texts; got {choices!r}.")
    if tolerance is not None and not (isinstance(tolerance, int | float) and 0 <= tolerance < math.inf):
        raise ValueError(f"tolerance must be a number from 0; got {tolerance!r}.")


def _match(answer: str, truth: str, kind: str | None, rules: Rules) -> Verdict:
    if not truth.strip() or not answer.strip():
        return Verdict(False, "none", f"the {'answer' if truth.strip() else 'ground truth'} is empty")
    if answer.strip() == truth.strip():
        return Verdict(True, "equal", "the same characters")
    if max(len(answer), len(truth)) > LONGEST:
        same = answer.casefold().split() == truth.casefold().split()
        return Verdict(same, "equal" if same else "none", f"texts of more than {LONGEST:,} characters are equal or not")
    found = kind or detect_kind(truth, rules.choices)
    if found in {"math", "expression", "text"} and re.fullmatch(r"\s*\d[\d.]*(?:\s?[:：∶]\s?\d[\d., ]*)+\s*", truth):
        if (ratio := read_ratio(answer)) and ratio == read_ratio(truth):
            return Verdict(True, found, "the same ratio")
    result = MATCHERS[found](answer, truth, rules)
    correct, reason = result if isinstance(result, tuple) else (result, "")
    if not correct and kind is None and found == "list" and reason != sequences.GOES_ON and same_text(answer, truth)[0]:
        return Verdict(True, "text", "the same words")
    return Verdict(bool(correct), found, reason)


def register(kind: str, matcher: Matcher) -> None:
    """Add a kind of question.

    Args:
        kind: its name, for `match`, `extract` and `Question.kind`.
        matcher: takes the answer, the ground truth (neither empty, not the same characters) and the `Rules`; returns whether the
            answer is right, alone or with the reason.

    Raises:
        ValueError: for a name that is taken.

    >>> register("anagram", lambda answer, truth, rules: sorted(answer) == sorted(truth))
    >>> match("listen", "silent", "anagram").correct
    True
    """
    if kind in MATCHERS:
        raise ValueError(f"kind={kind!r} is taken; kinds are {', '.join(MATCHERS)}.")
    MATCHERS[kind] = matcher


def detect_kind(ground_truth: str, choices: Sequence[str] | None = None) -> str:
    """Tell the kind of an answer by its ground truth."""
    return "choice" if choices is not None else _detect(ground_truth)


@lru_cache(maxsize=4096)
def _detect(ground_truth: str) -> str:
    truth = undress(ground_truth)
    if re.fullmatch(r"\(?[A-J]\)?", truth):
        return "choice"
    if len(truth) < (12 if truth.isascii() else 4) and read_yes_no(truth) is not None and " " not in truth:
        return "yes_no"
    if (number := read_number(truth)) is not None and not (number.unit and read_date(truth)):
        return "expression" if "=" in truth else "number"
    if re.match(r"\s*(?:<box>|\[\[|\[)", truth) and (boxes := read_boxes(truth)) and all(a < c and b < d for a, b, c, d in boxes):
        return "box"
    if sequences.read_intervals(truth) and (truth[-1] in ")[" or truth[0] in "(]" or re.search(r"∞|\\in|[<>≤≥]|\\[lg]e", truth)):
        return "interval"
    if is_expression(truth):
        return "expression"
    if (
        read_date(truth) is None
        and len(truth) < 400
        and len(items := read_list(truth)[0]) > 1
        and (re.search(r"[,;，、]|^[\[({].*[\])}]$", truth) or all(map(read_number, items)))
    ):
        return "list"
    return "text"


def is_expression(text: str) -> bool:
    """Whether a text is written as mathematics, not as words."""
    if len(text) > 1000 or re.fullmatch(r"[\d/:. -]+", text):
        return False
    factorial = re.fullmatch(r"[\d\s+*/()^.-]*\d!(?!!)[\d\s+*/()^.!-]*", undress(text))
    names = r"\\(?:begin|sum|prod|[dt]?binom|overline|lfloor|lceil|d?frac|sqrt"
    names += r"|pi|sin|cos|tan|log|ln|cdot|times|theta|alpha|infty|pm)(?![A-Za-z])"
    if factorial or re.search(rf"{names}|√|\bsqrt\s?\(|[π²³]|\w\^|\d\(\d", text):
        return True
    words = re.findall(r"[^\W\d_]+", text)
    operators = re.search(r"[\w)]\s?[+\-*/=<>≤≥]\s?[\w(]", text)
    return bool(operators and {word for word in words if len(word) > 1} <= {"sin", "cos", "tan", "log", "ln", "exp", "sqrt", "pi"})


def _number(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    given, known = read_number(answer), read_number(truth)
    if known is None:
        return _math_values(answer, truth, rules) if is_expression(truth) else same_text(answer, truth)
    if given is None:
        if (said := re.fullmatch(r"([^$]*\d)!+", answer.strip())) and (given := read_number(said[1])):
            if (same := same_number(given, known, unit=rules.unit, tolerance=rules.tolerance))[0]:
                return same
        if is_expression(answer) or re.fullmatch(r"[\d\s.()+*/^-]*[+*/^-][\d\s.()+*/^-]*", undress(answer)):
            return _math_values(answer, truth, rules)
        plain = undress(answer) if known.unit else re.sub(r"(?i)(?<=\d)\s?[ap]\.?m\.?$", "", undress(answer))
        if (given := read_number(_LEADING.sub("", plain))) is None:
            return False, "the answer is not a number"
    return same_number(given, known, unit=rules.unit, tolerance=rules.tolerance)


def _math_values(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    """Compare expressions, and their values by the rules of numbers where one of them is written as a number."""
    if re.fullmatch(r"[\d/:-]{6,}", answer.strip()) and re.search(r"\d[-/:]\d+[-/:]\d", answer):
        return False, "the answer is a date or time"
    correct, given, known, reason = same_expression(answer, truth)
    if correct or given is None or known is None:
        return correct, reason
    if reason != DIFFERENT and abs(given - known) <= 1e-12 * abs(known):
        return True, "the same value"
    numbers = [read_number(answer), read_number(truth)]
    exact = reason == DIFFERENT and rules.tolerance is None and not any(number and number.step for number in numbers)
    if (numbers[0] is None) == (numbers[1] is None) or exact:
        return False, reason
    # The other side keeps 12 digits of its value, and no decimals of its own.
    one, other = (number or Number(Fraction(f"{value:.12g}")) for number, value in zip(numbers, (given, known), strict=True))
    if numbers[0] is None:
        one = replace(one, digits=0)
    return same_number(replace(one, unit=""), replace(other, unit=""), tolerance=rules.tolerance)


def _math(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    answer, truth = plain_vectors(answer), plain_vectors(truth)
    if "∅" in truth:
        said = re.search(r"(?i)(?:∅|空集|\bempty set|\bno (?:real )?solutions?)\W*$", answer)
        return bool(said) and not re.search(r"\d|\bnot\b|n['’]t|不", answer), "the empty set"
    if sequences.named_values(truth) or sequences.named_values(answer):
        return _list(answer, _both_signs(truth), rules)
    if (shape := "list" if "±" in truth or re.search(r"\\pm(?![A-Za-z])", truth) else _detect(truth)) in {"list", "interval"}:
        answer, truth = _both_signs(answer), _both_signs(truth)  # a point, an interval, several values
        return (_list if shape == "list" else _interval)(answer, truth, rules)
    given, known = read_number(answer), read_number(truth)
    if other_name(answer, truth):
        return False, "another name"
    if given is not None and known is not None:
        return same_number(given, known, unit=rules.unit, tolerance=rules.tolerance)
    if not is_expression(answer) and not is_expression(truth) and same_text(answer, truth)[0]:
        letter = re.fullmatch(r"\W*([A-Za-z])\W*", truth)  # R is not r
        return (False, "another name") if letter and letter[1] not in answer else (True, "the same words")
    if not is_expression(answer) and not is_expression(truth) and not re.fullmatch(r"-?[A-Za-z]", truth.strip()):
        return False, "neither is an expression"
    return _math_values(answer, truth, rules)


def _both_signs(text: str) -> str:
    if len(signs := re.split(r"±|\\pm(?![A-Za-z])", text)) != 2:
        return text
    before = signs[0].rpartition("=")[2]
    return ", ".join(before + sign + signs[1].strip(" $") for sign in ("+" * bool(before.strip(" $")), "-"))


def _yes_no(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    given, known = read_yes_no(answer), read_yes_no(truth)
    if known is None:
        return same_text(answer, truth)
    return given is known, "the answer says neither yes nor no" if given is None else "yes" if given else "no"


def _document(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    if same_text(answer, truth)[0]:
        return True, "the same words"
    distance = document_distance(answer, truth)
    if rules.tolerance is None and same_transcription(answer, truth):
        return distance <= 0.1 or document_words(answer) == document_words(truth), f"ANLS {1 - distance:.2f}"
    if rules.tolerance is None or fixed_words(answer) != fixed_words(truth):
        return False, f"ANLS {1 - distance:.2f}, but a word, digit or sign differs"
    return distance <= rules.tolerance, f"ANLS {1 - distance:.2f}"


def _chart(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    given, known = read_number(answer), read_number(truth)
    if given is None or known is None:
        return _yes_no(answer, truth, rules) if len(truth) < 12 and " " not in truth else same_text(answer, truth)
    return same_number(given, known, unit=rules.unit, tolerance=0.05 if rules.tolerance is None else rules.tolerance)


def _list(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    return sequences.same_list(answer, truth, lambda given, known: _item(given, known, rules))


def _interval(answer: str, truth: str, rules: Rules) -> tuple[bool, str]:
    return sequences.same_intervals(answer, truth, lambda given, known: _item(given, known, rules))


def _item(answer: str, truth: str, rules: Rules) -> bool:
    if answer == truth or (len(truth) == 1 and answer.swapcase() == truth):  # R is not r
        return answer == truth
    if truth[:1] in {"(", "["} and len(read_list(truth)[0]) > 1:
        return _list(answer, truth, rules)[0]
    kind = "math" if is_expression(answer) or is_expression(truth) else "text" if read_number(truth) is None else "number"
    return bool(_match(answer, truth, kind, replace(rules, choices=None)).correct)


MATCHERS: dict[str, Matcher] = {
    "choice": lambda answer, truth, rules: same_choices(answer, truth, rules.choices),
    "choices": lambda answer, truth, rules: same_selection(answer, truth, rules.choices),
    "number": _number,
    "expression": _math,
    "math": _math,
    "text": lambda answer, truth, rules: same_text(answer, truth),
    "document": _document,
    "chart": _chart,
    "list": _list,
    "interval": _interval,
    "yes_no": _yes_no,
    "box": lambda answer, truth, rules: same_boxes(answer, truth, 0.5 if rules.tolerance is None else 1 - rules.tolerance),
}
"""The matcher of each kind; `register` adds to it."""
