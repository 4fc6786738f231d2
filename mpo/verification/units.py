"""Units: one name for each, and factors between those of the same quantity."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

_QUANTITIES: dict[str, dict[str, tuple[str, str]]] = {
    # quantity: unit: (factor to the quantity's own unit, other names)
    "length": {
        "mm": ("1/1000", "millimeter millimetre 毫米"),
        "cm": ("1/100", "centimeter centimetre 厘米"),
        "dm": ("1/10", "decimeter decimetre 分米"),
        "m": ("1", "meter metre 米"),
        "km": ("1000", "kilometer kilometre 千米 公里"),
        "in": ("127/5000", "inch inches 英寸"),
        "ft": ("381/1250", "foot feet 英尺"),
        "yd": ("1143/1250", "yard"),
        "mi": ("201168/125", "mile"),
        "μm": ("1/1000000", "µm um micrometer micron"),
        "nm": ("1/1000000000", "nanometer"),
    },
    "mass": {
        "mg": ("1/1000", "milligram 毫克"),
        "g": ("1", "gram gramme 克"),
        "kg": ("1000", "kilogram kilo 千克 公斤"),
        "t": ("1000000", "tonne 吨"),
        "lb": ("45359237/100000", "lbs pound"),
        "oz": ("45359237/1600000", "ounce"),
    },
    "time": {
        "ms": ("1/1000", "millisecond 毫秒"),
        "s": ("1", "sec second 秒"),
        "min": ("60", "minute 分钟"),
        "h": ("3600", "hr hour 小时"),
        "d": ("86400", "day 天"),
        "week": ("604800", "wk 周"),
    },
    "long time": {
        "month": ("1", "个月"),
        "yr": ("12", "year 年 岁 years_old"),
        "decade": ("120", ""),
        "century": ("1200", "centuries"),
    },
    "volume": {
        "ml": ("1", "milliliter millilitre 毫升"),
        "l": ("1000", "liter litre 升"),
        "dl": ("100", "deciliter decilitre"),
        "cl": ("10", ""),
    },
    "share": {"%": ("1", "percent per_cent percentage percentage_point pct ％")},
    "angle": {"°": ("1", "degree deg 度")},
    "temperature": {"°C": ("1", "celsius degree_celsius degrees_celsius °c ℃ 摄氏度")},
    "fahrenheit": {"°F": ("1", "fahrenheit degree_fahrenheit degrees_fahrenheit °f ℉")},
    "dollar": {"$": ("1", "dollar usd us$ 美元"), "cent": ("1/100", "")},
    "euro": {"€": ("1", "euro eur 欧元")},
    "pound sterling": {"£": ("1", "gbp 英镑")},
    "yen": {"¥": ("1", "yen yuan rmb cny ￥ 元 人民币")},
    "rupee": {"₹": ("1", "rupee rs inr")},
    "energy": {"J": ("1", "joule j"), "kJ": ("1000", "kilojoule kj")},
    "force": {"N": ("1", "newton n"), "kN": ("1000", "kilonewton kn")},
    "power": {"W": ("1", "watt w"), "kW": ("1000", "kilowatt kw"), "MW": ("1000000", "megawatt")},
    "tension": {"V": ("1", "volt v"), "mV": ("1/1000", "millivolt mv"), "kV": ("1000", "kilovolt kv")},
    "current": {"A": ("1", "amp ampere"), "mA": ("1/1000", "milliamp ma")},
    "resistance": {"Ω": ("1", "ohm"), "kΩ": ("1000", "kiloohm")},
    "frequency": {"Hz": ("1", "hertz hz"), "kHz": ("1000", "kilohertz khz"), "MHz": ("1000000", "megahertz mhz")},
    "thermodynamic temperature": {"K": ("1", "kelvin")},
}
_FACTORS = {unit: (quantity, Fraction(factor)) for quantity, units in _QUANTITIES.items() for unit, (factor, _) in units.items()}
_NAMES = {
    name.replace("_", " "): unit
    for units in _QUANTITIES.values()
    for unit, (_, others) in units.items()
    for name in (unit, *others.split())
}
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_NOUNS_AFTER = frozenset("old long wide tall high deep away each of in per left apart older younger".split())


@lru_cache(maxsize=4096)
def canonical_unit(text: str) -> str:
    r"""Return the one name of a unit: `cm` for centimeters, `cm^2` for square centimeters, `km/h` for kilometers per hour.

    Words that are no unit stand for what is counted, in lower case and the singular.

    >>> canonical_unit("Centimeters"), canonical_unit("sq. cm"), canonical_unit("km per hour"), canonical_unit("red apples")
    ('cm', 'cm^2', 'km/h', 'red apple')
    """
    text = re.sub(r"\s+", " ", text.replace("²", "^2").replace("³", "^3").replace("{", "").replace("}", "")).strip(" .,;")
    if not text:
        return ""
    if found := re.fullmatch(r"([^/]{1,40}?)\s?(?:/|\bper\b)\s?([^/]{1,40})", text):
        above, below = _simple(found[1].strip()), _simple(found[2].strip())
        if above and below:
            return f"{above}/{below}"
    if unit := _simple(text):
        return unit
    words = text.split()
    if len(words) > 1 and words[1].lower() in _NOUNS_AFTER and words[0] not in {"in", "a", "A"} and (unit := _simple(words[0])):
        return unit
    return " ".join(
        _singular(word if re.fullmatch(r"[mMGTk]?[A-Z][A-Za-z]?", word) and len(word) > 1 else word.lower()) for word in words
    )


def is_unit(text: str) -> bool:
    """Whether a text is the name of a known unit."""
    return bool(_simple(text))


def _simple(text: str) -> str:
    """The name of a unit and its power; empty where it is unknown."""
    power = ""
    if found := re.fullmatch(r"(square|sq\.?|cubic|cu|平方|立方)\s?(.+)", text, re.IGNORECASE):
        power, text = f"^{_POWERS[found[1].lower()]}", found[2]
    elif found := re.fullmatch(r"(.+?)\s?(?:\^?([23])|(squared|cubed))", text):
        power, text = f"^{found[2] or (2 if found[3] == 'squared' else 3)}", found[1]
    low = text if re.fullmatch(r"[MG][a-z]", text) else text.lower()  # Mm is not mm
    for name in (text, low, _singular(low)):
        if name in _NAMES:
            return _NAMES[name] + power
    return ""


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


@lru_cache(maxsize=4096)
def conversion(given: str, known: str) -> Fraction | None:
    """Return what a value in one unit is multiplied with to be in another one; None where they measure different things.

    Args:
        given: a unit, as `canonical_unit` returns it.
        known: the unit to convert to.
    """
    if given == known:
        return Fraction(1)
    sizes = _size(given), _size(known)
    if sizes[0] and sizes[1]:
        return sizes[0][1] / sizes[1][1] if sizes[0][0] == sizes[1][0] else None
    if sizes[0] or sizes[1]:
        return None
    few, many = sorted((set(given.split()), set(known.split())), key=len)
    return Fraction(1) if few <= many else None


def _size(unit: str) -> tuple[str, Fraction] | None:
    quantities, size = [], Fraction(1)
    for place, part in enumerate(unit.split("/")):
        base, _, power = part.partition("^")
        if base not in _FACTORS or (power and not power.isdigit()):
            return None
        quantity, factor = _FACTORS[base]
        quantities.append(f"{quantity}^{power or 1}")
        size = size * factor ** int(power or 1) if place == 0 else size / factor ** int(power or 1)
    if quantities == ["length^3"]:
        return "volume^1", size * 10**6  # a cubic metre is a million millilitres
    return "/".join(quantities), size
