"""Prose: its sentences, which of them conclude or refuse, and the number that a sentence is about."""

from __future__ import annotations

import re
from collections.abc import Collection
from fractions import Fraction

from mpo.verification.dress import without_math_marks
from mpo.verification.number import find_numbers, read_number

REFUSAL = re.compile(
    r"\b(?:sorry|apologi[sz]e|unable to|not able to|(?:ca|do|wo)n['’]t (?:help|see|process|know|determine|tell|answer"
    r"|view|identify|provide|have enough|say|access|be determined)"
    r"|cannot (?:help|see|process|determine|tell|answer|view|identify|provide|say|access|be (?:determined|answered"
    r"|inferred|known))|do not (?:know|have enough)|(?:is|it['’]s|am) (?:not (?:possible|clear|sure|certain)|impossible"
    r"|unclear|unsure|uncertain)"
    r"|not enough information|insufficient (?:information|data)|no way to (?:know|tell)|need more information)\b|无法"
    r"|不能确定|不知道|抱歉|不确定",
    re.IGNORECASE,
)
CUE = re.compile(
    r"(?:^\W{0,4}|[,;:]\s)(?:therefore|thus|hence|so|consequently|accordingly|in conclusion|in summary|to conclude"
    r"|in total|overall(?=,)|(?:the )?(?:final|total) (?:count|number|sum|total|value|result)\b|finally|this means"
    r"|we (?:get|have|find|conclude))\b|∴|因此|所以|故|综上|总共|一共|最终",
    re.IGNORECASE,
)
_POLITE = re.compile(
    r"\b(?:hope (?:this|that|it)|let me know|(?:do|would) you (?:have|want|like|need)|anything else|feel free"
    r"|(?:please )?(?:provide|share) (?:me|more)|if you have any|happy to help)\b"
    r"|^(?:sure|okay|ok|certainly|of course|i see the image|i understand)\b[^.!]{0,60}[.!,]?$",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.!?])[*_\"')\]]{0,3}\s+|(?<=[。！？])|\n+")
BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*|\\boxed\{([^{}]{1,80})\}")
_ABOUT = (
    r"(?:(?:approximately|about|around|roughly|exactly|only|just|equal to|a total of|total of|a|also|now|still"
    r"|the number|the year|year|with"
    r"|大约|约)\W{1,3}){0,3}$"
)
_COPULA = re.compile(
    r"(?:\b(?:is|are|was|were|equals?|be|shows?|reads?|contain(?:s|ing)?|find|get|got|gives?(?: us)?|left|leaves|means)"
    r"|=|≈|:|：|是|为|有|等于|得)\W{0,4}" + _ABOUT,
    re.IGNORECASE,
)
_PREPOSITION = re.compile(r"\b(?:has|have|had|of|to|at|in|as)\W{0,4}" + _ABOUT, re.IGNORECASE)
_NO_ANSWER = re.compile(
    r"(?:\b(?:step|figure|fig|option|choice|question|image|table|page|number|line|row|column|point|angle|triangle|grade"
    r"|level|than|not|(?:divided|multiplied) by|per|from|within|above|below|over|under)|[∠△])\s?[#(]?$",
    re.IGNORECASE,
)


MOST_SENTENCES, MOST_CHARACTERS = 400, 2000
"""Sentences that are read, of the beginning and the end, and characters of each."""


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, without courtesies where there is anything else.

    >>> sentences_of("It is 7. I hope this helps!")
    ['It is 7.']
    """
    found = [sentence.strip()[:MOST_CHARACTERS] for sentence in _SENTENCE.split(text) if sentence and sentence.strip()]
    if len(found) > MOST_SENTENCES:
        found = found[: MOST_SENTENCES // 2] + found[-MOST_SENTENCES // 2 :]
    return [sentence for sentence in found if not _POLITE.search(sentence)] or found


Found = tuple[int, int, str]
"""Start and end of a number in a sentence, and the number with its unit."""


def numbers_in(sentence: str) -> list[Found]:
    """Return the numbers of a sentence that may be an answer: not `Step 2`, `option 1` or `angle 3`."""
    bulleted = re.sub(r"^\s*(?:\d{1,2}[.)]\s|#+ )", lambda found: " " * len(found[0]), sentence)
    return [found for found in find_numbers(bulleted) if not _NO_ANSWER.search(bulleted[max(0, found[0] - 14) : found[0]])]


def stated_number(sentence: str, givens: Collection[Fraction] = ()) -> str | None:
    """Return the number that a sentence of prose is about; empty where it hedges; None where there is none.

    It is the bold one, or the last one after a verb such as `is`, or the first one. Those that the question gives come last.

    >>> stated_number("There are 3 bars with values below 40."), stated_number("It is 5 or 6."), stated_number("It is red.")
    ('3 bars', '', None)

    Args:
        sentence: the sentence.
        givens: the values in the question.
    """
    sentence = without_math_marks(sentence)
    for a, b in reversed(BOLD.findall(sentence)):
        if read_number(a or b) is not None:
            return str(a or b)
        if inside := numbers_in(a or b):
            return inside[-1][2]
    plain = sentence.replace("**", "")
    found = numbers_in(plain)
    if not found:
        return None
    if re.search(r"\d(?::| : )\d", plain):  # a ratio or a time
        return ""
    different = len({shown for _, _, shown in found}) > 1
    if different and (len(found) == 2 and re.search(r"\bbetween \S+ (?:and|to) \S+", plain) or re.search(r"\beither\b", plain)):
        return ""
    if spans := [found.span() for found in re.finditer(r"\b(?:between|from) \S{1,20} (?:and|to) \S{1,20}", plain)]:
        outside = [number for number in found if not any(start <= number[0] < end for start, end in spans)]
        found = outside or found
    for (_, end, _), (start, _, _) in zip(found, found[1:], strict=False):
        if re.fullmatch(r"\s?(?:or|and|to|–|或|和|至|到)\s?", plain[end:start]):
            return ""
    fresh = [number for number in found if (read := read_number(number[2])) is None or read.value not in givens] or found
    for verb in (_COPULA, _PREPOSITION):
        if after := [shown for start, _, shown in fresh if verb.search(plain[max(0, start - 40) : start])]:
            return after[-1]
    return fresh[0][2]


_FUNCTION_WORDS = frozenset(
    "is are was were be been do does did has have had can could will would should a an "
    "the this these those that there it in on of at to and or as image picture figure graph chart".split()
)


def content_words(text: str) -> list[str]:
    """Return the words of a text that carry its content, in the singular and in order.

    >>> content_words("Are these cats black?")
    ['cat', 'black']
    """
    words = re.findall(r"[^\W_]+", text.lower().replace("n't", " not"))
    return [
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
        for word in words
        if word not in _FUNCTION_WORDS
    ]
