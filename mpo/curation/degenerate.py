"""Find texts that degenerate by their form: long lines, runs of one character, repeated lines, loops, repeated n-grams.

Tables, code and verse repeat too. What sets a loop apart: the same words come back at the same distance, mostly up to the end of the
text, or nothing new comes for dozens of words. Numbers do not count as words, and one that differs from that a period before counts
against a loop, so that tables and lists of values are none. `benchmarks/filter.py` measures the defaults.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mpo.io import json_kind

_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W\d_{_CJK}]+|\d+|[^\w\s]|_")
_RUN = re.compile(r"(.)\1{15,}|(\S)(?:[\s,.;:|]{1,2}\2){15,}", re.DOTALL)
NGRAM = 5
COPIES = 3  # of an n-gram, a line or a loop that are not yet too many
MAX_PERIOD = 300  # of a loop, in words and signs
MIN_WORDS = 4  # of a line of text: brackets, rows of numbers and separators may repeat
DENSITY = 0.15  # minimum number of repeated words per word or sign of a loop: names in a table of numbers are fewer
SHARE = 0.5  # minimum share of words in a stretch without a new n-gram: tables have less
ELSEWHERE = 3  # times as long as at its end may be a loop that the text goes on after
SIGNS, SPACED = 4, 2  # times as long may be a run of signs or white space, and one with signs or white space in between


@dataclass(frozen=True)
class Limits:
    """What a text may have at most; None turns a rule off.

    Attributes:
        line: characters of a line.
        zeros: zeros in a row.
        run: letters or digits of one kind in a row; four times as many signs.
        lines: share of the characters in lines, of four words or more, that are the fourth copy of a line or a later one.
        loop: words (Chinese: characters) at the end that repeat those before them at one distance, three times or more; three times
            as many before the end.
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
                found = value if isinstance(value, int | float) else json_kind(value)
                raise ValueError(f"Expected {name} to be a number above 0{', 1 at most' * (most == 1)}, or None; got {found}.")


class Finding(NamedTuple):
    """What a rule found, what it allows, and from which character to which; at last the rule, a name of `Limits`."""

    value: float
    threshold: float
    start: int
    end: int
    rule: str = ""


def find_degenerate(text: str, limits: Limits | None = None) -> Iterator[Finding]:
    r"""Yield what is wrong with the form of a text: at most one finding a rule, in the order of `Limits`.

    >>> [(one.rule, one.value) for one in find_degenerate("The value is 3." + "0" * 100)]
    [('zeros', 100)]
    >>> list(find_degenerate("def add(a, b):\n    return a + b"))
    []
    """
    tokens = _Tokens(text)
    for rule, limit in vars(limits or Limits()).items():
        if limit is not None and (found := _FIND[rule](tokens, limit)) is not None and found.value > found.threshold:
            yield found._replace(rule=rule)


class _Tokens:
    """A text, its words and signs as numbers (all numbers are -1 in `same`), which are words, and where each is."""

    def __init__(self, text: str) -> None:
        found = list(_TOKEN.finditer(text))
        names = [one[0].lower() for one in found]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.text, self.spans = text, [one.span() for one in found]
        self.ids = np.array([numbers[name] for name in names], dtype=np.int64)
        self.same = np.where([name[0].isdigit() for name in names], -1, self.ids)
        self.words = np.array([_is_word(name) for name in names], dtype=np.float64)


def _is_word(token: str) -> bool:
    return token[0].isalpha() and (len(token) > 1 or token > "\u3000")


def _line(tokens: _Tokens, limit: float) -> Finding | None:
    lines = (Finding(one.end() - one.start(), limit, *one.span()) for one in re.finditer("[^\n]+", tokens.text))
    return max(lines, default=None)


def _run(tokens: _Tokens, limit: float, *, zeros: bool = False) -> Finding | None:
    found = []
    for one in _RUN.finditer(tokens.text):
        character = one[1] or one[2]
        if (character == "0") == zeros:
            most = limit * (1 if character.isalnum() else SIGNS) * (1 if one[1] else SPACED)
            found.append(Finding(one[0].count(character), most, *one.span()))
    return max(found, key=lambda one: one.value / one.threshold, default=None)


def _lines(tokens: _Tokens, limit: float) -> Finding | None:
    seen: Counter[str] = Counter()
    repeated = total = 0
    spans: list[tuple[int, int]] = []
    for one in re.finditer(r"[^\n]*\S[^\n]*", tokens.text):
        line = re.sub(r"^\W*\d+\b", "", " ".join(one[0].lower().split()))
        total += len(line)
        found = _TOKEN.findall(line)
        if (words := sum(map(_is_word, found))) < MIN_WORDS:
            continue
        if words >= 2 * sum(word[0].isdigit() for word in found):  # otherwise its numbers are what it says
            line = re.sub(r"\d+", "0", line)
        seen[line] += 1
        if seen[line] > COPIES:
            repeated += len(line)
            spans.append(one.span())
    return Finding(round(repeated / total, 3), limit, spans[0][0], spans[-1][1]) if spans else None


def _loop(tokens: _Tokens, limit: float) -> Finding | None:
    """The stretch with the most words that equal those one period before; each other word or number takes one of them away."""
    best, period_of_best, (first, last) = 0.0, 0, (0, 0)
    ids, words, size = tokens.ids, tokens.words, len(tokens.ids)
    lost = -np.where(tokens.same < 0, 1.0, np.maximum(words, 0.5))
    for period in range(1, min(MAX_PERIOD, size // (COPIES + 1)) + 1):
        gained = np.where(ids[period:] == ids[:-period], words[period:], lost[period:])
        totals = np.concatenate([[0.0], np.cumsum(gained)])
        lows = np.minimum.accumulate(totals)
        end = int(np.argmax(totals - lows))
        if (value := float(totals[end] - lows[end])) > best:
            start = int(np.flatnonzero(totals[: end + 1] == lows[end])[-1])
            if end - start >= COPIES * period and value >= DENSITY * (end - start):
                best, period_of_best, (first, last) = value, period, (start, end + period)
    most = limit if size - last <= max(period_of_best, 2 * NGRAM) else ELSEWHERE * limit
    return Finding(best, most, tokens.spans[first][0], tokens.spans[last - 1][1]) if best else None


def _ngrams(tokens: _Tokens, limit: float) -> Finding | None:
    seen: Counter[bytes] = Counter()
    best, begun = (0, 0), None
    for place in range(len(tokens.ids) - NGRAM + 1):
        seen[gram := tokens.same[place : place + NGRAM].tobytes()] += 1
        if seen[gram] > COPIES:
            begun = place if begun is None or place > last + NGRAM else begun
            last = place
            best = max(best, (last + NGRAM - begun, begun))
    count, first = best
    if not count or tokens.words[first : first + count].sum() < SHARE * count:
        return None
    return Finding(count, limit, tokens.spans[first][0], tokens.spans[first + count - 1][1])


_FIND: dict[str, Callable[[_Tokens, float], Finding | None]] = {
    "line": _line,
    "zeros": lambda tokens, limit: _run(tokens, limit, zeros=True),
    "run": _run,
    "lines": _lines,
    "loop": _loop,
    "ngrams": _ngrams,
}
