"""Rational expressions: sums, products, quotients and whole powers of numbers and variables, compared without a process."""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import sha512

_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|(\\frac)|(\\cdot|\\times)|([a-zA-Z])|(.))")
_LONGEST = 400


class _Other(Exception):
    """The text is something else than a rational expression, or has no value here."""


def same_rational(one: str, other: str, *, scaled: bool = False) -> tuple[bool, bool] | None:
    r"""Whether two rational expressions, LaTeX or plain, are equal, and whether there are variables; None where one is none.

    `scaled` allows a factor, as between 2y - 4 and y - 2. Equal values at two points modulo a prime are equal expressions
    (Schwartz-Zippel: others agree with a chance of about their degree / 2^127 a point). Prime and points come from a hash of both
    texts: the verdict is always the same, and nobody can write a text for a prime that is known before.
    """
    if max(len(one), len(other)) > _LONGEST:
        return None
    seed = "\0".join(sorted((one, other)))
    try:
        readers = _Reader(one, seed), _Reader(other, seed)
        (a, b), (c, d) = ([reader.value(point) for point in (0, 1)] for reader in readers)
    except (_Other, RecursionError):
        return None
    equal = any((a, b)) == any((c, d)) and (a * d - b * c) % readers[0].prime == 0 if scaled else (a, b) == (c, d)
    return equal, any(reader.variables for reader in readers)


@lru_cache(maxsize=4096)
def _drawn(text: str) -> int:
    return int.from_bytes(sha512(text.encode("utf-8", "surrogatepass")).digest()[:16]) >> 1


@lru_cache(maxsize=1024)
def _prime(seed: str) -> int:
    candidate = _drawn(seed) | 1 << 126 | 1
    while pow(2, candidate - 1, candidate) != 1:  # Fermat: at this size no composite number is met
        candidate += 2
    return candidate


class _Reader:
    """Recursive descent over the tokens of an expression."""

    def __init__(self, text: str, seed: str) -> None:
        self.seed, self.prime = seed, _prime(seed)
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
            result = (result + sign * self.product()) % self.prime
            if self.next() not in {"+", "-"}:
                return result
            sign = 1

    def product(self) -> int:
        result = self.power()
        while (sign := self.next()) in {"*", "/", "0", "x", "(", "{", "\\"}:
            if sign == "0":
                raise _Other  # "x 2", "2 3": a product is not written so
            negative = sign in "*/" and bool(self.take()) and self.next() == "-" and bool(self.take())
            factor = self.power()
            result = (result * (self.inverse(factor) if sign == "/" else factor) * (-1 if negative else 1)) % self.prime
        return result

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
        result = pow(base, int(exponent), self.prime)
        return self.inverse(result) if negative else result

    def atom(self) -> int:
        number, fraction, _, letter, sign = self.take()
        if number:
            whole, _, decimals = number.partition(".")
            return int(whole + decimals) * self.inverse(10 ** len(decimals)) % self.prime
        if fraction:
            return self.atom() * self.inverse(self.atom()) % self.prime
        if letter and letter not in "eiEI":
            self.variables = True
            return _drawn(f"{self.seed}\0{letter}\0{self.point}") % self.prime
        closing = {"(": ")", "{": "}", "[": "]"}.get(sign)
        if closing is None:
            raise _Other
        result = self.sum()
        if self.take()[4] != closing:
            raise _Other
        return result

    def inverse(self, value: int) -> int:
        if not value % self.prime:
            raise _Other
        return pow(value, -1, self.prime)
