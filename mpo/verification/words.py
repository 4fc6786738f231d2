"""Numbers in words, English and Chinese: their vocabulary, and what they are worth."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

_ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
_ONES += " nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
SMALL = dict(zip(_ONES.split(), range(20), strict=True)) | dict(zip(_TENS.split(), range(20, 100, 10), strict=True))
LARGE = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4, "twelfth": 12, "twelfths": 12}
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
PARTS |= {word + plural: parts for parts, word in enumerate(ORDINALS[2:], 3) for plural in ("", "s")}
_SETS = {"dozen": 12, "couple": 2, "score": 20}
_CHINESE = {character: number for number, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}
_CHINESE_SCALES = (("亿", 10**8), ("万", 10**4))
WORD = rf"(?:{'|'.join([*SMALL, *LARGE])})"
_PART = rf"(?:{'|'.join(PARTS)})"
_MANY = rf"(?:{'|'.join([*LARGE, *_SETS])})"
WORDS = rf"(?<![\w-]){WORD}(?:[ -](?:and[ -])?{WORD}){{0,12}}(?![\w-])"
PHRASE = (  # half a million, two and a half million, a dozen, three quarters of an hour
    rf"(?<![\w-])(?:(?:an? )?(?:half|quarter)[ -]{_MANY}"
    rf"|(?:half|(?:(?:an?|{WORD}) )?{_PART}) (?:of )?an? (?:{_MANY}|(?=(?:hour|day|year|minute|mile|meter|kilo)))"
    rf"|(?:an?|{WORD}) and (?:a|{WORD})[ -]{_PART}(?: {_MANY})?"
    rf"|(?:one|{WORD}(?=-\w+s\b))-{_PART}|(?:half )?(?:an?|{WORD}) {_MANY})(?![\w-])"
)
HAN = "[零〇一二两三四五六七八九十百千万亿]"
"""A digit or a unit of a Chinese number."""
CLASSIFIER = "[个只条张人位年岁米厘件种次天块本辆座棵公千克元度小分周秒倍斤]"
_VAGUE = re.compile(  # 三四 (three or four), 二三十, 十七八, 一点 (a little)
    r"^(?:一二|[二两]三|三四|四五|五六|六七|七八|八九)(?![零〇一二三四五六七八九])|[一二两三四五六七八九]{2}(?=[十百千万亿])|(?<=[十百千万亿])[一二两三四五六七八九]{2}|点$"
)


class Worded(NamedTuple):
    """A number in words."""

    value: Fraction
    rest: str  # what follows it, which may be its unit
    unit: str = ""  # the unit that the words themselves say: `百分之五` is 5 %
    step: Fraction = Fraction(0)  # the place of its last decimal, as in `mpo.verification.number.Number`


def english(text: str) -> Worded | None:
    """Read a number in English words at the beginning of a text: `two and a half million dollars`, `half an hour`."""
    text = re.sub(rf"\b(half|quarter)-(?={_MANY}\b)", r"\1 ", text)
    text = re.sub(rf"^(an?|{WORD}|\d+) ([a-z]+) and an? ({_PART})$", r"\1 and a \3 \2", text)  # an hour and a half
    text = re.sub(rf"^(one|{WORD}(?=-\w+s\b))-({_PART})\b", r"\1 \2", text)  # three-fourths
    step = Fraction(0)
    if found := re.match(rf"(?:an? )?({_PART})\b(?!-)", text):
        value: Fraction | None = Fraction(1, PARTS[found[1]])
    elif found := re.match(rf"(?:half )?an? (?={_MANY}\b)|(?=(?:dozen|point)\b)|an? (?=and a {_PART})", text):
        value = Fraction(not text.startswith("point"))
    elif found := re.match(rf"{WORD}(?= and {WORD}[ -]{_PART}\b)", text) or re.match(WORDS, text):
        value = _cardinal(re.split(r"[ -]", found[0]))
    else:
        found = re.match(rf"\d{{1,9}}(?= and an? {_PART}\b)", text)
        value = Fraction(found[0]) if found else None
    if value is None or found is None:
        return None
    rest, part_of = text[found.end() :].strip(), found.re.pattern.startswith("(?:an? )?(")
    if part := re.match(rf"and (an?|{WORD})[ -]({_PART})\b", rest):
        value, rest = value + Fraction(SMALL.get(part[1], 1), PARTS[part[2]]), rest[part.end() :].strip()
    elif not part_of and (part := re.match(rf"({_PART})\b", rest)):
        value, rest, part_of = value / PARTS[part[1]], rest[part.end() :].strip(), True
    elif part := re.match(r"point ((?:[a-z]+ )*[a-z]+)$", rest):
        tail = [SMALL.get(word, 99) for word in part[1].split()]
        if max(tail) > 9:
            return None
        step = Fraction(1, 10 ** len(tail))
        value, rest = value + int("".join(map(str, tail))) * step, ""
    if text.startswith("point") and not step:  # Point A
        return None
    rest = re.sub(r"^(?:of )?an? (?=\w)", "", rest) if part_of else rest
    if many := re.match(rf"(?:an? )?({_MANY})\b", rest):
        value, rest = value * (LARGE | _SETS)[many[1]], re.sub(r"^of ", "", rest[many.end() :].strip())
    return Worded(value, rest, step=step)


def _cardinal(words: list[str]) -> Fraction | None:
    total, current, previous = 0, 0, ""
    for word in (word for word in words if word != "and"):
        if word in SMALL and previous in SMALL and not (20 <= SMALL[previous] and SMALL[word] < 10):
            return None  # "two three" is two numbers
        if word in SMALL or word == "hundred":
            current = current + SMALL[word] if word in SMALL else (current or 1) * 100
        else:
            total, current = total + (current or 1) * LARGE[word], 0
        previous = word
    return Fraction(total + current)


def read_han(text: str) -> Fraction | None:
    """The value of Chinese or plain digits; None where there are none."""
    if re.fullmatch(r"\d+(?:\.\d+)?", text):
        return Fraction(text)
    if _VAGUE.search(text):
        return None
    for scale, size in ((scale, size) for scale, size in _CHINESE_SCALES if scale in text):
        many, rest = (
            read_han(part) if part else Fraction(default) for part, default in zip(text.split(scale, 1), (1, 0), strict=True)
        )
        short = _CHINESE.get(text[-1], 0) if text[-2:-1] == scale else 0  # 一万五 is 15,000
        return None if many is None or rest is None else many * size + (short * size // 10 or rest)
    whole, _, decimals = text.partition("点")
    if not whole or not set(whole) <= {*_CHINESE, *_CHINESE_UNITS} or not set(decimals) <= set(_CHINESE):
        return None
    total, current = 0, 0
    for place, character in enumerate(whole):
        if character in _CHINESE_UNITS:
            total, current = total + (current or 1) * _CHINESE_UNITS[character], 0
        else:
            current = current * 10 * (whole[place - 1] in _CHINESE) + _CHINESE[character]
    if current and not decimals and whole[-2:-1] in {"百", "千"}:  # 一千二 is 1,200
        current *= _CHINESE_UNITS[whole[-2]] // 10
    return total + current + Fraction(int("0" + "".join(str(_CHINESE[character]) for character in decimals)), 10 ** len(decimals))


def chinese(text: str) -> Worded | None:
    """Read a number in Chinese at the beginning of a text: `三分之一`, `百分之五`, `一个半小时`."""
    figure = rf"(?:{HAN[:-1]}点]+|\d+(?:\.\d+)?)"
    percent = {"百": "%", "千": "‰"}
    value: Fraction | None = None
    if found := re.match(rf"(?:({figure})又)?({figure})分之({figure})", text):
        whole, below, above = (read_han(part or "零") for part in found.groups())
        if whole is None or above is None or not below:
            return None
        value, unit = (above, percent[found[2]]) if found[2] in percent else (whole + above / below, "")
    elif found := re.match(r"一?半", text):
        value, unit = Fraction(1, 2), ""
    elif re.match("[百千万亿](?=[^零〇一二两三四五六七八九十百千万亿])", text):
        return None  # 千克 is a unit
    elif found := re.match(rf"({figure})(?=[个打成折]|分之|{CLASSIFIER}|[^\u4e00-\u9fff]|$)", text):
        value, unit = read_han(found[1]), ""
    if found is None or value is None:
        return None
    rest = text[found.end() :].strip()
    if rest[:1] == "打":
        value, rest = value * 12, rest[1:]
    elif rest in {"成", "折"}:
        value, unit, rest = value * 10, "%", ""
    if half := re.fullmatch(r"(个)半(\S*)|(\S{1,2})半", rest):  # 一个半小时, 两年半
        value, rest = value + Fraction(1, 2), half[2] or half[3] or ""
    return Worded(value, rest, unit)
