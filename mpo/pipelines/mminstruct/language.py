"""What a text's form tells: its language, its length, and whether it refuses or speaks of a caption (``rules.yaml``)."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, cast
from unicodedata import normalize

import yaml

from mpo.pipelines.mminstruct.domains import OURS

LONGEST_SHORT = {"en": 12, "zh": 24}
SHORTEST_LONG = {"en": 8, "zh": 12}
"""Limits of answers: words in English, characters in Chinese."""
IDEOGRAPHS = r"\u3400-\u9fff\uf900-\ufaff"
CJK = re.compile(f"[{IDEOGRAPHS}]")
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\uac00-\ud7af]+")
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_THOUGHT = re.compile(r".*</think(?:ing)?>|<think(?:ing)?>.*", re.DOTALL | re.IGNORECASE)
_LATIN = 0x250
"""The first character after those of Latin scripts with accents."""


@cache
def _rules() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("rules.yaml").read_text(encoding="utf-8"))
    return {
        name: re.compile("|".join(own), re.IGNORECASE)
        if isinstance(own, list)
        else frozenset(own.split())
        if isinstance(own, str)
        else own
        for name, own in found.items()
    }


def rule(name: str) -> re.Pattern[str]:
    """A regular expression of ``rules.yaml``."""
    return cast(re.Pattern[str], _rules()[name])


def words(name: str) -> frozenset[str]:
    """Words of ``rules.yaml``."""
    return cast(frozenset[str], _rules()[name])


def pairs(name: str) -> dict[str, str]:
    """Words of ``rules.yaml``, each with another one."""
    return cast(dict[str, str], _rules()[name])


@cache
def seed_text() -> str:
    """All seed questions, whose words are no names."""
    return OURS.read_text(encoding="utf-8") + " ".join(words("english") | words("empty"))


@cache
def vocabulary() -> frozenset[str]:
    """English words that are no names."""
    return words("english") | words("empty") | {*re.findall(r"(?<![A-Za-z])[a-z]{3,}(?![A-Za-z])", seed_text())}


def length(text: str, language: str) -> int:
    """The length of a text: words, or in Chinese characters, those of other scripts' words counting once.

    >>> length("Two red cars.", "en"), length("两辆红色的车 BMW。", "zh")
    (3, 7)
    """
    count = len(re.findall(r"\w+(?:[-'’.,]\w+)*", CJK.sub(" ", text)))
    return count if language == "en" else count + len(CJK.findall(text))


def without_thinking(text: str) -> str:
    r"""A response without what a model thinks before it answers; nothing of one that was cut off while it thinks.

    >>> without_thinking("<think>A cat, so yes.</think>\n\nYes"), without_thinking("<think>A cat, or")
    ('Yes', '')
    """
    return _THOUGHT.sub("", text).strip()


def found_in(text: str, name: str) -> str | None:
    """The words that a rule finds in a text, such as those by which it refuses (``refuses``) or speaks of a ``caption``.

    >>> found_in("I'm sorry, but I can't view images.", "refuses"), found_in("A sign says sorry.", "refuses")
    ("I'm sorry", None)
    """
    found = _rules()[name].search(text)
    return found[0] if found else None


def other_language(text: str, language: str, known: str = "") -> bool:
    """Whether a text is in another language than it should be.

    Words of the other script are right where they are known: as in the caption, or in text that was read in the image.

    Args:
        text: the text.
        language: ``en`` or ``zh``.
        known: such texts.

    >>> [other_language(text, "en") for text in ("Quelle couleur domine ici clairement?", "红色", "Which colour dominates here?")]
    [True, True, False]
    >>> other_language("red", "zh"), other_language("BMW", "zh", "BMW汽车")
    (True, False)
    """
    seen = known.casefold()
    said = [word for word in _WORD.findall(CJK.sub(" ", text)) if len(word) > 1]
    new = [word for word in said if word.casefold() not in seen]
    if any(run.casefold() not in seen for run in _KANA.findall(text)):
        return True
    lead = re.match(r"\W*((?:[^\W\d_]+ )*[^\W\d_]+)[:：]", text)  # "Bitte antworte kurz: ..."
    first = {*_WORD.findall(lead[1])} if lead and not lead[1].istitle() else set[str]()
    if sum(len(word) > 3 for word in first & {*new}) > 1 and vocabulary().isdisjoint(map(str.casefold, first)):
        return True
    traditional = seen and rule("traditional").search(text) and not rule("traditional").search(seen)
    if traditional or (language == "en" and _new_article(text, seen)):
        return True
    if language == "zh":
        if sum(one.isalpha() and ord(one) >= _LATIN and not CJK.match(one) and one.casefold() not in seen for one in text) > 4:
            return True
        text = re.sub('“[^”]*”|"[^"]*"', "", text) if CJK.search(text) else text  # a slogan, a sign
        runs = [_WORD.findall(run) for run in CJK.split(text)]  # "哪一类 of 柱子", not "Bank of China"
        own = any({*run} <= vocabulary() and not {*run}.isdisjoint(new) for run in runs if run)
        own = own or any(one in new for one in re.findall(rf"(?:^|(?<=[{IDEOGRAPHS}]))[a-z]{{4,}}(?=[{IDEOGRAPHS}])", text))
        own = own or any(sum(map(str.islower, {*run} & {*new} - words("empty"))) > 1 for run in runs)
        own = own or any(len({*_WORD.findall(run)} & {*new}) > 3 for run in CJK.split(text))
        return own or len(new) > len(CJK.findall(text)) // 2
    if any(run not in seen for run in re.findall(f"{CJK.pattern}+", text)) or any(map(_other_script, new)):
        return True
    parts = [part for part in re.findall(r"(?:[^.!?\n]|\.(?=\d))+[.!?]*", text) if _WORD.search(part)]
    none = not any(word.casefold() in words("english") for word in said)
    return any(_foreign(part, {*new}, none) for part in parts)


def _new_article(text: str, seen: str) -> bool:
    article = rule("article").match(text)
    return article is not None and f"{article[0].strip()} ".casefold() not in seen


def _other_script(word: str) -> bool:
    """Whether a word has letters that are not Latin, but for one or two Greek ones, which are symbols: `ΔSSIM`, `kΩ`."""
    letters = [one for one in normalize("NFKC", word) if one.isalpha() and ord(one) >= _LATIN]
    return len(letters) > 2 or any(not "\u0370" <= one <= "\u03ff" for one in letters)


def _foreign(sentence: str, new: set[str], alone: bool) -> bool:
    """Whether a sentence has more of other languages' small words than of English ones, or is of some length and has none.

    Names and orders in English have none either: unless all of the text has none, the sentence has letters with accents too.
    """
    said = [word.casefold() for word in _WORD.findall(sentence)]
    english, foreign = (sum(word in words(name) for word in said) for name in ("english", "foreign"))
    count, asks = sum(word in new for word in _WORD.findall(sentence)), "?" in sentence
    if foreign > english and count >= 2:
        return asks or foreign > 1 or count >= 5 or re.search(r"[^\W\d_a-zA-Z]", sentence) is not None
    return not english and count >= (3 if asks else 5) and (alone or re.search(r"[^\W\d_a-zA-Z]", sentence) is not None)
