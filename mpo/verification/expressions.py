"""Expressions: compared by math-verify in processes of their own, which can be killed and have a limit of memory.

The processes are plain ones, not those of `multiprocessing`: they start from threads, notebooks, `python -c` and daemonic processes
(as the workers of a data loader are), import neither the user's script nor torch, and end with this process.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import selectors
import subprocess
import sys
from functools import lru_cache
from hashlib import sha512
from itertools import accumulate
from pathlib import Path

from mpo.verification.dress import plain_math, undress

SECONDS = 2.0
"""CPU time that one comparison may take."""
PATIENCE = 60.0
"""Seconds after which a process that answers nothing is given up, however busy the machine is."""
_PROCESSES = max(1, min(4, os.cpu_count() or 1))
_REQUESTS = 500  # a process is replaced after so many, which bounds its memory
_LONGEST = 1000
_FUNCTION = re.compile(r"^\s*(?:[A-Za-z]{2,},? )*[A-Za-z]'?\s?\([a-z]\)\s?=\s?(?=[^=]+$)")
"""The name of a function on the left, `f(x) =`."""
DIFFERENT = "another number"
_NAME = re.compile(
    r"(?:\\?(?:angle|triangle|Delta|overline|vec)\s?|∠|△)?(?:\{?[A-Za-z]{1,4}\}?|\\[A-Za-z]{2,7})(?:_\{?\w{1,20}\}?|_\{\})?'{0,3}"
    r"(?:\(\w{1,3}\))?|\\?(?:sin|cos|tan)\s?\\?\w{1,6}|[\u4e00-\u9fff，,]+[A-Za-z]{0,4}"
)
_LETTER = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")  # without one it is arithmetic: 2^3 = 8
_CAPITAL = re.compile(r"\\mathbb\s?\{\w\}|\\[A-Za-z]+|(?<=\d)E(?=[-+\d])|([A-Z])")
_SEVERAL = re.compile(r"=[^=]*(?:[,;]|\bor\b|\band\b)[^=]*=")
_EQUALS = re.compile(r"(?<![<>!\\=])=(?!=)(?![^{}]*\})")  # not the k = 1 of a sum
_LATEX = {
    sign: f"\\{name} "
    for sign, name in zip("π∞×·≤≥θαβλμ", "pi infty times cdot le ge theta alpha beta lambda mu".split(), strict=True)
}
_LATEX |= {"÷": "/", "\u2212": "-", "\u2013": "-", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}"}


class Worker:
    """A process that compares expressions."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            # -P: the folder of the script is not searched for modules.
            [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("worker.py")), str(SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONIOENCODING": "utf-8"},
        )
        self.served = 0
        if (first := self._line()) != b"ready\n":
            self.close()
            if first == b"missing\n":
                raise ValueError("Comparing expressions needs math-verify. Install it: pip install mpo-trainer[verify]")
            raise RuntimeError(f"The process that compares expressions did not start; it wrote {first!r} instead of ready.")

    def ask(self, answer: str, truth: str) -> tuple[bool, float | None, float | None] | None:
        """Compare two expressions; None when that took too long or too much memory, and the process is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([answer, truth]).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        line = self._line()
        self.served += 1
        return None if not line.endswith(b"\n") else tuple(json.loads(line))

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n") and selector.select(PATIENCE):
                read = os.read(self.process.stdout.fileno(), 65536)
                if not read:
                    break
                line += read
        return line

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


class _Workers:
    """As many places as processes may run; a free one holds an idle process or None."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.free: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        for _ in range(_PROCESSES):
            self.free.put(None)

    def ask(self, answer: str, truth: str) -> tuple[bool, float | None, float | None] | None:
        worker, kept = self.free.get(), None
        try:
            if worker is None or worker.process.poll() is not None:
                worker = Worker()
            result = worker.ask(answer, truth)
            kept = worker if result is not None and worker.served < _REQUESTS else None
            return result
        finally:  # an interrupted worker still computes: it is not used again
            self.free.put(kept)
            if worker is not None and kept is None:
                worker.close()

    def close(self) -> None:
        while not self.free.empty():
            if worker := self.free.get():
                worker.close()


_workers = _Workers()
atexit.register(_workers.close)
if hasattr(os, "register_at_fork"):  # a forked process leaves its parent's workers alone and starts its own
    os.register_at_fork(after_in_child=_workers.reset)


def same_expression(answer: str, truth: str) -> tuple[bool, float | None, float | None, str]:
    r"""Whether two expressions are mathematically equal, their values where they are numbers, and why.

    Raises:
        ValueError: where math-verify is not installed.
    """
    given, known = (
        _FUNCTION.sub("", latex(text)) if "=" not in other else latex(text) for text, other in ((answer, truth), (truth, answer))
    )
    if _squeezed(given) == _squeezed(known):
        return True, None, None, "the same expression"
    if any(_SEVERAL.search(text) for text in (given, known)):
        parts = [sorted(_squeezed(part) for part in re.split(r"[,;]|\bor\b|\band\b", text)) for text in (given, known)]
        return parts[0] == parts[1], None, None, "several equations"
    sides = equation(given), equation(known)
    if len(sides[0]) > 1 and len(sides[1]) > 1 and sides[0][0] != sides[1][0]:
        if all(_NAME.fullmatch(one[0]) and one[0] not in other[1] for one, other in (sides, sides[::-1])):
            return False, None, None, "another name"
        given, known = (f"({left})-({right})" for left, right in sides)
        scaled = True
    else:
        # A name on the left may be dropped where the other has the same or none.
        named = [len(side) == 1 or bool(_NAME.fullmatch(side[0])) or not _LETTER.search(side[0]) for side in sides]
        if not all(named) and len(sides[0]) != len(sides[1]):
            return False, None, None, "only one is an equation"
        given, known, scaled = sides[0][-1], sides[1][-1], False
        if _squeezed(given) == _squeezed(known):
            return True, None, None, "the same expression"
    exact = same_rational(given, known, scaled=scaled)
    if exact and any(exact):
        return exact[0], None, None, "mathematically equal" if exact[0] else "another expression"
    for name, text in (("the answer", given), ("the ground truth", known)):
        if problem := refused(text):
            return False, None, None, f"{name} {problem}"
    result = _compared(given, known)
    if scaled and not result[0]:
        result = _compared(f"-({given})", known)
    if exact:  # numbers that differ, if only beyond the digits of a float
        return False, result[1], result[2], DIFFERENT
    return (result[0], None, None, result[3]) if scaled else result


def _squeezed(text: str) -> str:
    return re.sub(r"(\\[A-Za-z]+)\s+(?=[A-Za-z])|\s+", lambda found: f"{found[1]} " if found[1] else "", text)  # \pi R


def equation(text: str) -> list[str]:
    """The left and the right side of an equation, without spaces; of a chain `y = a = b` the first and the last."""
    sides = [_squeezed(side) for side in _EQUALS.split(text)]
    if len(sides) == 1 or not all(sides):
        return [text]
    left = "y" if sides[0] == "f(x)" else sides[0]
    return [left if _NAME.fullmatch(left) or len(sides) == 2 else sides[-2], sides[-1]]


def other_name(answer: str, truth: str) -> bool:
    """Whether two equations give values to different names: `m = 2` and `n = 2`."""
    sides = equation(latex(answer)) if "=" in answer else [], equation(latex(truth)) if "=" in truth else []
    named = [side[0] for side in sides if len(side) == 2 and _NAME.fullmatch(side[0])]
    return len(named) == 2 and named[0] != named[1]


@lru_cache(maxsize=4096)
def _compared(given: str, known: str) -> tuple[bool, float | None, float | None, str]:
    result = _workers.ask(*_small(given, known))
    if result is None:
        return False, None, None, f"not decided within {SECONDS:g} s and the limit of memory"
    return (*result, "mathematically equal" if result[0] else "another expression")


def _small(*texts: str) -> list[str]:
    """Expressions with unused small letters for their capitals, which math-verify does not tell from small ones."""
    capitals = sorted({found[1] for text in texts for found in _CAPITAL.finditer(text) if found[1]})
    used = re.sub(r"\\[A-Za-z]+", "", "".join(texts))
    other = dict(zip(capitals, (letter for letter in "xyzuvwpqabckmntrshjl" if letter not in used), strict=False))
    return [_CAPITAL.sub(lambda found: other.get(found[1] or "", found[0]), text) for text in texts]


def latex(text: str) -> str:
    """Write an expression in LaTeX."""
    text = undress(text).rstrip(" .。,")
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|!|:)", "", text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac"))
    text = re.sub(
        r"\\(?:text|mathrm)\s?\{\s*([^{}]{0,40})\}(?:\^\{?[23]\}?)?", lambda found: "" if len(found[1]) > 1 else found[1], text
    )
    roots = r"√\s?\(([^()]{1,100})\)|√\s?\{([^{}]{1,100})\}|√\s?(\w+)|(?<![\\\w])sqrt\s?\(([^()]{1,100})\)"
    text = re.sub(roots, lambda found: f"\\sqrt{{{next(filter(None, found.groups()))}}}", text)
    if not text.isascii():
        text = "".join(_LATEX.get(character, character) for character in text)
        text = re.sub(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: plain_math(found[0]).replace("^", "^{", 1) + "}", text)
    if re.search(r"\b(?:sin|cos|tan|cot|sec|csc)|\\(?:sin|cos|tan|cot|sec|csc)", text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s?(?:°|\^\s?\{?\\circ\}?)", r"(\1 \\cdot \\frac{\\pi}{180})", text)
    text = re.sub(r"\*\*", "^", text).replace("*", " \\cdot ").replace("\\cdotp", "\\cdot")
    text = re.sub(r"\^\s?\(([^()]{1,60})\)", r"^{\1}", text)
    text = re.sub(r"\^(-?\d{2,})", r"^{\1}", text)
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![A-Za-z])", r"\\\1", text)
    text = re.sub(r"(?<=[\d}\s)])\s?(?:cm|mm|km|kg|units?|degrees?|°|\^\s?\{?\\circ\}?)(?:\^\{?[23]\}?)?$", "", text)
    if len(found := re.findall(r"\\(?:sum|prod)\s?_\{\s?([ij])\s?=", text)) == 1 and not re.search(r"(?<![A-Za-z\\])k", text):
        text = re.sub(rf"(?<![A-Za-z\\]){found[0]}(?![A-Za-z])", "k", text)  # i would be the imaginary unit
    return re.sub(r"[ \t\n]+", " ", text).strip(" $")


def refused(text: str) -> str:
    """Why an expression is not computed at all; empty where it may be."""
    if len(text) > _LONGEST:
        return f"is longer than {_LONGEST} characters"
    if not text:
        return "is empty"
    if max(accumulate((character in "{([") - (character in "})]") for character in text)) > 30:
        return "is nested more than 30 deep"
    plain = re.sub(r"[{}()\s]", "", re.sub(r"\\(?:sum|prod)\s?_\{[^{}]{1,20}\}\s?\^(?:\d|\{\d{1,3}\})", " + ", text))
    powers = re.findall(r"\^-?(\d+)", plain)
    large = re.search(r"\d{4,}!|!!|\d!!", plain) or re.search(r"\^[^\s+*/=]{0,40}!", plain)
    if any(len(power) > 3 or int(power) > 400 for power in powers) or re.search(r"(?<![A-Za-z])\d\^-?[\d.]+\^", plain) or large:
        return "has a power or factorial too large to compute"
    return ""


# Rational expressions, compared without a process: sums, products, quotients and whole powers of numbers and variables


_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|(\\frac)|(\\cdot|\\times)|([a-zA-Z])|(.))")
_LONGEST_RATIONAL = 400


class _Other(Exception):
    """The text is something else than a rational expression, or has no value here."""


def same_rational(one: str, other: str, *, scaled: bool = False) -> tuple[bool, bool] | None:
    r"""Whether two rational expressions, LaTeX or plain, are equal, and whether there are variables; None where one is none.

    `scaled` allows a factor, as between 2y - 4 and y - 2. Equal values at two points modulo a prime are equal expressions
    (Schwartz-Zippel: others agree with a chance of about their degree / 2^127 a point). Prime and points come from a hash of both
    texts: the verdict is always the same, and nobody can write a text for a prime that is known before.
    """
    if max(len(one), len(other)) > _LONGEST_RATIONAL:
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
        kinds = {1: "0", 2: "frac", 3: "*", 4: "x"}  # by the groups of _TOKEN; a sign is its own kind
        found = [(one.lastindex or 5, one[one.lastindex or 5]) for one in _TOKEN.finditer(text.strip())]
        self.tokens = [(kinds.get(group, said), said) for group, said in found]
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
        """The kind of the next token; empty at the end."""
        return self.tokens[self.place][0] if self.place < len(self.tokens) else ""

    def take(self) -> tuple[str, str]:
        if self.place >= len(self.tokens):
            raise _Other
        self.place += 1
        return self.tokens[self.place - 1]

    def sum(self) -> int:
        result, sign = 0, 1
        while True:
            while self.next() in {"+", "-"}:
                sign = -sign if self.take()[0] == "-" else sign
            result = (result + sign * self.product()) % self.prime
            if self.next() not in {"+", "-"}:
                return result
            sign = 1

    def product(self) -> int:
        result = self.power()
        while (sign := self.next()) in {"*", "/", "0", "x", "(", "{", "frac"}:
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
        kind, exponent = self.take()
        if kind != "0" or "." in exponent or len(exponent) > 6 or (closing and self.take()[0] != closing) or self.next() == "^":
            raise _Other
        result = pow(base, int(exponent), self.prime)
        return self.inverse(result) if negative else result

    def atom(self) -> int:
        kind, said = self.take()
        if kind == "0":
            whole, _, decimals = said.partition(".")
            return int(whole + decimals) * self.inverse(10 ** len(decimals)) % self.prime
        if kind == "frac":
            return self.atom() * self.inverse(self.atom()) % self.prime
        if kind == "x" and said not in "eiEI":
            self.variables = True
            return _drawn(f"{self.seed}\0{said}\0{self.point}") % self.prime
        closing = {"(": ")", "{": "}", "[": "]"}.get(kind)
        if closing is None:
            raise _Other
        result = self.sum()
        if self.take()[0] != closing:
            raise _Other
        return result

    def inverse(self, value: int) -> int:
        if not value % self.prime:
            raise _Other
        return pow(value, -1, self.prime)
