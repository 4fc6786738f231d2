"""What shows in the form of a text alone: that it is cut off, or says again what it has said."""

from __future__ import annotations

import re
from collections import Counter

from mpo.data.degenerate import find_degenerate
from mpo.data.similar import normalised
from mpo.pipelines.mminstruct.language import CJK, found_in, length, rule, vocabulary


def find_cut(text: str, kind: str, language: str, known: str) -> str | None:
    """Where a question or an answer is cut off: it has not its end or its start, or what it opens stays open.

    Args:
        text: the text.
        kind: ``question``, or the type of the answer.
        language: ``en`` or ``zh``.
        known: the description of its image, if there is one.

    >>> find_cut("A red car and a", "long", "en", ""), find_cut("What colour is the c", "question", "en", "A red car.")
    ('a', 'What colour is the c')
    """
    if (kind in ("question", "long") or length(text, language) > 1) and (said := found_in(text, f"cut_{language}")):
        return said
    opened = [len(re.findall(one, text)) for one in (r"[(\[{（【《“「]", r"[)\]}）】》”」]", r'(?<!\d)"')]
    if (opened[0] > opened[1] and not re.search(r"[:;]\W?\(", text)) or (opened[2] % 2 and text.count('"') % 2):
        return text[-20:]
    if not known or kind not in ("question", "long"):
        return text[-20:] if known and kind == "short" and " " in text and _in_a_word(text, known, 3) else None
    if kind == "long":
        listed = re.match(r"\s*(?:[-*•]|\d+[.)、])", text.rsplit("\n", 1)[-1])
        if _in_a_word(text.rstrip(" ."), known) or re.search(r"\b(?:a|an|the|and|or|of|with|from)\.$", text):
            return text[-20:]
        return None if listed or re.search(r"[.!?。！？:]\W*$|[|`]$", text) else text[-20:]
    if language == "zh" or re.search(r"[?？]|(?:[.!:)）\"”’'。$]|__)$", text) or _asks_all(text, known):
        return text[:20] if found_in(text, "headless") else None
    return text[-20:]


def _in_a_word(text: str, known: str, least: int = 1) -> bool:
    """Whether a text ends in the middle of a word that is known, with at least so many letters to come."""
    part = re.search(r"[A-Za-z]{2,}$" if least > 1 else r"[A-Za-z]+$", text)
    longer = part and re.search(rf"\b{part[0]}(?!\b|e?[sdnr]\b|ing\b|l?y\b)\w{{{least},}}", known)
    return bool(part and longer and not re.search(rf"\b{part[0]}\b", known) and part[0] not in vocabulary())


def _asks_all(text: str, known: str) -> bool:
    """Whether an English question without a mark at its end asks for something, and ends with a word that is one."""
    last = re.search(r"\b[a-z]+$", text)
    word = last is None or last[0] in vocabulary() or re.search(rf"\b{last[0]}\b", known)
    return bool(word and rule("asks_en").match(text)) and not _in_a_word(text, known) and not rule("open_end").search(text)


def find_repetition(text: str, most: int) -> str | None:
    """What a text says again: a word four times in a row, a sentence more than `most` times, or as `find_degenerate`.

    >>> find_repetition("A red car. A red car. A red car.", 2), find_repetition("A red car.", 2)
    ('A red car', None)
    """
    again = rf"\b(\w+)(?:\W+\1\b){{3,}}|({CJK.pattern}{{2,8}}?)\2{{3,}}|(\d+\.\d+)(?:\W+\3\b){{3,}}"
    again += rf"|({CJK.pattern}{{3,9}}?)\4\4|\b(\w+ \w+(?: \w+){{,4}})(?:\W+\5\b){{2}}"
    again += rf"|((?=\S{{0,4}}\w)\S{{2,6}}?)\6{{4}}|({CJK.pattern})\7{{3}}"
    if found := re.search(again, text, re.IGNORECASE):
        said: str = next(filter(None, found.groups()))
        return None if said.isdigit() else said
    if len(twice := re.findall(r"\b([^\W\d]+) \1\b", text, re.IGNORECASE)) > 2:
        return str(twice[0])
    text = re.sub(r"(?m)^\s*(?:\d+[.)、]|[-*•])\s", "", text)
    parts = [*map(normalised, re.split(r"(?<!\d)[.]|[.](?=\s|$)|[!?。！？\n]+", text))]
    sentences = Counter(part for part in parts if len(part) > 5)
    long = {part for part in sentences if len(part) > 40 or len(CJK.findall(part)) > 15}
    ends = {part for part in parts if len(part) > 12 and part == parts[0]} & {*[part for part in parts if part][-1:]}
    many = next((part for part, count in sentences.items() if count > (1 if part in long | ends else most)), None)
    return many or next((found.rule for found in find_degenerate(text)), None)
