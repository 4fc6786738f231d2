"""Texts: the same words, yes or no, and how far two transcriptions are apart."""

from __future__ import annotations

import re
import unicodedata

from mpo.verification.dates import read_time, same_date, same_time
from mpo.verification.dress import undress
from mpo.verification.number import read_number, same_number

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
