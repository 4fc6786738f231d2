"""Find texts that degenerate by their form: long lines, runs of one character, repeated lines, loops, repeated n-grams.

Tables, code and verse repeat too. What sets a loop apart: the same words come back at the same distance, mostly up to the end of
the text, or nothing new comes for dozens of words. Numbers do not count as words, and one that differs from that a period before
counts against a loop, so that tables and lists of values are none. `benchmarks/filter.py` measures the limits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from mpo.io import did_you_mean

LIMITS: dict[str, float | None] = {
    "line": 10_000,  # characters of a line
    "zeros": 64,  # zeros in a row, twice as many with separators
    "run": 64,  # letters or digits of one kind in a row, four times as many signs or blanks; twice as many with separators
    "lines": 0.3,  # share of a text in lines of text that are the fourth copy of a line or a later one
    "loop": 32,  # words (Chinese: characters) of the end that repeat those before at one distance; elsewhere three times as many
    "ngrams": 60,  # words and signs in a row that are all in 5-grams that the text has had three times
}
"""What a text may have at most, by rule; None turns a rule off."""
NGRAM, COPIES, MAX_PERIOD = 5, 3, 300
MIN_WORDS = 4  # of a line of text: brackets, rows of numbers and separators may repeat
DENSITY = 0.15  # minimum number of repeated words per word or sign of a loop: names in a table of numbers are fewer
SHARE = 0.5  # minimum share of words in a stretch without a new n-gram: tables have less
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W\d_{_CJK}]+|\d+|[^\w\s]|_")
_RUN = re.compile(r"(.)\1{15,}|(\S)(?:[\s,.;:|]{1,2}\2){15,}", re.DOTALL)


class Finding(NamedTuple):
    """What was found, what is allowed, from which character to which, and the rule."""

    value: float
    threshold: float
    start: int
    end: int
    rule: str = ""


def check_limits(limits: Mapping[str, float | None]) -> None:
    """Raises ValueError for an unknown rule, a limit that is no number above 0, and a share above 1."""
    for rule, limit in limits.items():
        if rule not in LIMITS:
            raise ValueError(f"Expected limits for {', '.join(LIMITS)}; got {rule!r}.{did_you_mean(rule, LIMITS)}")
        number = isinstance(limit, int | float) and not isinstance(limit, bool) and 0 < limit <= (1 if rule == "lines" else 2**62)
        if not number and limit is not None:
            raise ValueError(f"Expected {rule} to be a number above 0{', 1 at most' * (rule == 'lines')}, or None; got {limit!r}.")


def find_degenerate(text: str, limits: Mapping[str, float | None] = LIMITS) -> Iterator[Finding]:
    r"""Yield what is wrong with the form of a text, one finding a rule at most.

    >>> [(one.rule, one.value) for one in find_degenerate("The value is 3." + "0" * 100)]
    [('zeros', 100)]
    >>> list(find_degenerate("def add(a, b):\n    return a + b"))
    []
    """
    tokens = _Tokens(text)
    for rule, limit in limits.items():
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
    return token[0].isalpha() and (len(token) > 1 or token in "ai" or token > "\u3000")  # x may be a sign


def _line(tokens: _Tokens, limit: float) -> Finding | None:
    lines = (Finding(one.end() - one.start(), limit, *one.span()) for one in re.finditer("[^\n]+", tokens.text))
    return max(lines, default=None)


def _run(tokens: _Tokens, limit: float, *, zeros: bool = False) -> Finding | None:
    found = []
    for one in _RUN.finditer(tokens.text):
        character = one[1] or one[2]
        if (character == "0") == zeros:
            most = limit * (1 if character.isalnum() else 4) * (1 if one[1] else 2)
            found.append(Finding(one[0].count(character), most, *one.span()))
    return max(found, key=lambda one: one.value / one.threshold, default=None)


def _lines(tokens: _Tokens, limit: float) -> Finding | None:
    seen: Counter[str] = Counter()
    repeated, total, spans = 0, 0, []
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
    best, first, last, most = 0.0, 0, 0, limit
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
                best, first, last = value, start, end + period
                most = limit if size - last <= max(period, 2 * NGRAM) else 3 * limit
    return Finding(best, most, tokens.spans[first][0], tokens.spans[last - 1][1]) if best else None


def _ngrams(tokens: _Tokens, limit: float) -> Finding | None:
    seen: Counter[bytes] = Counter()
    best, begun, last = (0, 0), 0, -NGRAM - 1
    for place in range(len(tokens.ids) - NGRAM + 1):
        seen[gram := tokens.same[place : place + NGRAM].tobytes()] += 1
        if seen[gram] > COPIES:
            begun, last = place if place > last + NGRAM else begun, place
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
