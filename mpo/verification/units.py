"""Units: one name for each, and factors between those of the same quantity."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache

_UNITS = {
    # quantity: symbol, factor to the quantity's own unit, prefixes that it takes, other names; ...
    "length": "m 1 nμmcdk metre meter 米;km 1000 - 公里;μm 1/1000000 - um µm micron;in 127/5000 - inch inches 英寸;ft 381/1250 -"
    " foot feet 英尺;yd 1143/1250 - yard;mi 201168/125 - mile 英里",
    "mass": "g 1 μmk gram gramme 克;kg 1000 - kilo 公斤;t 1000000 - tonne 吨;lb 45359237/100000 -"
    " lbs pound;oz 45359237/1600000 - ounce",
    "time": "s 1 nμm second sec 秒;min 60 - minute mins 分钟;h 3600 - hour hr 小时 个小时;d 86400 - day 天;week 604800 - wk 周",
    "long time": "month 1 - 个月;yr 12 - year 年 岁 years_old;decade 120 -;century 1200 - centuries",
    "volume": "l 1000 mcd liter litre 升 L;ml 1 - mL;dl 100 - dL;cl 10 - cL",
    "share": "% 1 - percent per_cent percentage percentage_point pct ％;‰ 1/10 - permil permille per_mille per_mil per_thousand",
    "angle": "° 1 - degree deg 度",
    "temperature": "°C 1 - celsius degree_celsius degrees_celsius °c ℃ 摄氏度",
    "fahrenheit": "°F 1 - fahrenheit degree_fahrenheit degrees_fahrenheit °f ℉",
    "thermodynamic temperature": "K 1 m kelvin;K|k 1 -",
    "dollar": "$ 1 - dollar usd us$ 美元;cent 1/100 -",
    "euro": "€ 1 - euro eur 欧元",
    "pound sterling": "£ 1 - gbp 英镑",
    "yen": "¥ 1 - yen yuan rmb cny ￥ 元 人民币",
    "rupee": "₹ 1 - rupee rs inr",
    "information": "b 1 kMGT* bit 比特;B 8 kMGT* byte 字节;kB 8000 - KB",
    "energy": "J 1 mkMG joule 焦耳 j;eV 1602176634e-28 mkMGT electronvolt;Wh 3600 kMG watt_hour;cal 523/125 k calorie",
    "force": "N 1 mkM newton 牛顿 n",
    "power": "W 1 nμmkMG watt 瓦 瓦特 w;hp 7457/10 - horsepower",
    "pressure": "Pa 1 mkMG pascal 帕斯卡;atm 101325 - atmosphere;bar 100000 m",
    "tension": "V 1 nμmkM volt 伏特 v",
    "current": "A 1 nμmk ampere amp 安培",
    "resistance": "Ω 1 mkM ohm 欧姆",
    "amount": "mol 1 m mole 摩尔",
    "frequency": "Hz 1 kMGT hertz 赫兹",
}
_KELVINS = {  # of a degree, and at its zero; school books take 273
    "K": (Fraction(1), [Fraction(0)]),
    "°C": (Fraction(1), [Fraction("273.15"), Fraction(273)]),
    "°F": (Fraction(5, 9), [Fraction("459.67") * Fraction(5, 9)]),
}
_KELVINS["K|k"] = _KELVINS["K"]
_LONG = "nano micro milli centi deci kilo mega giga tera".split()
_PREFIXES = dict(zip("nμmcdkMGT", zip((-9, -6, -3, -2, -1, 3, 6, 9, 12), _LONG, "纳微毫厘分千兆吉太", strict=True), strict=True))
_FACTORS: dict[str, tuple[str, Fraction]] = {}
_SYMBOLS = {"Nm": "N·m", "kNm": "kN·m", "kmh": "km/h", "kph": "km/h", "mph": "mi/h", "mhz": "MHz", "ghz": "GHz"}
"""Read with their capitals: mW is not MW."""
_WORDS: dict[str, str] = {}  # read in any case


for _quantity, _lines in _UNITS.items():
    for _symbol, _size_, _taken, *_names in map(str.split, _lines.split(";")):
        _prefixes = [("", Fraction(1), "", "")] + [
            (_p, Fraction(10) ** _PREFIXES[_p][0], *_PREFIXES[_p][1:]) for _p in _taken.strip("-*")
        ]
        _prefixes += [(f"{_p}i", Fraction(1024) ** _n, "", "") for _n, _p in enumerate("KMGT" if "*" in _taken else "", start=1)]
        for _prefix, _factor, _long, _chinese in _prefixes:
            _FACTORS[_prefix + _symbol] = (_quantity, Fraction(_size_) * _factor)
            for _name in (
                _prefix + _symbol,
                *(((_long if _n.isascii() else _chinese) + _n).replace("_", " ") for _n in _names if _long or not _prefix),
            ):
                _word = len(_name) > 2 and _name.islower() or not _name.isascii()
                (_WORDS if _word else _SYMBOLS).setdefault(_name.lower() if _word else _name, _prefix + _symbol)
DECADE = "s|decade"
"""Of `1990s`: seconds beside another time, else a decade."""
_FACTORS[DECADE] = "time", Fraction(1)
for _symbol in ("b", "B", "K|k"):  # alone they are a variable, a billion, and what is not decided
    del _SYMBOLS[_symbol]
PURE = {"%": Fraction(1, 100), "‰": Fraction(1, 1000), "K|k": Fraction(1000)}
"""What they are without a unit: `5K` may be 5 kelvin or 5000."""
_FOLDED = {low: list({unit for name, unit in _SYMBOLS.items() if name.lower() == low}) for low in map(str.lower, _SYMBOLS)}
_POWERS = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3, "cu": 3, "平方": 2, "立方": 3}
_NOUNS_AFTER = frozenset("old long wide tall high deep away each of in per left apart older younger".split())


@lru_cache(maxsize=4096)
def canonical_unit(text: str) -> str:
    r"""Return the one name of a unit: `cm` for centimeters, `cm^2` for square centimeters, `km/h` for kilometers per hour.

    Words that are no unit stand for what is counted, in lower case and the singular.
    """
    text = re.sub(
        r"\s+", " ", text.replace("²", "^2").replace("³", "^3").replace("{", "").replace("}", "").replace("每", "/")
    ).strip(" .,;")
    if not text:
        return ""
    if found := re.fullmatch(r"([^/]{1,40}?)\s?(?:/|\bper\b)\s?([^/]{1,40})", text):
        above, below = _product(found[1].strip()), _product(found[2].strip())
        if above and below:
            return f"{above}/{below}"
    if unit := _simple(text):
        return unit
    words = text.split()
    if len(words) > 1 and words[1].lower() in _NOUNS_AFTER and words[0] not in {"in", "a", "A"} and (unit := _simple(words[0])):
        return unit
    if unit := _product(text):
        return unit
    known = re.compile(r"[mMGTk]?[A-Z][A-Za-z]?")
    return " ".join(singular(word if known.fullmatch(word) or _simple(word.lower()) else word.lower()) for word in words)


def is_unit(text: str) -> bool:
    """Whether a text is the name of a known unit."""
    return bool(_simple(text))


def _simple(text: str) -> str:
    power = ""
    if found := re.fullmatch(r"(square|sq\.?|cubic|cu|平方|立方)\s?(.+)", text, re.IGNORECASE):
        power, text = f"^{_POWERS[found[1].lower()]}", found[2]
    elif found := re.fullmatch(r"(.+?)\s?(?:\^?([23])|(squared|cubed))", text):
        power, text = f"^{found[2] or (2 if found[3] == 'squared' else 3)}", found[1]
    folded = _FOLDED.get(text.lower(), ())
    if len(text) > 1 and text not in _SYMBOLS and len(folded) == 1:
        if text[0] not in "mM" or text[0] == folded[0][0] or text in {"MM", "ML", "MG"}:
            text = folded[0]  # KG and Kg are kg; Mm is not mm, and mw is neither mW nor MW
    for name in (text, singular(text)):
        if unit := _SYMBOLS.get(name) or _WORDS.get(name.lower()):
            return unit + power
    return ""


def _product(text: str) -> str:
    """The name of units multiplied with one another: `N·m` for newton meters; empty where one is unknown."""
    units = [_simple(part) for part in re.split(r"\s?[·⋅∙•*×]\s?|[\s-]", text)]
    return "·".join(sorted(units)) if all(units) else ""


def singular(word: str) -> str:
    """Return an English word without the ending of its plural."""
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


@lru_cache(maxsize=4096)
def conversion(given: str, known: str) -> Fraction | None:
    """Return what a value in one canonical unit is multiplied with to be in another; None for different things."""
    if given == known:
        return Fraction(1)
    sizes = _size(given), _size(known)
    if sizes[0] and sizes[1]:
        return sizes[0][1] / sizes[1][1] if sizes[0][0] == sizes[1][0] else None
    if sizes[0] or sizes[1]:
        return None
    few, many = sorted((set(given.split()), set(known.split())), key=len)
    return Fraction(1) if few <= many else None


def temperatures(given: str, known: str) -> list[tuple[Fraction, Fraction]]:
    """Return the factors and offsets that bring a temperature to another scale; none for the same one and for other units."""
    if given == known or not {given, known} <= {*_KELVINS, "°"}:
        return []
    if "°" in (given, known):  # degrees of the scale that the other names
        return [(Fraction(1), Fraction(0))]
    (one, zeros), (other, others) = _KELVINS[given], _KELVINS[known]
    pairs = [(zero, away) for zero in zeros for away in others]
    return [(one / other, (zero - away) / other) for zero, away in (pairs if "°F" not in (given, known) else pairs[:1])]


def _size(unit: str) -> tuple[str, Fraction] | None:
    quantities, size = [], Fraction(1)
    for sign, part in zip((1, -1, -1, -1), unit.split("/"), strict=False):
        for factor in part.split("·"):
            base, _, power = factor.partition("^")
            base = "K" if base == "°C" and unit != base else base  # in a rate a degree is a difference
            if base not in _FACTORS or (power and not power.isdigit()):
                return None
            quantity, one = _FACTORS[base]
            quantities.append(f"{'/' if sign < 0 else ''}{quantity}^{power or 1}")
            size *= one ** (sign * int(power or 1))
    if quantities == ["length^3"]:
        return "volume^1", size * 10**6  # a cubic metre is a million millilitres
    return " ".join(sorted(quantities)), size
