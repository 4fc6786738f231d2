"""Dates and clock times: read in the forms that say without doubt what they mean, so that they can be compared."""

from __future__ import annotations

import re
from datetime import date

from mpo.verification.number import read_number
from mpo.verification.words import HAN, read_han

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
_WEEKDAYS = "mon tue wed thu fri sat sun".split()
_WEEKDAY = re.compile(
    r"(?:\b(mon|tue|wed|thu|fri|sat|sun)(?:s|nes|rs|ur)?(?:day)?\b\.?|(?:星期|周|礼拜)([一二三四五六日天]))", re.IGNORECASE
)
_AROUND = re.compile(rf"^(?:on )?(?:{_WEEKDAY.pattern},?\s)?(?:the )?|[,，]?\s?[(（]?(?:{_WEEKDAY.pattern})[)）]?$", re.IGNORECASE)
Date = tuple[int | None, int, int | None]  # year, month and day; None where they are not said
_HALF_DAY = r"(?P<half>[ap])\.?\s?m\b\.?|(?:in the |at )(?P<part>morning|afternoon|evening|night)"
_CLOCK = re.compile(
    rf"(?i)(?P<hour>\d{{1,2}})(?:\s?[:h时点]\s?(?P<minute>\d{{2}})(?:\s?:\s?(?P<second>\d{{2}}))?分?|(?P<dot>\.\d\d)?)\s?(?:o'clock\s?)?(?:{_HALF_DAY})?"
)
_HAN_CLOCK = re.compile(
    r"(?P<part>凌晨|早上|上午|中午|下午|傍晚|晚上)?(?P<hour>\d{1,2})[点时](?:(?P<minute>\d{1,2})分?|(?P<half_hour>半)|整)?"
)
_SPOKEN = re.compile(
    r"(?:a )?(?P<much>half|quarter|[a-z-]+?|\d{1,2})(?: minutes?)? (?P<side>past|after|to) (?P<hour>[a-z]+|\d{1,2})\s?"
    rf"(?:{_HALF_DAY})?"
)
_LATE = frozenset("p afternoon evening night 中午 下午 傍晚 晚上".split())
Time = tuple[int, int, int, int | None]
"""Hour of the day, minute, second, and the hour as written beside am or pm, None without those."""


def read_date(text: str) -> Date | None:
    """Read a text that is one date; None for anything else, and where day and month cannot be told apart.

    >>> read_date("5 Jan. 2020"), read_date("2020-01-05"), read_date("January"), read_date("01/05/2020"), read_date("2020")
    ((2020, 1, 5), (2020, 1, 5), (None, 1, None), None, None)
    """
    text = _plain_figures(_AROUND.sub("", text.strip(" .。,"))) if len(text) < 60 else ""
    return next((_date(found, parts) for form, parts in _FORMS if (found := form.fullmatch(text))), None)


def only_date(text: str) -> Date | None:
    """The date of a sentence that has just one; a month alone counts with its capital only."""
    text = _plain_figures(text[:1000])
    forms = ([said for said in form.finditer(text) if parts != "m" or said[0][0].isupper()] for form, parts in _FORMS)
    found, parts = next(((found, parts) for found, (_, parts) in zip(forms, _FORMS, strict=True) if found), ([], ""))
    return _date(found[0], parts) if len(found) == 1 else None


def same_date(answer: str, truth: str) -> bool | None:
    """Whether an answer says the date of a ground truth, and no other weekday; None where the ground truth is no date."""
    if (day := read_date(truth)) is None:
        return None
    said, known = _weekday(answer), _weekday(truth)
    if said is not None and known is None and day[0] and day[2]:
        known = date(day[0], day[1], day[2]).weekday()
    return day == (read_date(answer) or only_date(answer)) and (None in (said, known) or said == known)


def _weekday(text: str) -> int | None:
    found = {"一二三四五六日".index(b.replace("天", "日")) if b else _WEEKDAYS.index(a.lower()) for a, b in _WEEKDAY.findall(text)}
    return found.pop() if len(found) == 1 else None


def _plain_figures(text: str) -> str:
    return re.sub(rf"{HAN}{{1,5}}(?=\s?[年月日号点时分])", lambda found: str(read_han(found[0]) or found[0]), text)


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


def read_time(text: str) -> Time | None:
    """Read a text that is one time of the day; None for anything else, as a number alone."""
    low = _plain_figures(text.strip(" .。").casefold().replace("\u2019", "'")) if len(text) < 60 else ""
    low = re.sub(r"^(?:(?:so|thus|then|therefore),? )?(?:it is |it's )?(?:(?:at|about|around|exactly) )?", "", low)
    low = re.sub(r"(?<=:00) (?:noon|midnight)$", lambda found: " pm" if "noon" in found[0] else " am", low)
    if (spoken := re.match(r"([a-z]+)(?= o'clock)", low)) and (number := read_number(spoken[1])):
        low = f"{number.value}{low[spoken.end() :]}"
    if low in {"noon", "midday", "midnight", "12 noon", "12 midnight"}:
        return (0 if "night" in low else 12), 0, 0, 12
    if found := _SPOKEN.fullmatch(low):
        hour, past = read_number(found["hour"]), read_number({"half": "30", "quarter": "15"}.get(found["much"], found["much"]))
        if hour is None or past is None or not 0 < past.value < 60 or past.value.denominator > 1 or not 0 < hour.value < 24:
            return None
        written = int(hour.value) - (found["side"] == "to") or 12
        minute = int(past.value) if found["side"] != "to" else 60 - int(past.value)
    elif (found := _CLOCK.fullmatch(low)) and re.search(r"\D", low) or (found := _HAN_CLOCK.fullmatch(low)):
        said = found.groupdict()
        if said.get("dot") and not said.get("half") or re.fullmatch(r"\d+\s*\.\d+", low):
            return None
        written = int(found["hour"])
        minute = int(found["minute"] or (said.get("dot") or ".0")[1:]) or 30 * bool(said.get("half_hour"))
    else:
        return None
    said = found.groupdict()
    half, second = said.get("half") or said.get("part"), int(said.get("second") or 0)
    if written > 24 or minute > 59 or second > 59 or (half and not 0 < written < 13 and half in {"a", "p"}):
        return None
    late = half in _LATE and not (half == "night" and written == 12)
    hour_of_day = written % 24 if not half or written > 12 else written % 12 + 12 * late
    return hour_of_day, minute, second, written if half else None


def same_time(answer: Time, truth: Time) -> bool:
    """Whether two times are the same; one without am and pm takes the other's, as 3:45 beside 3:45 pm."""
    either_half = None in (answer[3], truth[3]) and (answer[0] == truth[3] or truth[0] == answer[3])
    return (answer[0] == truth[0] or either_half) and answer[1:3] == truth[1:3]
