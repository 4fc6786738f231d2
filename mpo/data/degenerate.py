"""Find texts that degenerate by their form: long lines, runs of one character, repeated lines, loops, repeated n-grams.

Tables, code, lists and verse repeat too. What sets a loop apart: the same words come back at the same distance, mostly up to the
end of the text, and little between them is new; or nothing new comes for dozens of words. A number that only counts on is not new.
`benchmarks/filter.py` measures the limits.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpo.io import did_you_mean

LIMITS: dict[str, float | None] = {
    "line": 10_000,  # characters of a line
    "zeros": 100,  # zeros in a row, with the same separators between them or none
    "run": 64,  # equal groups of at most 12 letters and digits in a row, or four times as many of signs and white space
    "lines": 0.3,  # share of a text in lines of text that are the fourth copy of a line or a later one
    "loop": 35,  # words (Chinese: characters) of the end that repeat those before at one distance; elsewhere three times as many
    "ngrams": 60,  # words and signs in a row that are all in 5-grams that the text has had three times
}
"""What a text may have at most, by rule; None turns a rule off."""
NGRAM, COPIES, MAX_PERIOD = 5, 3, 300
MIN_WORDS = 4  # of a line of text: brackets, rows of numbers and separators may repeat
SHARE = 0.5  # minimum share of words in a stretch without a new n-gram: tables have less
OTHER, NUMBER, NEW = 1.0, 4.0, 4.0  # equal words that another word or sign makes up for, another number, and what is new besides
_CJK = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_TOKEN = re.compile(rf"[{_CJK}]|[^\W\d_{_CJK}]+|\d+|[^\w\s]|_")
_RUN = re.compile(r"(.{1,12}?)\1{15,}", re.DOTALL)


@dataclass(frozen=True, order=True)
class Finding:
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

    >>> [(one.rule, one.value) for one in find_degenerate("The value is 3." + "0" * 200)]
    [('zeros', 200)]
    >>> list(find_degenerate("def add(a, b):\n    return a + b"))
    []
    """
    tokens = _Tokens(text)
    for rule, limit in limits.items():
        if limit is not None and (found := _FIND[rule](tokens, limit)) is not None and found.value > found.threshold:
            yield replace(found, rule=rule)


class _Tokens:
    """The words, numbers and signs of a text: where they are, equal ones (`ids`), values of numbers, words, and losses."""

    def __init__(self, text: str) -> None:
        found = list(_TOKEN.finditer(text))
        names = [one[0].lower() for one in found]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        self.text, self.spans = text, [one.span() for one in found]
        self.ids = np.array([numbers[name] for name in names], dtype=np.int64)
        self.values = np.array([_value(name) for name in names], dtype=np.int64)
        self.words = np.array([_is_word(name) for name in names], dtype=np.float64)
        new = np.zeros(len(names), dtype=bool)
        new[np.unique(self.ids, return_index=True)[1]] = True
        self.loss = np.where(self.values >= 0, NUMBER, OTHER) + np.where(new, NEW, 0.0)


def _value(token: str) -> int:
    return int(token[:18]) if token[0].isdecimal() else -2


def _is_word(token: str) -> bool:
    return token[0].isalpha() and (len(token) > 1 or token in "ai" or token > "\u3000")  # x may be a sign


def _line(tokens: _Tokens, limit: float) -> Finding | None:
    lines = (Finding(one.end() - one.start(), limit, *one.span()) for one in re.finditer("[^\n]+", tokens.text))
    return max(lines, default=None)


def _run(tokens: _Tokens, limit: float, *, zeros: bool = False) -> Finding | None:
    found = []
    for one in _RUN.finditer(tokens.text):
        said = re.sub(r"[\W_]", "", one[1])
        if (set(said) == {"0"}) == zeros:
            count = one[0].count("0") if zeros else len(one[0]) // len(one[1])
            found.append(Finding(count, limit * (1 if said else 4), *one.span()))
    return max(found, key=lambda one: one.value / one.threshold, default=None)


def _lines(tokens: _Tokens, limit: float) -> Finding | None:
    seen: dict[str, tuple[int, list[int]]] = {}
    repeated, total, spans = 0, 0, []
    for one in re.finditer(r"[^\n]*\S[^\n]*", tokens.text):
        line = " ".join(one[0].lower().split())
        total += len(line)
        found = _TOKEN.findall(line)
        if sum(map(_is_word, found)) < MIN_WORDS:
            continue
        values = [value for word in found if (value := _value(word)) >= 0]
        times, before = seen.get(line := re.sub(r"\d+", "0", line), (0, values))
        seen[line] = times + 1, values
        if times >= COPIES and all(value - old in (0, 1) for value, old in zip(values, before, strict=True)):
            repeated += len(line)
            spans.append(one.span())
    return Finding(round(repeated / total, 3), limit, spans[0][0], spans[-1][1]) if spans else None


def _loop(tokens: _Tokens, limit: float) -> Finding | None:
    """The stretch with the most words that equal those one period before, less what others make up for."""
    best, first, last, most = 0.0, 0, 0, limit
    ids, values, size = tokens.ids, tokens.values, len(tokens.ids)
    for period in range(1, min(MAX_PERIOD, size // (COPIES + 1)) + 1):
        equal = (ids[period:] == ids[:-period]) | ((values[period:] == values[:-period] + 1) & (values[:-period] >= 0))
        if tokens.words[period:][equal].sum() <= max(best, limit):
            continue
        totals = np.concatenate([[0.0], np.cumsum(np.where(equal, tokens.words[period:], -tokens.loss[period:]))])
        lows = np.minimum.accumulate(totals)
        end = int(np.argmax(totals - lows))
        if (value := float(totals[end] - lows[end])) > best:
            start = int(np.flatnonzero(totals[: end + 1] == lows[end])[-1])
            if end - start >= COPIES * period:
                best, first, last = round(value, 1), start, end + period
                most = limit if size - last <= max(period, 2 * NGRAM) else 3 * limit
    return Finding(best, most, tokens.spans[first][0], tokens.spans[last - 1][1]) if best else None


def _ngrams(tokens: _Tokens, limit: float) -> Finding | None:
    seen: Counter[bytes] = Counter()
    best, begun, last = (0, 0), 0, -NGRAM - 1
    for place in range(len(tokens.ids) - NGRAM + 1):
        seen[gram := tokens.ids[place : place + NGRAM].tobytes()] += 1
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
