"""Answers to questions with blanks: `The area is ____ and the perimeter is ____.`"""

from __future__ import annotations

import re

from mpo.verification.sequences import labelled, read_list
from mpo.verification.words import ORDINALS

_BLANK = re.compile(
    r"_{2,}|\\_(?:\\_)+|\\underline\{[\s\\,~quad]*\}|[(（]\s{1,20}[)）]|【\s*】|\[\s*(?:blank|mask)\s*\]", re.IGNORECASE
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_PLACE = re.compile(
    rf"(?i)(?:\b(?P<word>{'|'.join(ORDINALS)}) blank|\bblank\s?[(#]?(?P<number>\d)[)]?"
    r"|第(?P<han>[一二三四五六\d])[个]?空格?)\s?(?:is|should be|:|：|填|为|是|应填|=)\s?[:：]?\s?"
    r"(?P<value>[^\n;；。]{1,80}?)(?=\s?(?:[;；。\n]|\.(?:\s|$)|$"
    r"|[,，]?\s?(?:and |和)?(?:the )?(?:\w+ blank|blank\s?[(#]?\d|第[一二三四五六\d])))"
)
_ASKS = re.compile(r"(?i)[?？]|^(?:what|how|which|find|calculate|compute|determine|name|give|state|求|计算|写出)")
_FIRST = re.compile(r"(?i)(?:^|(?<=[\s,.;:：，。；?？]))(?:part |question )?(?:[(（]?(?:1|a|i)[)）.:：]|①)")


def count_blanks(asked: str) -> int:
    """Return how many blanks a question has."""
    return len(_BLANK.findall(asked[-4000:]))


def count_parts(asked: str) -> int:
    """Return how many answers a question wants in order: one a blank, or one for each of its labelled questions."""
    if blanks := count_blanks(asked):
        return blanks
    start = _FIRST.search(asked[-4000:])
    parts = labelled(asked[-4000:][start.start() :]) if start else None
    return len(parts) if parts and all(_ASKS.search(part) for part in parts) else 0


def in_parts(text: str, many: int) -> list[str]:
    """Return so many parts of an answer: those with labels or between semicolons where it has as many, as parts may have commas."""
    parts = labelled(text) or [part.strip() for part in re.split("[;；]", text.strip(" ;；"))]
    return parts if len(parts) == many else read_list(text)[0]


def filled(response: str, asked: str) -> list[str] | None:
    """Return what a response writes into the blanks of a question, in order; None where it does not say it for each.

    It repeats the question with its blanks filled, or names each blank by its number.
    """
    asked, response = asked[-4000:], response[-4000:]
    many = count_blanks(asked)
    if not many:
        return None
    named = {}
    for found in _PLACE.finditer(response):
        said = (found["word"] or found["number"] or found["han"]).lower()
        place = ORDINALS.index(said) + 1 if said in ORDINALS else "一二三四五六".find(said) + 1 or int(said)
        named[place] = found["value"].strip(" *")
    if many > 1 and sorted(named) == list(range(1, many + 1)):
        return [named[place] for place in sorted(named)]
    with_blanks = [part for part in _SENTENCE.split(asked) if part and _BLANK.search(part)]
    if len(with_blanks) > 1 or not re.search(r"\w{2}|[\u4e00-\u9fff]", _BLANK.sub("", with_blanks[0])):
        return None
    pieces = [r"\W+".join(map(re.escape, re.findall(r"\w+", piece))) for piece in _BLANK.split(with_blanks[0])]
    if not all(pieces[1:-1]):  # two blanks side by side
        return None
    starts = [found.end() for found in re.finditer(rf"(?i)(?<!\w){pieces[0]}", response)] if pieces[0] else [0]
    return next((values for start in reversed(starts[-20:]) if (values := _between(response, start, pieces[1:]))), None)


def _between(text: str, place: int, pieces: list[str]) -> list[str] | None:
    """What stands before each of the pieces, from a place of a text; None where one is missing or far away."""
    values = []
    for piece in pieces:
        end = re.compile(rf"(?i)(?<!\w){piece}(?!\w)" if piece else r"[*\s]*(?:[.。!;；](?=\s|$)|[。；]|\n|$)").search(text, place)
        if end is None or end.start() - place > 80:
            return None
        values.append(text[place : end.start()].strip(" \n\t*$,，:：。."))
        place = end.end()
    return values if all(values) else None
