"""Multiple choice: which choice an answer names, by its letter in any dress or by its text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mpo.verification.dress import undress
from mpo.verification.expressions import equation, latex, same_rational
from mpo.verification.number import find_numbers, read_number, same_number
from mpo.verification.prose import REFUSAL, stated_number
from mpo.verification.texts import normalize, read_yes_no
from mpo.verification.units import singular
from mpo.verification.words import ORDINALS

_LETTER = r"[A-Za-z]"
_FULL_WIDTH = {wide: wide - 0xFEE0 for wide in (*range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
_LEAD = (
    r"(?:(?:the\s{1,3})?(?:(?:final|correct|right|best)\s{1,3}){0,3}(?:answers?|ans\.?|options?|choices?)(?:\s{0,3}(?:is|are))?(?:\s{0,3}[:：])?\s{0,3}"
    r"|(?:我认为|应该|因此)?(?:正确)?(?:选项|答案|是)(?:\s{0,3}(?:是|为|：|:))?\s{0,3}|故?选(?:\s{0,3}(?:择|：|:))?\s{0,3}"
    r"|(?:it|this)(?:\s{1,3}(?:is|must be|should be|would be)|['’]s)\s{1,3}){0,4}"
)
_ALONE = re.compile(
    rf"(?i){_LEAD}[(\[（【<_]?\s*({_LETTER})\s*[)\]）】>_]?(?:选项)?\s*[.．:：、,，。;!)]*(?:\s+(?:is|was)\s+(?:the\s+)?(?:correct|right|best)(?:\s+(?:one|answer|option|choice))?)?[.。\s]*"
)
_WITH_TEXT = re.compile(
    rf"(?i){_LEAD}(?:[(\[（【]\s*({_LETTER})\s*[)\]）】]|({_LETTER})\s*(?:[).．:：、,，。\]]|\s[-–—]\s))(?:[\s.．:：、,，。*]|-(?!\d))*(?=\S)(?!(?-i:[A-J])(?:[,，、]|\s(?:and|or)\b))"
)
_BEFORE_TEXT = re.compile(rf"{_LEAD}({_LETTER})\s+(?=\S)")
_SEVERAL = re.compile(
    rf"(?i){_LEAD}[(\[（]?({_LETTER})[)\]）]?[.)]?(?:\s*(?:(?:,|，|、|&|/|;|and|or|和|或|与)\s*)+[(\[（]?(?:{_LETTER})[)\]）]?[.)]?)+[.。]?"
)
_ORDINAL = re.compile(  # the second option
    rf"(?i){_LEAD}(?:the\s)?(?:({'|'.join(ORDINALS)}|last|final)\s(?:option|choice|answer|one))"
    r"(?:\s(?:is|was|must be|seems)\s(?:the\s)?(?:correct|right|best|true)(?:\s(?:one|answer|option|choice))?)?[.!\s]*"
)
_TOGETHER = re.compile(r"[A-J]{2,10}")
NEGATED = re.compile(r"\b(?:not|no|never|neither|nor|without|cannot)\b|n['’]t\b|不|没", re.IGNORECASE)
_CONDITION = re.compile(
    r"(?i)^\W{0,4}(?:if|when|as|since|because|given|although|while)\b[^,.]{1,300},\s|^(?:虽然|尽管|如果|若|要是)[^，。]{1,100}，"
)
_NOT = re.compile(
    r"(?i)(?:\b(?:not|no|(?:is|are|was|were|do|does|did|ca|could|would)nt|cannot be|neither|nor|except|than|unlike|instead of"
    r"|without)|不是|不选|并非|非)\s*(?:be\s)?(?:the|an?|option|choice|选项)?\s*[(\"'*]*$"
)
_IS_NOT = re.compile(r" (?:(?:is|are|was|were) (?:wrong|incorrect|not)|(?:is|are|was|were)nt)\b")
MOST_CHARACTERS = 2000  # of a longer text, only the beginning is read
_SO_IT_IS = re.compile(r"(?is).*[,;]\s(?:and )?(?:so|thus|therefore|hence),? (?:it|this|that|the answer)(?:['’]s| is) ")
_BEFORE_A_CHOICE = frozenset(
    "will would may might should must it its this is are was the a an they he she answer option choice color colour likely "
    "probably so thus".split()
)
_SMALL_WORDS = frozenset(
    "a an the it would will may might likely probably also be is are was were do does did of to in on at and or that this".split()
)
_JUDGED = re.compile(
    r"(?i)^both (?=\S+ and \S)|(?<! not) (?:are|is) (?:both |all )?(?:right|correct|true)\W*$|[都均也]?(?:对|正确)\W*$"
)


@dataclass(frozen=True)
class Named:
    """The choices that a text names.

    Attributes:
        indices: their places, from 0; more than one where a text names several, none where it names none.
        method: `letter`, `text`, or the reason why there are none.
        both: the text names one or another of them, so it has decided for none.
    """

    indices: frozenset[int]
    method: str
    both: bool = False


def _named(places: Iterable[int], method: str = "text") -> Named:
    indices = frozenset(places)
    return Named(indices, method if indices else "it names no choice")


def _index(letter: str) -> int:
    return ord(letter.upper()) - 65


def read_choice(text: str, choices: Sequence[str] | None = None, *, truth: bool = False) -> Named:
    """Find the choice that a short answer names; a ground truth says the text of a choice where it could also be a letter.

    >>> read_choice("**(b)**").indices, read_choice("blue", ["red", "blue"]).indices, read_choice("A or B").both
    (frozenset({1}), frozenset({1}), True)
    """
    return _read(text[:MOST_CHARACTERS], None if choices is None else tuple(choices), truth)


@lru_cache(maxsize=4096)
def _read(text: str, choices: tuple[str, ...] | None, truth: bool) -> Named:
    text = undress(text).translate(_FULL_WIDTH)
    size = len(choices) if choices is not None else 26
    texts = choices or ()
    if texts and (place := _ORDINAL.fullmatch(text)):
        said = next(filter(None, place.groups())).lower()
        index = size - 1 if said in {"last", "final"} else ORDINALS.index(said)
        return _named({index} if index < size else (), "letter")
    exact = [place for place, choice in enumerate(texts) if same_choice(text, choice)]
    literal = [place for place, choice in enumerate(texts) if text.strip(" .。") == choice.strip(" .。")]
    if len(literal) == 1 or (literal and truth):
        return Named(frozenset(literal[:1]), "text")
    if (found := _ALONE.fullmatch(text)) and _index(found[1]) < size:
        return Named(frozenset({_index(found[1])}), "letter")
    if exact and not (re.match(r"[(\[（【]", text) and _WITH_TEXT.match(text)):  # several with the same text are one
        return Named(frozenset(exact[:1]), "text")
    if found := _SEVERAL.fullmatch(text):
        joined = re.sub(_LEAD, "", found[0], count=1, flags=re.IGNORECASE)
        letters = frozenset(_index(letter) for letter in re.findall(rf"(?<![A-Za-z]){_LETTER}(?![A-Za-z])", joined))
        either = bool(re.search(r"\bor\b|或|/", joined))
        if max(letters) < size:
            return Named(letters, "it names several choices" if either else "letters", both=either)
    if choices is None and _TOGETHER.fullmatch(text):
        return Named(frozenset(map(_index, text)), "letters")
    clash = "its letter and its text name different choices"
    for pattern in (_WITH_TEXT, _BEFORE_TEXT):
        if (found := pattern.match(text)) is None:
            continue
        letter = _index(next(group for group in found.groups() if group))
        rest = re.split(r"\n", text[found.end() :].strip(" *()（）"), maxsplit=1)[0]
        others = {place for place, choice in enumerate(texts) if same_choice(rest, choice)}
        if letter < size and pattern is _WITH_TEXT:
            number = next((shown for start, _, shown in find_numbers(rest[:60])[:1] if start <= 1), None)
            written = (number, number.rstrip(" %")) if number is not None else ()
            own = texts[letter : letter + 1] if written else ()
            told = any(read_number(choice) is not None for choice in own)
            agrees = any(same_choice(said, choice) for choice in own for said in written)
            if texts and letter < len(texts) and len(rest) < 120 and not others and not agrees:
                named = named_inside(re.split(r"(?<=[a-z])[.;]\s|,\s(?:if|unlike|whereas)\b", rest)[0], texts)
                told_otherwise = named.method == "text" and not any(REFUSAL.search(texts[place]) for place in named.indices)
                if told_otherwise and letter not in named.indices and normalize(texts[letter]) not in normalize(rest):
                    return Named(frozenset(), clash)
            if not agrees and (told or (others and letter not in others)):
                return Named(frozenset(), clash)
            return Named(frozenset({letter}), "letter")
        if letter < size and others:
            return Named(frozenset({letter} & others), "letter" if letter in others else clash)
    return named_inside(text, texts)


def named_inside(text: str, choices: Sequence[str]) -> Named:
    """Find the choice whose text stands in a sentence; a choice inside a longer one that also stands there does not count."""
    if not choices:
        return _named(())
    if len(choices) == 2 and {read_yes_no(choice) if len(choice) < 8 else None for choice in choices} == {True, False}:
        said = read_yes_no(text)
        found = [place for place, choice in enumerate(choices) if said is not None and read_yes_no(choice) is said]
        return _named(found)
    if are_numbers(choices):
        return _stated(text, choices)
    tail = re.split(r"[=≈]", text)[-1].strip(" $.。*\\)")
    if len(found := [place for place, choice in enumerate(choices) if same_choice(tail, choice)]) == 1:
        return Named(frozenset(found), "text")
    text = re.sub(r"^[^.]{1,300}\bbut (?=the |it(?:['’]s| is) )", "", _CONDITION.sub("", text))
    if len(few := normalize(text).split()) <= 3:  # "dark blue" is not blue
        ends = [choice for choice in choices if normalize(text).endswith(f" {normalize(choice)}")]
        named = normalize(max(ends, key=len)).split() if ends else []
        if ends and few[-len(named) - 1] not in _BEFORE_A_CHOICE and not NEGATED.search(text):
            return _named(())
    plain, spans, negated = f" {normalize(text)} ", [], False
    for place, choice in enumerate(choices):
        words = normalize(choice)
        if len(words) == 1 and words.isalpha() and (words.isascii() or not re.search(f"(?<!不)[是为选]{words}", plain)):
            continue
        for start in _places(plain, words):
            end = start + len(words)
            if _IS_NOT.match(plain, end) or _NOT.search(plain[max(0, start - 30) : start]):
                negated = True
            else:
                spans.append((start, end, place))
    inner = {(start, end) for start, end, _ in spans for s, e, _ in spans if s <= start and end <= e and (s, e) != (start, end)}
    kept = {place for start, end, place in spans if (start, end) not in inner}
    if not kept and not negated and len(inside := _in_words(text, choices)) == 1:
        return Named(inside, "words")
    if len(kept) > 1:  # what follows is the reason
        for clause in (re.split(r"[,;]\s(?:as|since|because|which|whereas)\b", text, maxsplit=1)[0], _SO_IT_IS.sub("", text)):
            if clause != text and (chosen := named_inside(clause, choices)).method == "text":
                return chosen
        return Named(frozenset(kept), "it names several choices", both=True)
    return _named(kept)


def _places(text: str, words: str) -> list[int]:
    places, start = list[int](), text.find(words)
    while words and start >= 0 and len(places) <= 50:
        before, after = text[start - 1 : start], text[start + len(words) : start + len(words) + 2]
        open_before = not (before.isalnum() and before.isascii() and words[0].isalnum())
        number = words[0].isdigit() and (before in {"-", ".", ","} or before.isdigit())
        further = bool(re.match(r"[.,:/]\d", after)) and words[-1].isdigit()
        if before in {"-", "+", "*", "/", "^"} and (text[start - 2 : start - 1].isdigit() or re.search(r"[-+*/^]", words)):
            number = True
        if open_before and not number and not further and not (after[:1].isalnum() and after[:1].isascii() and words[-1].isalnum()):
            places.append(start)
        start = text.find(words, start + 1)
    return places


def are_numbers(choices: Sequence[str]) -> bool:
    """Whether all choices are numbers."""
    return all(read_number(choice) is not None for choice in choices)


def _stated(text: str, choices: Sequence[str]) -> Named:
    shown = stated_number(text, year=True)
    if shown is None:
        return _named(())
    if not shown:
        return Named(frozenset(), "it names several choices", both=True)
    return _named(place for place, choice in enumerate(choices) if same_choice(shown, choice))


def _in_words(text: str, choices: Sequence[str]) -> frozenset[int]:
    """The choices whose words all stand in a sentence, in their order: `will decrease` in `will likely decrease`."""
    words = [singular(word) for word in normalize(text).split()]
    found = set()
    for place, choice in enumerate(choices if not NEGATED.search(text) else ()):
        wanted = [singular(word) for word in normalize(choice).split() if word not in _SMALL_WORDS]
        following = iter(words)
        if wanted and all(word in following for word in wanted):
            found.add(place)
    return frozenset(found)


def same_choice(text: str, choice: str) -> bool:
    """Whether a text is that of a choice: the same words, or the same number and unit."""
    if normalize(text) == normalize(choice) and choice.strip():
        return True
    ratio = re.fullmatch(r"\s*(\d+)\s?:\s?(\d+)\s*", choice)
    if ratio and re.search(r"/|frac", text):  # 5:12 as 5/12
        choice = f"{ratio[1]}/{ratio[2]}"
    given, known = read_number(text), read_number(choice)
    if given is not None and known is not None:
        fraction = known.value.denominator != 1 and not known.digits
        return same_number(given, known, tolerance=None if fraction else 0)[0]
    if not re.search(r"\d|[a-z]\s?[-+*/^]", choice) or len(text) > 200 or (known is not None and "=" not in text):
        return False
    one, other = ("".join(equation(latex(written))[-1].split()) for written in (text, choice))
    return bool(one) and (one == other or same_rational(one, other) == (True, True))


def same_selection(answer: str, truth: str, choices: Sequence[str] | None) -> tuple[bool, str]:
    """Whether an answer names all the choices that are right, in any order, and no other: by letters or texts."""
    given, known = (_selected(_JUDGED.sub("", undress(text)[:MOST_CHARACTERS]), choices) for text in (answer, truth))
    if not known:
        return normalize(answer) == normalize(truth), "the ground truth is none of the choices; compared as texts"
    if not given:
        return False, "it names no choice, or one or another"
    return given == known, "choices" if given == known else "other choices"


def _selected(text: str, choices: Sequence[str] | None) -> frozenset[int]:
    parts = [part for part in re.split(r"\s*(?:[,;，、；&\[\]\"]|\band\b|和|与)\s*", text.strip(" .。")) if part.strip()]
    letters = parts[0] if len(parts) == 1 else ""
    if re.fullmatch(r"[A-Z]{2,26}", letters) and max(map(_index, letters)) < (26 if choices is None else len(choices)):
        return frozenset(map(_index, letters))
    named = [read_choice(part, choices).indices for part in parts]
    if len(parts) > 1 and all(len(one) == 1 for one in named):
        return frozenset[int]().union(*named)
    whole = read_choice(text, choices)
    return frozenset() if whole.both and re.search(r"\bor\b|或|/", text) else whole.indices


def same_choices(answer: str, truth: str, choices: Sequence[str] | None) -> tuple[bool, str]:
    """Whether an answer names the choices that the ground truth names."""
    known = read_choice(truth, choices, truth=True)
    given = read_choice(answer, choices)
    if not known.indices:
        return normalize(answer) == normalize(truth), "the ground truth is none of the choices; compared as texts"
    if not given.indices or given.both:
        return False, given.method
    one, other = ({choices[place] if choices else place for place in named.indices} for named in (given, known))
    return one == other, given.method if one == other else "another choice"
