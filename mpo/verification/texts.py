"""Texts: the same words, dates and times, yes or no, and how far two transcriptions are apart."""

from __future__ import annotations

import re
import unicodedata
from datetime import date

from mpo.verification.dress import undress
from mpo.verification.number import read_number, same_number
from mpo.verification.words import HAN, read_han

_ARTICLES = re.compile(r"\b(?:an|the)\b\s*|\ba\s+(?=\w{2})")
_DROPPED = str.maketrans({"'": "", "\u2019": "", "\u2018": "", "`": "", '"': "", "“": "", "”": "", "…": " "})
_STOPS = re.compile(r"(?<!\d)[.,:;!?()\[\]{}](?!\d)|(?<=\d)[.,:;!?)\]}](?!\d)|(?<!\d)[([{](?=\d)|[。，！？；：、（）《》「」]")
_ADVERB = r"(?:absolutely|definitely|certainly|of course|surely|sure|clearly|obviously|most certainly)"
_AUX = r"(?:is|are|was|were|do|does|did|can|could|has|have|had|will|would)"
_SUBJECT = r"(?:it|this|that|they|he|she|there|these|those|we|i|you)"
_CLAIM = r"(?:(?:it|that|this)(?:['’]s| is)|(?:the|this|that) (?:statement|claim|sentence) is)"
_TRUE, _FALSE = "(?:true|right|correct|supported|confirmed)", "(?:not|false|wrong|incorrect|refuted|contradicted|unsupported)"
_UNDECIDED = re.compile(
    r"(?:yes|no|true|false)\s*(?:/|or|and|\?)\s*(?:yes|no|true|false)\b|no (?:idea|clue|information|way to|answer|comment)\b"
    r"|no ?(?:one|body)(?:$| )|no (?:problem|worries)\b|no\.? ?\d+$"
    r"|不(?:太|很|能|敢|好|大)?(?:确定|一定|清楚|知道|好?说)|无法|有?可能|也许|是或|是还是|是否|是不是|有没有"
    r"|会不会|能不能|能否|会否|对不起|没法|看不"
)
_NO = re.compile(
    r"(?:no|nope|nah|n|never|false|incorrect|wrong|negative|untrue)(?![a-z\d'’])"
    r"|not (?:at all|really|true|correct|right|so|quite)\b"
    rf"|{_ADVERB} not\b|i (?:do|would)(?: not|n['’]t) (?:think|believe|say) so"
    rf"|{_SUBJECT} (?:{_AUX}(?: not|n['’]t)|can(?:not|['’]t)|are none)$"
    rf"|{_CLAIM} {_FALSE}\b|否|不|没(?!错|问题)|(?:当然|肯定|绝对)(?:不|没)|错|假|无|并[非不没]"
)
_YES = re.compile(
    rf"(?:yes|yeah|yep|yup|y|true|right|correct|affirmative|indeed|{_ADVERB}|exactly)(?![a-z\d'’])|i (?:think|believe|guess) so"
    rf"|without (?:a )?(?:doubt|question)\b|{_SUBJECT} (?:{_ADVERB} )?{_AUX}$|{_CLAIM} {_TRUE}\b"
    r"|是|对(?!于|面|比)|正确|有|真|会|能(?![量力])|可以|没错|当然|肯定|确实|的确"
)
_NEGATED = re.compile(r"\b(?:not|never|before|after|until)\b|n['’]t\b|[不非没前后]", re.IGNORECASE)
_KEPT = re.compile(r"\d+(?:[.,:/]\d+)*|[^\W\d_]+|[$€£¥%‰°]|(?<![\w.)])[-+](?=[\d.$€£])")
_THREE = frozenset(
    "str spr scr spl thr sch shr nst ndr ntr mpl mpr ngl ngr nch nth rst rth rch rdl ltr lth tch ght ctr xtr".split()
)
_READABLE = re.compile(  # letters that stand beside each other in English
    r"[aeiouy].|.[aeiouy]|b[lrs]|c[hklrt]|d[lrsw]|f[flrt]|g[hlnrs]|hr|hs|k[lnsw]|l[bcdfgklmnpstv]|m[bmnps]|n[cdgknst]|p[hlnprst]"
    r"|r[bcdfgklmnprstv]|s[chklmnpqstw]|t[hlnrstw]|w[hlnrs]|xt|[yz]."
)


def normalize(text: str) -> str:
    """Return a text as VQA compares it: lower case, without articles, punctuation and apostrophes.

    Signs that carry a meaning stay: `-5`, `C++`, `12:30`, `50%`.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", undress(text)).casefold())
    plain = re.sub(r"(?<=\b[a-z])\.(?=[a-z]\b)", "", re.sub("[\u2212\u2013]", "-", text)).translate(_DROPPED)
    plain = re.sub(r"(?<=[^\W\d])[-/](?=[^\W\d])", " ", plain).replace("&", " and ")
    plain = re.sub(r"(?<=\d) to (?=\d)", "-", re.sub(r"(?<=\d)\s?:\s?(?=\d)", ":", plain))
    plain = re.sub(r"(?<=[\u4e00-\u9fff])的$", "", " ".join(_STOPS.sub(" ", plain).split()))
    return _ARTICLES.sub("", plain).strip() or plain or " ".join(text.split())


def same_text(answer: str, truth: str) -> tuple[bool, str]:
    """Whether two texts are the same words, or the same number."""
    given, known = read_number(answer), read_number(truth)
    if normalize(answer) == normalize(truth):
        if (given is None) != (known is None) and answer.casefold() == truth.casefold():
            return False, "another unit"  # 5 g is a number, 5 G is none
        return True, "the same words"
    if given is not None and known is not None:
        return same_number(given, known)
    if re.fullmatch(r"(?=.*\d)(?=.*[A-Z])[A-Z\d -]{5,}", truth.strip()):  # a number plate
        if re.sub(r"[\s-]", "", undress(answer)) == re.sub(r"[\s-]", "", truth):
            return True, "the same code"
    if not _NEGATED.search(answer):
        both = re.fullmatch(r"([^()（）]{1,40})\s?[(（]([^()（）]{1,40})[)）]", undress(answer))  # Na (sodium)
        if both and "(" not in truth and any(same_text(part, truth)[0] for part in both.groups()):
            return True, "one of its names"
        if (said := read_time(undress(answer))) and (time := read_time(undress(truth))):
            return same_time(said, time), "times"
        if (same := same_date(answer, truth)) is not None:
            return same, "dates"
    return False, "other words"


def read_yes_no(text: str) -> bool | None:
    """Return what an answer that begins with yes or no says; None where it says neither, or both."""
    low = unicodedata.normalize("NFKC", undress(text)).casefold().strip(" .。!,，*\"'")
    low = re.sub(rf"^(?:{_ADVERB}\b|没问题|[那这它他她](?=[是不没]))[\s,，]*(?=yes|no\b|[是有对不没])", "", low)
    low = re.sub(r"^no (?:doubt|question|wonder)\b[\s,]*|^.{0,400}\b(?:wait|actually|correction)\b\W{1,4}(?=(?:yes|no)\b)", "", low)
    if _UNDECIDED.match(low):
        return None
    return False if _NO.match(low) else True if _YES.match(low) else None


def document_distance(answer: str, truth: str) -> float:
    """Edits divided by the longer text's length, without case; ANLS (Biten et al., 2019) is one minus it.

    Raises:
        ValueError: where rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ValueError("Comparing documents needs rapidfuzz. Install it: pip install mpo-trainer[verify]") from None
    given, known = (" ".join(undress(text)[:20_000].casefold().split()).rstrip(" .") for text in (answer, truth))
    return float(Levenshtein.normalized_distance(given, known))


def document_words(text: str) -> list[str]:
    """Return words, numbers, currencies and signs of a transcription, without articles, thousands separators and punctuation."""
    plain = unicodedata.normalize("NFKC", undress(text)[:20_000]).casefold().replace("\u2212", "-")
    plain = re.sub(r"(?<=[^\W\d_])['’.](?=[^\W\d_]{1,2}\b)", "", re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", plain))
    return [word for word in _KEPT.findall(plain) if word not in {"the", "an"}]


def same_transcription(answer: str, truth: str) -> bool:
    """Whether two transcriptions differ at most by slips within words.

    A distance cannot tell a slip from another meaning (`increase` and `decrease`, `Section A` and `Section B`, 1,234 and 1,235), so
    digits, signs and all words must agree but for a double letter, an inner vowel left out, neighbours exchanged or look-alikes.
    """
    given, known = document_words(answer), document_words(truth)
    joined = [re.sub(r"(?<=[^\W\d]) (?=[^\W\d])", "", " ".join(words)) for words in (given, known)]
    return joined[0] == joined[1] or (
        len(given) == len(known) and all(one == other or _slip(one, other) for one, other in zip(given, known, strict=True))
    )


def _slip(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    words = [unicodedata.normalize("NFKD", word).encode("ascii", "ignore").decode() for word in (short, long)]
    if len(short) < 4 or not (one + other).isalpha() or words[0][:1] != words[1][:1] or re.fullmatch("[ivxlcdm]+", long):
        return False
    alike = [
        re.sub("rn|vv|cl|l", lambda found: {"rn": "m", "vv": "w", "cl": "d", "l": "i"}[found[0]], re.sub(r"(.)\1", r"\1", word))
        for word in words
    ]
    inner = range(1, len(long) - 1)
    # "plant" is a word of its own: a vowel is left out only where what remains cannot be read.
    left_out = any(
        long[at] in "aeiou" and long[:at] + long[at + 1 :] == short and (len(long) > 9 or not _readable(short[:at], short[at:]))
        for at in inner
    )
    exchanged = len(long) > 8 and any(long[:at] + long[at + 1] + long[at] + long[at + 2 :] == short for at in inner)
    # Later is not latter, hoping not hopping, a desert no dessert.
    another = re.search(r"[aeiou](?:([^aeiou])\1(?:ed|ings?|ers?|y)$)|^dessert", long)
    doubled = len(short) == len(long) or (len(long) > 6 and not another)
    return (doubled and alike[0] == alike[1] != "") or left_out or exchanged


def _readable(left: str, right: str) -> bool:
    """Whether the consonants where two parts of a word meet stand beside each other in English words."""
    run = re.search(r"[^aeiouy]*$", left)[0] + re.match(r"[^aeiouy]*", right)[0]  # type: ignore[index]
    return (len(run) < 3 or run in _THREE) and bool(_READABLE.fullmatch(left[-1] + right[0]))


def fixed_words(text: str) -> list[str]:
    """Return the numbers, signs and negations of a transcription, which no tolerance is for."""
    words = document_words(re.sub(r"n['’]t\b", " not", text))
    return [word for word in words if not word[0].isalpha() or word in {"no", "not", "yes", "never", "without", "none"}]


# Dates and clock times, in the forms that say without doubt what they mean


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
