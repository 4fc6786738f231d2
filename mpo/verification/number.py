"""Numbers: read them in the forms that people and models write, and compare them.

`read_number` takes a whole text, `find_numbers` the numbers inside one. Values are exact fractions.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from mpo.verification.dress import plain_sentence, undress
from mpo.verification.units import DECADE, PURE, canonical_unit, conversion, is_unit, temperatures
from mpo.verification.words import CLASSIFIER, HAN, LARGE, PARTS, PHRASE, SMALL, WORD, WORDS, chinese, english, read_han

MAX_LENGTH = 400  # longest text that is read as one number, in characters
_MAX_EXPONENT = 400
_SCALES = LARGE | {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9, "T": 10**12}
_SCALES |= {"dozen": 12, "lakh": 10**5, "crore": 10**7}
_SCALES |= {"千": 10**3, "万": 10**4, "萬": 10**4, "百万": 10**6, "千万": 10**7, "亿": 10**8, "億": 10**8}
_RATE = r"(?:时速|每(?:小时|分钟?|秒))(?:大?约|为|是){0,2}\s?"
_EXPONENT = r"(?:[eE][+-]?\d{1,9}(?![\w.])|\s?(?:[×x*·]|\\times|\\cdot)\s?10\s?\^\s?[({]?\s?([+-]?\d{1,9})\s?[)}]?)"
_DIGITS = r"\d(?:[\d.,'\u2019 ]{0,400}\d)?"
_SCALE = (
    r"(?:\s?(?:(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore|百万|千万|千(?![米克瓦])|[万萬亿億])|(?:M|B|bn|mn)(?![\w/^]|\.C))"
    r"|(?:\s?k|K)(?![\w/^]))"
)
_CURRENCY = r"(?:US\$|[$€£¥₹￥])"
_APPROXIMATE = re.compile(
    r"(?i)^(?:(?:approximately|approx\.?|about|around|roughly|nearly|almost|exactly|only|just|a total of|total of|大约|约为?"
    r"|[~≈∼≃])\s*)+"
)
_ASSIGNED = re.compile(  # by a name, words or arithmetic, not by an equation of variables such as 2y = 4
    r"^(?![^=]*(?:\^|\d\s?[a-z](?![a-z(])|^-\s?[A-Za-z]|(?<![A-Za-z\\])[a-z]\s?[-+*/]\s?[a-z\d](?![a-z])))[^=<>≤≥≠]{1,60}(?<!!)=\s*(?=[^=])"
)
_FORM = re.compile(
    rf"(?P<sign>[+-]?)\s?(?P<currency>{_CURRENCY})?\s?(?P<inner>[+-]?)"
    rf"(?:(?P<whole>\d{{1,9}})\s(?P<top>\d{{1,9}})/(?P<bottom>\d{{1,9}})"
    rf"|(?P<over>{_DIGITS}|\(\s?[+-]?\d{{1,30}}(?:\.\d{{1,30}})?\s?\))\s?/\s?(?P<under>[+-]?\d[\d.]{{0,30}}|\(\s?[+-]?\d{{1,30}}(?:\.\d{{1,30}})?\s?\))"
    rf"|(?P<bare_power>10|2)\s?\^\s?[({{]?(?P<power>[+-]?\d{{1,3}})[)}}]?"
    rf"|(?P<number>{_DIGITS}|\.\d{{1,30}})(?P<exponent>{_EXPONENT})?)(?P<scale>{_SCALE}|(?(currency)\s?T(?!\w)|(?!)))?"
)
_FIND = re.compile(
    rf"(?i)(?<![A-Za-z0-9_.,])(?<!\d[:/])(?:{_RATE})?(?:(?:(?:minus|negative)\s|负)(?=[\d.])\d{{1,20}}(?:\.\d{{1,20}})?|(?:{HAN}{{1,8}}又)?(?:\d{{1,6}}|{HAN}{{1,8}})分之[\d{HAN[1:-1]}点.]{{1,12}}|一半|半(?=个?(?:小时|[年天日]|个月))"
    rf"|(?:[+-](?=[\d$.]))?{_CURRENCY}?(?:\d{{1,9}} \d{{1,9}}/\d{{1,9}}|\d{{1,20}}/\d{{1,20}}"
    rf"|(?:\d{{1,3}}(?:,\d{{2,3}})+(?:\.\d{{1,30}})?"
    rf"|(?<!\broom )(?<!\bbus )(?<!\bgate )(?<!\broute )[1-9]\d{{0,2}}(?:[ \u2009\u202f\u00a0]\d{{3}})+(?![\d/])(?:[.,]\d{{1,30}})?"
    rf"|\d{{1,60}}(?:[.,]\d{{1,60}}){{0,6}}|\.\d{{1,30}}){_EXPONENT}?)(?:{_SCALE})?"
    rf"|{HAN}{{1,12}}(?:点{HAN}{{1,8}})?(?={CLASSIFIER})|{PHRASE}|(?:(?:minus|negative) )?{WORDS})"
)
_UNIT_AFTER = re.compile(
    r"\s?(?!(?:out )?of\b)(?:%|％|°\s?[CF]?\b|[A-Za-z°$€£¥Ωμµ%\u4e00-\u9fff][\w°²³/^·-]{0,20}"
    r"(?:\s(?!(?:with|at|for|in|on|of|from|that|which|who|is|are|was|were|left|when|because|by|as|than|out|below)\b)[a-z]{2,15})?)"
)
_BELOW_ZERO = r"(?:\s?(?:degrees?|°)(?:\s?(?:C|F|Celsius|Fahrenheit)\b)?)?\sbelow zero"
SHARE = re.compile(
    rf"\s(?:out of|of(?= (?:the |these |those )?\d))\s(?:the |these |those |all |every )?(\d[\d,]{{0,12}}|{WORD})(?!\w|[.-]\w)"
)
"""What a number is a part of, after it: `out of 15`."""
_DECADES = "twenties thirties forties fifties sixties seventies eighties nineties".split()
_DECADE = re.compile(  # 1800s may be seconds, the 1800s are not
    rf"(?i)(?:the )?(?:((?:1[5-9]|20)[1-9]0)['’]?s|(?:(nineteen|eighteen)[ -])?({'|'.join(_DECADES)}))"
    rf"|(?:the ['’]?|['’])(\d0|\d\d\d0)['’]?s|(?:(\d\d?|{HAN}{{1,3}})世纪)?(\d{{2,4}}|{HAN}{{1,4}})年代"
)
_LATER = r"(?:,?\s(?:and\s)?|\s?)(?=\d)"
_COMPOUND = re.compile(
    rf"(?<![\w.,])\d{{1,9}}\s?(?:[A-Za-z]{{1,12}}|个?[\u4e00-\u9fff]{{1,2}}|['′](?=\s?\d))"
    rf"(?:{_LATER}\d{{1,9}}(?:\.\d{{1,9}})?\s?(?:[A-Za-z]{{1,12}}|[\u4e00-\u9fff]{{1,2}}|\"|''|″)){{1,3}}(?![\w^²³/·])"
)
_NO_UNIT = re.compile(
    r"(?i)[+=√π\\|<>_±×÷?]|\^(?!\{?[23])|\s[-*/]\s|\b(?:or|and|to|not|but|more|less|than|at least|is|are|was|were|has|have|had|can"
    r"|plus|minus|past|after|times(?!$)|over|divided|mod|ln|log|factorial|tens|hundreds)\b|^(?:squared|cubed|[ap]\.?m)\b|[或和到是为有]"
)
_GROUPED = re.compile(r"(?!0)\d{1,3}(?:([ ,.'\u2019])\d{3})(?:\1\d{3})*|(?!0)\d{1,2}(?:,\d{2})+,\d{3}")
_OPERATOR = r"(?:[-+*/^×·÷±_]|\\(?:times|cdot|div|pm)(?![A-Za-z]))"
_ATOM = (
    r"(?>\d+(?:[.,]\d+)*|(?:\\|(?<![A-Za-z]))(?:sin|cos|tan|log|ln|exp|sqrt)(?![A-Za-z])(?:_\{?\w\}?)?\s?"
    r"|\\(?:[dt]?frac|[dt]?binom|overline|sqrt|pi|theta|alpha|circ)(?![A-Za-z])(?:\[\d\])?(?:\s?\{(?:[^{}\n]|\{[^{}\n]{0,40}\}){0,60}\}){0,2}"
    r"|√|π|(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|\((?=[^()]*[\d\\√π+*/])[-+*/^√π\\{}\d.a-z× ]{1,40}\)|[²³°]"
    r"|!(?=\s?[-+*/=(!])|\{[^{}\n]{1,40}\})"
)
_RUN = re.compile(rf"(?<![\w.,\\'’])(?<!\d )(?:[-+±](?=\S))?{_ATOM}(?>(?:\s?{_OPERATOR}\s?-?| (?=\\[fstlcp]))?{_ATOM}){{0,60}}")
"""Atoms of mathematics, side by side or with operators between them: of those, numbers alone are found as numbers."""
_BELOW = re.compile(_BELOW_ZERO)
_ZERO = Fraction(0)
_AS_WRITTEN = [(Fraction(1), _ZERO)]


@dataclass(frozen=True)
class Number:
    """A number as written.

    Attributes:
        value: its value, without its unit: `50%` is 50.
        unit: its unit in the form of `mpo.verification.units`; empty where none is written.
        step: the place of its last decimal: 1/100 for `1.25`; 0 for whole numbers and fractions, which are exact.
        digits: significant digits of a decimal number; 0 for a fraction.
        whole: what it is a part of, as written: 15 for `12 out of 15`; 0 where nothing is said.
    """

    value: Fraction
    unit: str = ""
    step: Fraction = Fraction(0)
    digits: int = 0
    whole: Fraction = Fraction(0)


def read_number(text: str) -> Number | None:
    r"""Read a text that is one number, with or without a unit.

    Understood are thousands and decimal separators of both kinds (`1,200` is 1200, `3,14` is 3.14, `1.200,5` is 1200.5), fractions,
    mixed numbers, powers of ten, number words in English and Chinese, scales, currencies, LaTeX and `x = 5`.

    >>> read_number("1,200").value, read_number("3,14").value, read_number("2 1/2").value, read_number("12 cm").unit
    (Fraction(1200, 1), Fraction(157, 50), Fraction(5, 2), 'cm')
    >>> read_number("1 3 8") is None, read_number("5 or 6") is None
    (True, True)
    """
    return _read(text) if len(text) <= MAX_LENGTH else None


@lru_cache(maxsize=4096)
def _read(text: str) -> Number | None:
    if text.isascii() and text.isdigit():
        return Number(Fraction(int(text)))
    text = _APPROXIMATE.sub("", plain_sentence(undress(text)))
    text = _APPROXIMATE.sub("", _ASSIGNED.sub("", text)).strip().removeprefix("#").strip()
    if re.search(r"[\n;。]", text.rstrip(" .。;")):
        return None
    if wrapped := re.fullmatch(r"\(([^()]*)\)", text):
        text = wrapped[1].strip()
    if (share := SHARE.search(text)) and not text[share.end() :].strip(" .。"):
        part, whole = _read(text[: share.start()]), _read(share[1])
        return part and whole and replace(part, whole=whole.value)
    if below := re.fullmatch(rf"(?i)(.+?){_BELOW_ZERO}\.?|零下\s?(.+)", text):
        number = _read(below[1] or below[2])
        return number and replace(number, value=-number.value)
    if decade := _DECADE.fullmatch(text):
        return _decade(decade)
    if rate := re.match(_RATE, text):
        number = _digits(text[rate.end() :]) or _worded(text[rate.end() :])
        per = "h" if rate[0].startswith(("时", "每小")) else "min" if rate[0][1] == "分" else "s"
        return number and replace(number, unit=number.unit if "/" in number.unit else f"{number.unit}/{per}")
    return _compound(text) or _digits(text) or _worded(text)


def _decade(found: re.Match[str]) -> Number:
    """The first year of a decade, 1990 for `the nineties`: of the twentieth century where none is said."""
    year, hundreds, word, tens, century, han = found.groups()
    first = Fraction(20 + 10 * _DECADES.index(word.lower())) if word else read_han(year or tens or han or "") or Fraction(0)
    before = SMALL[hundreds.lower()] if hundreds else (read_han(century) or 20) - 1 if century else 19
    return Number(first if first >= 100 else first + before * 100, DECADE)


def _compound(text: str) -> Number | None:
    if not _COMPOUND.fullmatch(text.rstrip(" .。")):
        return None
    total, first, size = Fraction(0), "", Fraction(1)
    for figures, name in re.findall(r"(\d+(?:\.\d+)?)\s?([^\W\d_]+|['′\"″]+)", text):
        name = {"'": "ft", "′": "ft", '"': "in", "''": "in", "″": "in"}.get(name, name)
        unit = "min" if name in {"m", "分"} and first in {"h", "d"} else canonical_unit(name)
        factor = conversion(unit, first or unit)
        # 70 minutes are more than the hour before them.
        if factor is None or not is_unit(unit) or (first and (factor >= size or Fraction(figures) * factor >= size)):
            return None
        first, size = first or unit, factor
        total += Fraction(figures) * factor
    return Number(total, first)


def _digits(text: str) -> Number | None:
    found = _FORM.match(text)
    if found is None or (number := _value(found)) is None:
        return None
    rest = text[found.end() :].strip()
    currency = found["currency"] or ""
    if re.fullmatch(r"(?i)b\.?c\.?(?:e\.?)?", rest):  # a year
        return replace(number, value=-number.value)
    if (found["scale"] or "").strip() == "K" and not currency and not rest:
        return Number(number.value / 1000, "K|k", number.step / 1000, number.digits)
    alone = rest in {"", ".", "。", "st", "nd", "rd", "th"} or (currency and rest[:1].isalpha())
    unit = canonical_unit(currency) if alone else _unit(rest)
    return None if unit is None else replace(number, unit=unit)


def _unit(rest: str) -> str | None:
    rest = re.sub(r"^-(?=[A-Za-z])", "", rest)  # 12-inch
    rest = re.sub(r"\s*[(（](?:because|since|as|that is|i\.e\.|approx\w*|rounded)(?!\w)[^)）]*[)）]$", "", rest).rstrip(" .。,;")
    if re.search(r"(?<![A-Za-z)])\d", re.sub(r"\^\{?-?\d\}?(?!\d)", "", rest)) or re.match(r"[-+*/=:,<>^!–~.(×÷·²³⁻]", rest):
        return None
    words = rest.split()
    if _NO_UNIT.search(rest) or (re.fullmatch(r"[A-Za-z](?:\^?\{?\d\}?)?", rest) and not is_unit(rest)):
        return None  # "2x", "2.5e", "2π"
    if len(words) > 8 or any(word.lower() in SMALL or word.lower() in PARTS for word in words):
        return None
    return canonical_unit(rest)


def _value(found: re.Match[str]) -> Number | None:
    negative = (found["sign"] == "-") != (found["inner"] == "-")
    step, digits = Fraction(0), 0
    if found["whole"]:
        value = _divide(Fraction(int(found["top"])), found["bottom"])
        value = None if value is None else int(found["whole"]) + value
    elif found["over"]:
        above = _plain(found["over"].strip("() "))
        value = None if above is None else _divide(above[0], found["under"].strip("() "))
    elif found["bare_power"]:
        value = Fraction(int(found["bare_power"])) ** int(found["power"])
    else:
        plain = _plain(found["number"])
        if plain is None:
            return None
        value, decimals, digits = plain
        if found["exponent"]:
            exponent = int(re.sub(r".*(?:[eE]|\^\s?[({]?\s?)(?=[+-]?\d)", "", found["exponent"]).strip(" )}"))
            if abs(exponent) > _MAX_EXPONENT:
                return None
            value *= Fraction(10) ** exponent
            step = Fraction(10) ** (exponent - decimals) if decimals else step
        elif decimals:
            step = Fraction(1, 10**decimals)
    if value is None or (found["inner"] and not found["currency"] and found["sign"]):
        return None
    scale = found["scale"]
    if scale:
        factor = _SCALES.get(scale.strip()) or _SCALES[scale.strip().lower()]
        value, step = value * factor, step * factor
    return Number(-value if negative else value, "", step, digits)


def _divide(above: Fraction, below: str) -> Fraction | None:
    plain = _plain(below)
    return above / plain[0] if plain and plain[0] else None


def _plain(text: str) -> tuple[Fraction, int, int] | None:
    negative, text = text.startswith("-"), text.lstrip("+-")
    separators = re.sub(r"\d", "", text)
    whole, decimals = text, ""
    if separators:
        last = separators[-1]
        if last in ".," and separators.count(last) == 1 and not (last == "," and _GROUPED.fullmatch(text)):
            whole, _, decimals = text.rpartition(last)
        if re.search(r"\D", whole) and not _GROUPED.fullmatch(whole):
            return None
        if re.search(r"\D", decimals) or (set(whole) & {"."} and last == "." and decimals):
            return None
    figures = re.sub(r"\D", "", whole) + decimals
    if not figures or len(figures) > MAX_LENGTH:
        return None
    value = Fraction(int(figures), 10 ** len(decimals))
    return (-value if negative else value), len(decimals), len(figures.lstrip("0"))


def _worded(text: str) -> Number | None:
    low = re.sub(r"^(?:minus|negative|负)\s*", "-", text.lower().strip(" .。"))
    if low in {"none", "nil", "没有", "无"}:
        return Number(Fraction(0))
    positive = low.removeprefix("-")
    number = (_digits(positive) if low != positive else None) or _in_words(positive)
    return number and replace(number, value=-number.value if low != positive else number.value)


def _in_words(text: str) -> Number | None:
    found = (english if text.isascii() else chinese)(text)
    if found is None or (found.unit and found.rest):
        return None
    unit = _unit(found.rest) if found.rest else found.unit
    return None if unit is None else Number(found.value, unit, found.step)


def _is_expression(text: str) -> bool:
    plain = not re.search(r"\d", text) or not re.search(r"[^\d.,\s]", text)
    return not plain and (read_number(text) is None or bool(re.match(r"(?:10|2)\^", text)))


def find_numbers(text: str) -> list[tuple[int, int, str]]:
    """Return start, end (without the unit) and text (with the unit) of the numbers inside a text, as `read_number` takes them.

    A number that is part of an expression (`2√3`, `8 - 1`) is not one: the expression comes instead.
    """
    runs = [(*found.span(), found[0].strip()) for found in _RUN.finditer(text) if _is_expression(found[0])]
    runs += [(*found.span(), found[0]) for found in _COMPOUND.finditer(text) if _compound(found[0])]
    numbers, following, covered = list(runs), deque(sorted(runs)), 0
    for found in _FIND.finditer(text):
        while following and following[0][0] <= found.start():
            covered = max(covered, following.popleft()[1])
        if found.start() < covered:
            continue
        after = found_unit[0] if (found_unit := _UNIT_AFTER.match(text, found.end())) else ""
        ways = (found[0] + unit for unit in (after, *after.split()[:1], ""))
        shown = next((way for way in ways if read_number(way) is not None), None)
        if shown is not None and not re.match(r"[:_/]\w", text[found.end() : found.end() + 2]):
            further = SHARE.match(text, found.start() + len(shown)) if text.startswith(shown, found.start()) else None
            further = further or _BELOW.match(text, found.end())
            numbers.append((found.start(), found.end(), text[found.start() : further.end()] if further else shown))
    return sorted(numbers)


def same_number(answer: Number, truth: Number, *, unit: str | None = None, tolerance: float | None = None) -> tuple[bool, str]:
    """Whether two numbers are the same, and why or why not.

    A number without a unit has the question's, or the other's. Units of one quantity are converted. Without a tolerance (a fraction
    of the ground truth) an answer must be equal to it, or round to it where it has decimals; a ground truth that is a fraction also
    equals its own value rounded to three significant digits or more.
    """
    if (answer.whole or truth.whole) and all(n.whole or n.value.denominator > 1 or n.unit in PURE for n in (answer, truth)):
        parts = (Number(n.value / n.whole) if n.whole else n for n in (answer, truth))  # 12 out of 15 as 12/15, 0.8 or 80 %
        if (same := same_number(*parts, unit=unit, tolerance=tolerance))[0]:
            return same
    default = canonical_unit(unit) if unit else ""
    given, known = answer.unit or default, truth.unit or default
    if DECADE in {given, known} and not (given and known):
        return False, "a decade is not a year"
    if known == DECADE and given == "s" and answer.value == truth.value % 100:  # 90s
        return True, "equal"
    tolerance = None if known == DECADE else tolerance
    ways = _AS_WRITTEN
    if scales := temperatures(given, known):
        ways = scales
    elif given and known:
        factor = conversion(given, known)
        if factor is None:
            return False, f"the units {given} and {known} differ"
        ways = [(factor, _ZERO)]
    elif size := PURE.get(given):
        ways = [*_AS_WRITTEN[: given == "K|k"], (size, _ZERO)]
    elif size := PURE.get(known):
        ways = [*_AS_WRITTEN, (1 / size, _ZERO)]
    for factor, offset in ways:
        value, step = answer.value, answer.step
        if factor != 1 or offset:
            value, step = value * factor + offset, step * factor
        difference = abs(value - truth.value)
        if tolerance is not None:
            if difference <= Fraction(str(tolerance)) * abs(truth.value):
                return True, f"equal within {tolerance:.4g} of the ground truth"
        elif not difference:
            return True, "equal"
        elif truth.step and difference <= truth.step / 2:
            return True, "rounds to the ground truth"
        elif truth.value.denominator != 1 and not truth.digits and answer.digits >= 3 and difference <= step / 2:
            return True, "the ground truth rounded"
    return False, "another number"
