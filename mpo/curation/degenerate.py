"""Find texts that degenerate: loops, runs of one character, repeated lines. The rules look at the form of the text alone.

Tables, code and verse repeat too. What sets a loop apart: the same words come back at the same distance again and again, mostly up
to the end of the text, or nothing new comes for dozens of words. Numbers are taken as equal ("Step 1", "Step 2"), so that numbering
hides no loop, and do not count as repeated words, so that columns of numbers are none. `benchmarks/filter.py` measures the defaults.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mpo.io import json_kind

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W\d_{_CJK}]+|\d+|[^\w\s]|_")
_RUN = re.compile(r"(.)\1{15,}|(\S)(?:[\s,.;:|]{1,2}\2){15,}", re.DOTALL)
NGRAM, COPIES = 5, 3
"""Words of an n-gram, and copies of a text (an n-gram, a line, a loop) that are not yet too many."""
MAX_PERIOD = 300
"""Maximum length of a loop, in words and signs."""
MIN_WORDS = 4
"""Number of words from which a line counts as text: brackets, rows of numbers and separators may repeat."""
MIN_DENSITY = 0.15
"""Minimum number of repeated words per word or sign of a loop: fewer are the names in a table of numbers."""
MIN_SHARE = 0.5
"""Minimum share of words in a stretch without a new n-gram: tables have less."""
ELSEWHERE = 3
"""How many times longer a loop must be that the text goes on after."""
SIGNS, SPACED = 4, 2
"""How many times longer a run must be of signs or white space (separators), and one with white space or signs in between."""


@dataclass(frozen=True)
class Limits:
    """What a text may have at most; None turns a rule off.

    Attributes:
        line: characters of a line.
        zeros: zeros in a row.
        run: letters or digits of one kind in a row; four times as many signs.
        lines: share of the text's characters in lines, of four words or more, that are the fourth copy of a line or a later one.
        loop: words (Chinese: characters) at the end that repeat the words before them at one distance, at least three times; three
            times as many before the end.
        ngrams: words and signs in a row that are all in 5-grams that the text has had three times.

    Raises:
        ValueError: for a limit that is no number above 0, or a share above 1.
    """

    line: int | None = 10_000
    zeros: int | None = 64
    run: int | None = 64
    lines: float | None = 0.3
    loop: int | None = 32
    ngrams: int | None = 60

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = 1.0 if name == "lines" else float("inf")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most):
                found = json_kind(value) if not isinstance(value, int | float) else value
                raise ValueError(f"Expected {name} to be a number above 0{', 1 at most' * (most == 1)}, or None; got {found}.")


RULES = tuple(field.name for field in fields(Limits))


@dataclass(frozen=True)
class Finding:
    """A rule that a text breaks: its name, what was found, what is allowed, and from which character to which."""

    rule: str
    value: float
    threshold: float
    start: int
    end: int


def find_degenerate(text: str, limits: Limits | None = None) -> Iterator[Finding]:
    """Yield what is wrong with the form of a text: at most one finding a rule, in the order of `Limits`.

    >>> [(one.rule, one.value) for one in find_degenerate("The value is 3." + "0" * 100)]
    [('zeros', 100)]
    >>> list(find_degenerate("def add(a, b):\\n    return a + b"))
    []
    """
    limits = limits or Limits()
    tokens = _Tokens(text)
    for rule in RULES:
        limit = getattr(limits, rule)
        if limit is not None and (found := _FIND[rule](tokens, limit)) is not None:
            yield Finding(rule, *found)


Found = tuple[float, float, int, int]


class _Tokens:
    """A text, its words and signs as numbers (`ids`; `same` is equal for all numbers), which are words, and where each is."""

    def __init__(self, text: str) -> None:
        self.text = text
        found = list(_TOKEN.finditer(text))
        numbers: dict[str, int] = {}
        names = [one[0].lower() for one in found]
        self.ids = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
        self.same = np.where([name[0].isdigit() for name in names], -1, self.ids)
        self.is_word = np.array([_is_word(name) for name in names], dtype=np.float64)
        self.spans = [one.span() for one in found]


def _is_word(token: str) -> bool:
    return token[0].isalpha() and (len(token) > 1 or token > "\u3000")


def _line(tokens: _Tokens, limit: float) -> Found | None:
    longest = max(re.finditer(r"[^\n]+", tokens.text), key=lambda one: one.end() - one.start(), default=None)
    if longest is None or longest.end() - longest.start() <= limit:
        return None
    return longest.end() - longest.start(), limit, *longest.span()


def _runs(tokens: _Tokens, limit: float, *, zeros: bool) -> Found | None:
    longest: Found | None = None
    for one in _RUN.finditer(tokens.text):
        character = one[1] or one[2]
        if (character == "0") == zeros:
            most = limit * (1 if character.isalnum() else SIGNS) * (1 if one[1] else SPACED)
            count = one[0].count(character)
            if count > most and (longest is None or count > longest[0]):
                longest = count, most, *one.span()
    return longest


def _lines(tokens: _Tokens, limit: float) -> Found | None:
    seen: Counter[str] = Counter()
    repeated = total = 0
    where: list[tuple[int, int]] = []
    for one in re.finditer(r"[^\n]*\S[^\n]*", tokens.text):
        line = re.sub(r"^\W*\d+\b", "", " ".join(one[0].lower().split()))
        total += len(line)
        found = [word[0] for word in _TOKEN.finditer(line)]
        if (words := sum(map(_is_word, found))) < MIN_WORDS:
            continue
        if words >= 2 * sum(word[0].isdigit() for word in found):  # otherwise its numbers are what it says
            line = re.sub(r"\d+", "0", line)
        seen[line] += 1
        if seen[line] > COPIES:
            repeated += len(line)
            where.append(one.span())
    share = round(repeated / max(total, 1), 3)
    return (share, limit, where[0][0], where[-1][1]) if share > limit else None


def _loop(tokens: _Tokens, limit: float) -> Found | None:
    """The stretch with the most words that equal those one period before; each other word or number takes one of them away."""
    best: tuple[float, int, int, int] = (0.0, 0, 0, 0)
    ids, same, words, size = tokens.ids, tokens.same, tokens.is_word, len(tokens.ids)
    for period in range(1, min(MAX_PERIOD, size // (COPIES + 1)) + 1):
        equal = ids[period:] == ids[:-period]
        lost = np.where(same[period:] < 0, 1.0, np.maximum(words[period:], 0.5))
        totals = np.concatenate([[0.0], np.cumsum(np.where(equal, words[period:], -lost))])
        lows = np.minimum.accumulate(totals)
        end = int(np.argmax(totals - lows))
        value = float(totals[end] - lows[end])
        if value > best[0]:
            start = int(np.flatnonzero(totals[: end + 1] == lows[end])[-1])
            if end - start >= max(COPIES * period, 1) and value >= MIN_DENSITY * (end - start):
                best = value, period, start, end + period
    value, period, start, end = best
    most = limit if size - end <= max(period, 2 * NGRAM) else ELSEWHERE * limit
    return (value, most, tokens.spans[start][0], tokens.spans[end - 1][1]) if value > most else None


def _ngrams(tokens: _Tokens, limit: float) -> Found | None:
    size = len(tokens.ids) - NGRAM + 1
    if size < 1:
        return None
    grams: NDArray[np.int64] = np.lib.stride_tricks.sliding_window_view(tokens.same, NGRAM)
    _, which = np.unique(grams, axis=0, return_inverse=True)
    order = np.argsort(which, kind="stable")
    first = np.concatenate([[True], np.diff(which[order]) != 0])
    earlier = np.empty(size, dtype=np.int64)
    earlier[order] = np.arange(size) - np.maximum.accumulate(np.where(first, np.arange(size), 0))
    starts = np.flatnonzero(earlier >= COPIES)
    if not len(starts):
        return None
    groups = np.split(starts, np.flatnonzero(np.diff(starts) > NGRAM) + 1)  # n-grams that overlap or follow each other
    longest = max(groups, key=lambda group: int(group[-1] - group[0]))
    count = int(longest[-1] - longest[0]) + NGRAM
    if tokens.is_word[longest[0] : longest[0] + count].sum() < MIN_SHARE * count:
        return None
    return (count, limit, tokens.spans[longest[0]][0], tokens.spans[longest[-1] + NGRAM - 1][1]) if count > limit else None


_FIND: dict[str, Callable[[_Tokens, float], Found | None]] = {
    "line": _line,
    "zeros": lambda tokens, limit: _runs(tokens, limit, zeros=True),
    "run": lambda tokens, limit: _runs(tokens, limit, zeros=False),
    "lines": _lines,
    "loop": _loop,
    "ngrams": _ngrams,
}
