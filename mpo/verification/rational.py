"""Rational expressions: sums, products, quotients and whole powers of numbers and variables, compared without a process."""

from __future__ import annotations

import re
from functools import lru_cache

_PRIME = 2**61 - 1
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|(\\frac)|(\\cdot|\\times)|([a-zA-Z])|(.))")
_POINTS = (1_000_003, 982_451_653, 32_416_190_071)  # of the first variable; the others are powers of it
_LONGEST = 400


class _Other(Exception):
    """The text is something else than a rational expression, or has no value here."""


def rational(text: str) -> tuple[tuple[int, ...], bool] | None:
    r"""Evaluate a rational expression in LaTeX or plain text at fixed points, modulo a prime.

    Expressions with the same values are equal (Schwartz-Zippel: at degree d, others agree with a chance of about d / 2^61 a point).

    >>> rational("x^2-1") == rational("(x-1)(x+1)"), rational(r"\frac{x}{2}") == rational("x/3"), rational(r"\sqrt{x}")
    (True, False, None)

    Returns:
        The values and whether there are variables; None for any other expression.
    """
    if len(text) > _LONGEST:
        return None
    try:
        reader = _Reader(text)
        return tuple(reader.value(point) for point in _POINTS), reader.variables
    except (_Other, RecursionError):
        return None


def proportional(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether values differ by one factor only, as those of 2y - 4 and y - 2 do."""
    return any(one) == any(other) and all((a * other[0] - b * one[0]) % _PRIME == 0 for a, b in zip(one, other, strict=True))


@lru_cache(maxsize=256)
def _at(name: str, point: int) -> int:
    return pow(point, 2 * ord(name) + 1, _PRIME)


class _Reader:
    """Recursive descent over the tokens of an expression."""

    def __init__(self, text: str) -> None:
        self.tokens = [found.groups() for found in _TOKEN.finditer(text.strip())]
        self.place = 0
        self.point = 0
        self.variables = False

    def value(self, point: int) -> int:
        self.place, self.point = 0, point
        result = self.sum()
        if self.place < len(self.tokens):
            raise _Other
        return result

    def next(self) -> str:
        """The next sign, `0` for a number, `x` for a variable; empty at the end."""
        if self.place >= len(self.tokens):
            return ""
        number, fraction, times, letter, sign = self.tokens[self.place]
        return "0" if number else "\\" if fraction else "*" if times else "x" if letter else sign

    def take(self) -> tuple[str, ...]:
        if self.place >= len(self.tokens):
            raise _Other
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self) -> int:
        result, sign = 0, 1
        while True:
            while self.next() in {"+", "-"} and self.next():
                sign = -sign if self.take()[4] == "-" else sign
            result = (result + sign * self.product()) % _PRIME
            if self.next() not in {"+", "-"}:
                return result
            sign = 1

    def product(self) -> int:
        result = self.power()
        while (sign := self.next()) in {"*", "/", "0", "x", "(", "{", "\\"}:
            if sign in "*/":
                self.take()
                negative = self.next() == "-" and bool(self.take())
            else:
                negative = False
            factor = self.power() if sign != "0" else self._never()
            result = (result * (self.inverse(factor) if sign == "/" else factor) * (-1 if negative else 1)) % _PRIME
        return result

    def _never(self) -> int:
        raise _Other  # "x 2", "2 3": a product is not written so

    def power(self) -> int:
        base = self.atom()
        if self.next() != "^":
            return base
        self.take()
        closing = {"{": "}", "(": ")"}.get(self.next())
        if closing:
            self.take()
        negative = self.next() == "-" and bool(self.take())
        exponent = self.take()[0]
        if not exponent or "." in exponent or len(exponent) > 6 or (closing and self.take()[4] != closing) or self.next() == "^":
            raise _Other
        result = pow(base, int(exponent), _PRIME)
        return self.inverse(result) if negative else result

    def atom(self) -> int:
        number, fraction, _, letter, sign = self.take()
        if number:
            whole, _, decimals = number.partition(".")
            return int(whole + decimals) * self.inverse(10 ** len(decimals)) % _PRIME
        if fraction:
            return self.atom() * self.inverse(self.atom()) % _PRIME
        if letter and letter not in "eiEI":
            self.variables = True
            return _at(letter, self.point)
        closing = {"(": ")", "{": "}", "[": "]"}.get(sign)
        if closing is None:
            raise _Other
        result = self.sum()
        if self.take()[4] != closing:
            raise _Other
        return result

    def inverse(self, value: int) -> int:
        if not value % _PRIME:
            raise _Other
        return pow(value, -1, _PRIME)
