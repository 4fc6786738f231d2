"""Texts: the same words, yes or no, and how far two transcriptions are apart."""

from __future__ import annotations

import re
import unicodedata

from mpo.verification.dress import undress
from mpo.verification.number import read_number, same_number

_ARTICLES = re.compile(r"\b(?:an|the)\b\s*|\ba\s+(?=\w{2})")
_DROPPED = str.maketrans({"'": "", "\u2019": "", "\u2018": "", "`": "", '"': "", "“": "", "”": "", "…": " "})
_STOPS = re.compile(r"(?<!\d)[.,:;!?()\[\]{}](?!\d)|(?<=\d)[.,:;!?)\]}](?!\d)|(?<!\d)[([{](?=\d)|[。，！？；：、（）《》「」]")
_YES = "yes yeah yep yup y true correct right affirmative 是 是的 对 对的 正确 有 真 会 能 可以".split()
_NO = "no nope n false incorrect wrong negative 否 不 不是 不对 错 错误 没有 没 假 不会 不能 不可以 不正确 无".split()


def normalize(text: str) -> str:
    """Return a text as VQA compares it: lower case, without articles, punctuation and apostrophes.

    Signs that carry a meaning stay: `-5`, `C++`, `12:30`, `50%`.

    >>> normalize("A black cat."), normalize("Don't!"), normalize("T-shirt"), normalize("-5"), normalize("C++")
    ('black cat', 'dont', 't shirt', '-5', 'c++')
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFKC", undress(text)).casefold())
    plain = re.sub(r"(?<=\b[a-z])\.(?=[a-z]\b)", "", re.sub("[\u2212\u2013]", "-", text)).translate(_DROPPED)
    plain = re.sub(r"(?<=[^\W\d])[-/](?=[^\W\d])", " ", plain).replace("&", " and ")
    plain = re.sub(r"(?<=\d)\s?:\s?(?=\d)", ":", plain)
    plain = " ".join(_STOPS.sub(" ", plain).split())
    return _ARTICLES.sub("", plain).strip() or plain or " ".join(text.split())


def same_text(answer: str, truth: str) -> tuple[bool, str]:
    """Whether two texts are the same words, or the same number.

    >>> same_text("two", "2"), same_text("3,14", "314")[0]
    ((True, 'equal'), False)
    """
    given, known = read_number(answer), read_number(truth)
    if normalize(answer) == normalize(truth):
        if (given is None) != (known is None) and answer.casefold() == truth.casefold():
            return False, "another unit"  # 5 g is a number, 5 G is none
        return True, "the same words"
    if given is not None and known is not None:
        return same_number(given, known)
    return False, "other words"


def read_yes_no(text: str) -> bool | None:
    """Return what an answer that begins with yes or no says; None where it says neither, or both.

    >>> read_yes_no("Yes, it is."), read_yes_no("否"), read_yes_no("Yes or no"), read_yes_no("nobody")
    (True, False, None, None)
    """
    low = unicodedata.normalize("NFKC", undress(text)).casefold().strip(" .。!,，*\"'")
    low = re.sub(r"^(?:absolutely|definitely|certainly|of course|sure)\b[\s,]*(?=yes|no)", "", low)
    low = re.sub(r"^no (?:doubt|question|wonder)\b[\s,]*|^.{0,400}\b(?:wait|actually|correction)\b\W{1,4}(?=(?:yes|no)\b)", "", low)
    if re.match(r"(?:(?:absolutely|definitely|certainly) not|not at all|not really|i do(?: not|n['’]t) think so)\b", low):
        return False
    first = re.match(r"[a-z]+|[是否对正确错误没有真假会能可以不的无]+", low)
    if first is None or re.match(r"(?:yes|no|true|false)\s*(?:/|or|and)\s*(?:yes|no|true|false)\b", low):
        return None
    if first[0] == "not":
        return False if re.match(r"not (?:true|correct|right)\b", low) else None
    return True if first[0] in _YES else False if first[0] in _NO else None


def document_distance(answer: str, truth: str) -> float:
    """Normalised Levenshtein distance: the edits that turn one text into the other, divided by the longer one's length; 0 is equal.

    ANLS (Biten et al., 2019) is one minus it. Case and surrounding white space do not count.

    Raises:
        ValueError: where rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError:
        raise ValueError("Comparing documents needs rapidfuzz. Install it: pip install mpo-trainer[verify]") from None
    given, known = (" ".join(undress(text)[:20_000].casefold().split()).rstrip(" .") for text in (answer, truth))
    return float(Levenshtein.normalized_distance(given, known))


def same_digits(answer: str, truth: str) -> bool:
    """Whether two texts have the same digits in the same order: one wrong digit of a date or price is another date or price."""
    return re.findall(r"\d", answer) == re.findall(r"\d", truth)
