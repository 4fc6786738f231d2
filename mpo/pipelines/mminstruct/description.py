"""A description in clauses: which words and numbers it has, and what stands beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations

from mpo.data.similar import normalised
from mpo.pipelines.mminstruct.against import figures, rounded
from mpo.pipelines.mminstruct.language import CJK, IDEOGRAPHS, pairs, rule, words

NUMBER = re.compile(r"(?<![\d.])\d{1,15}(?:\.\d{1,15})?(?!\d)")
_WORD = re.compile(rf"\d+(?:\.\d+)?|[^\W\d{IDEOGRAPHS}]+|[{IDEOGRAPHS}]+")
_SENTENCE = re.compile(r"[.](?!\d)|[;!?。；！？\n]")
_LISTED = re.compile(r"(?<=\d), +(?=\d)|\band\b(?=\s*\d+ (?:of|for|in|at)\b)")
_ENDINGS = ("ingly", "edly", "ings", "ness", "ers", "ing", "ies", "en", "ed", "es", "er", "ly", "s", "y", "e")
CLOSED = ("colour", "side", "negated", "reckoned")
"""Rules of words that make two questions different ones."""
_NEAR = (1.0, 0.6, 0.45)  # how much a word tells of its clause, of the next ones, and of others in its sentence


def clauses(text: str) -> list[tuple[int, str]]:
    """The clauses of a text, each with the place of its sentence."""
    parts = ((at, part) for at, one in enumerate(_SENTENCE.split(text)) for part in rule("between").split(one))
    return [(at, part) for at, part in parts if part.strip()]


def stem(word: str) -> str:
    """An English word without its ending, so that its forms are one."""
    end = next((end for end in _ENDINGS if word.endswith(end) and len(word) - len(end) > 2), "") if word.isalpha() else ""
    word = word[: len(word) - len(end)]
    return word[:-1] if len(word) > 3 and word.isalpha() and word[-1] == word[-2] else word


@lru_cache(maxsize=65536)
def tokens(text: str) -> tuple[str, ...]:
    """The words of a text that say something: stems, numbers in digits, in Chinese two characters each.

    >>> tokens("Two wooden boats are moored on the left"), tokens("两只小船")
    (('2', 'wood', 'boat', 'moor', 'left'), ('2', '只小', '小船'))
    """
    found: list[str] = []
    for run in _WORD.findall(figures(text)):
        if not CJK.match(run):
            found += [stem(run)] * (run not in words("empty"))
            continue
        for part in filter(None, rule("empty_zh").split(run)):
            found += [part[at : at + 2] for at in range(len(part) - 1)] or [part]
    return tuple(found)


def reworded(one: str, other: str, *, exact: bool = False) -> bool:
    """Whether two questions have the same words that say something in any order; unless exact, but for one that only one has.

    >>> reworded("Which side is the red tag on?", "On which side is the tag?"), reworded("Who sits on the left?", "Who sits?")
    (False, False)
    """
    same, texts = pairs("reworded"), (normalised(text).split() for text in (one, other))
    first, second = ({*tokens(" ".join(same.get(word, word) for word in text))} for text in texts)
    apart = first ^ second
    closed = any(word.isdigit() or any(rule(kind).search(word) for kind in CLOSED) for word in apart)
    return bool(first & second) and not closed and len(apart) <= (not exact and len(first & second) > 2)


def _read(parts: Iterable[tuple[int, str]]) -> list[tuple[int, frozenset[str], str]]:
    read = ((at, frozenset(tokens(part)) | {*CJK.findall(part)}, figures(part)) for at, part in parts)
    return [one for one in read if one[1]]


class Description:
    """A description in clauses.

    Attributes:
        listed: how many things its sentences may list.
        clauses: of each, the place of its sentence, its `tokens` and its text (`figures`).
        known: all tokens.
        weight: how much each tells: the fewer clauses it is in, the more.
    """

    def __init__(self, text: str) -> None:
        parts = clauses(rule("order").sub("", text))
        self.clauses, self.plain = _read(parts), figures(text)
        self._parts = _read((at, one) for at, part in parts for one in _LISTED.split(part))
        self.known = frozenset(token for _, own, _ in self.clauses for token in own)
        counts = {token: sum(token in own for _, own, _ in self.clauses) for token in self.known}
        self.weight = {token: math.log(1 + len(self.clauses) / count) for token, count in counts.items()}
        self.listed = {str(len(re.findall(r"[,，、]", one)) + more) for one in _SENTENCE.split(text) for more in (1, 2)}
        self._numbers = [*map(Fraction, dict.fromkeys(NUMBER.findall(self.plain)))][:40]

    def has_word(self, word: str) -> bool:
        """Whether it has a token, another form of it, or in Chinese its characters."""
        if CJK.match(word):
            return all(one in self.plain for one in word)
        long = (one for one in self.known if min(len(one), len(word)) > 3)
        return word in self.known or any(one[: len(word)] == word[: len(one)] for one in long)

    def has_number(self, number: str, text: str, derived: bool = False) -> bool:
        """Whether it has a number, also rounded or in another unit; if `derived` or a text computes, those of which it is made."""
        value, known = Fraction(number), self._numbers
        powers = (Fraction(10) ** power for power in (0, -3, 3, -2, 2, 4, -4))
        if value in (0, 1, 2) or any(rounded(number, one * by) for by in powers for one in known):
            return True
        if (value == 30 or value * 2 in known) and re.search(r"\bhalf\b|半", self.plain):  # past
            return True
        years = [one for one in known if 1000 < one < 2100]
        if len(years) > 1 and min(years) < value < max(years):
            return True
        few = known if len(known) < 7 and ("." in number or value > 12) else []
        if any(rounded(number, abs(one - other)) for one, other in combinations(few, 2)):
            return True
        if rule("measured").search(text):
            return True
        if not (self.computes(text) or derived or rule("reckoned").search(text)):
            return False
        made = {sum(map(Fraction, {*NUMBER.findall(plain)}), Fraction()) for _, _, plain in self.clauses} | {sum(known, Fraction())}
        given = [one for one in map(Fraction, NUMBER.findall(figures(text))) if one != value]
        for one, other in combinations({*known, *given}, 2):
            made |= {one + other, abs(one - other), one * other, *([one / other, other / one] if one and other else [])}
        if derived and rule("saved").search(text):  # few of them: there are very many sums
            made |= {one + other - less for one, other in combinations(known[:20], 2) for less in known[:20]}
        return any(rounded(number, one * by) for one in made for by in (1, 100))

    def computes(self, text: str) -> bool:
        """Whether a text asks for what is computed, by a word that the description has not."""
        return any(found[0].casefold() not in self.plain for found in rule("computed").finditer(text))

    def beside(self, about: Collection[str]) -> list[float]:
        """How much of some words is in and around each clause, of those that the description has: 0 to 1."""
        asked = {*about} & self.known
        sides, total = asked & {"left", "right"}, sum(self.weight[one] for one in asked)
        found = [0.0] * len(self.clauses)
        for one in asked:
            places = [(at, clause[0]) for at, clause in enumerate(self.clauses) if one in clause[1]]
            for at, (sentence, _, plain) in enumerate(self.clauses):
                near = [_NEAR[min(abs(at - place), 2)] for place, other in places if other == sentence]
                near += [0.2 if other < sentence else 0.05 for _, other in places if abs(other - sentence) == 1]
                of_other_side = sides and (own := {*rule("side").findall(plain)}) and not own & sides
                found[at] += max(near, default=0.0) * (0.2 if of_other_side else 1.0) * self.weight[one] / total
        return found

    def support(self, said: Sequence[str], beside: Sequence[float]) -> float:
        """How much of what is said one clause has (0 to 1), times how much of the question is beside it."""
        whole = sum(self.weight.get(one, 3.0) for one in said) or 1.0
        shares = (sum(self.weight[one] for one in {*said} & own) / whole for _, own, _ in self.clauses)
        return max((share * (0.1 + near) for share, near in zip(shares, beside, strict=True)), default=0.0)

    def value(self, name: set[str], others: set[str]) -> Fraction | None:
        """The one number that follows a name, before any other name; None where there is none, or several."""
        found: set[str] = set()
        for at, (sentence, own, _) in enumerate(self.clauses):
            numbers: list[str] = []
            for other, there, plain in self.clauses[at:] if name and name <= own else []:
                if other != sentence or others & there or numbers:
                    break
                numbers = [one for one in NUMBER.findall(plain) if one not in name and one != "1"]  # "a red one"
            found |= {*numbers}
        return Fraction(found.pop()) if len(found) == 1 else None

    def of_another(self, number: str, asked: Collection[str]) -> str | None:
        """The number of what is asked about, where the given one stands beside less of it only: "B is 3, C is 4"."""
        found: list[tuple[frozenset[str], list[str]]] = []
        words, of = set[str](), -1
        for sentence, own, plain in self._parts:
            there = [one for one in NUMBER.findall(plain) if one not in asked and ("." in one) == ("." in number)]
            if sentence == of and found and all(map(NUMBER.fullmatch, own)):  # "5, 6 and 7"
                found[-1][1].extend(there)
                continue
            words, of = {*own} | (words if sentence == of else set()), sentence
            if there:
                found.append((frozenset(words & {*asked}), there))
                words = set()
        most = max((sum(map(self.weight.__getitem__, about)) for about, _ in found), default=0.0)
        top = [(about, there) for about, there in found if sum(map(self.weight.__getitem__, about)) > most - 0.01]
        mine, values = [about for about, there in found if number in there], {one for _, there in top for one in there}
        return values.pop() if len(values) == 1 and mine and all(about < top[0][0] for about in mine) else None

    def rarest(self, name: set[str]) -> set[str]:
        """Those of some words that tell the most."""
        return {one for one in name if self.weight[one] > 0.8 * max(map(self.weight.__getitem__, name))}
