"""Dates: read in the forms that say without doubt which day or month they mean, so that they can be compared."""

from __future__ import annotations

import re
from datetime import date

_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = (
    r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?"
    r"|dec(?:ember)?)(?![a-z])\.?"
)
_YEAR, _DAY = r"([12]\d{3})(?!\d)", r"(\d{1,2})(?:st|nd|rd|th)?(?!\d)"
_FORMS = [
    (re.compile(form, re.IGNORECASE), parts)
    for form, parts in (
        (rf"(?<![\d.-]){_YEAR}([-/.])(\d{{1,2}})\2{_DAY}", "y-md"),
        (rf"{_YEAR}\s?年\s?(\d{{1,2}})\s?月(?:\s?(\d{{1,2}})\s?[日号])?", "ymd"),
        (r"(?<![\d.-])(\d{1,2})([-/.])(\d{1,2})\2([12]\d{3})(?!\d)", "?-?y"),
        (rf"\b{_MONTH}[ -]{_DAY}(?:,?\s{_YEAR})?(?![\d.:%])", "mdy"),
        (rf"(?<![\d.,:/-]){_DAY}(?:\sof\s|[ -]){_MONTH}(?:[ ,-]\s?{_YEAR})?", "dmy"),
        (rf"\b{_MONTH},?\s{_YEAR}", "my"),
        (rf"\b{_MONTH}", "m"),
        (r"(?<!\d)(\d{1,2})月(?:(\d{1,2})[日号])?", "md"),
    )
]
_WEEKDAY = re.compile(
    r"^(?:on )?(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\.?,?\s)?(?:the )?", re.IGNORECASE
)
Date = tuple[int | None, int, int | None]  # year, month and day; None where they are not said


def read_date(text: str) -> Date | None:
    """Read a text that is one date; None for anything else, and where day and month cannot be told apart.

    >>> read_date("5 Jan. 2020"), read_date("2020-01-05"), read_date("January"), read_date("01/05/2020"), read_date("2020")
    ((2020, 1, 5), (2020, 1, 5), (None, 1, None), None, None)
    """
    text = _WEEKDAY.sub("", text.strip(" .。,")) if len(text) < 60 else ""
    return next((_date(found, parts) for form, parts in _FORMS if (found := form.fullmatch(text))), None)


def only_date(text: str) -> Date | None:
    """The date of a sentence that has just one; a month alone counts with its capital only."""
    forms = ([said for said in form.finditer(text[:1000]) if parts != "m" or said[0][0].isupper()] for form, parts in _FORMS)
    found, parts = next(((found, parts) for found, (_, parts) in zip(forms, _FORMS, strict=True) if found), ([], ""))
    return _date(found[0], parts) if len(found) == 1 else None


def _date(found: re.Match[str], parts: str) -> Date | None:
    said = {part: value for part, value in zip(parts, found.groups(), strict=True) if value and part not in "-?"}
    if "?" in parts:
        one, other = int(found[1]), int(found[3])
        if one <= 12 and other <= 12 and one != other:
            return None  # 01/05/2020 is in January or in May
        said |= {"m": str(min(one, other)), "d": str(max(one, other))}
    month = int(said["m"]) if said["m"].isdigit() else _MONTHS.index(said["m"][:3].lower()) + 1
    year, day = (int(said[part]) if part in said else None for part in "yd")
    try:
        date(year or 2000, month, day or 1)
    except ValueError:
        return None
    return year, month, day
