"""Answers of several parts: lists, intervals, boxes, blanks."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from mpo.verification.dress import plain_math, undress
from mpo.verification.words import ORDINALS

_NUMBER = r"[-+]?(?:\d{1,15}(?:\.\d{0,15})?|\.\d{1,15})(?:e[-+]?\d{1,2})?"
_END = r"\s?([^,;\[\]]{1,60}?)\s?"
_INTERVAL = re.compile(rf"([\[(\]]){_END}[,;]{_END}([\])\[])")
_BOUND = re.compile(r"^([^<>≤≥]{1,40}?)\s?([<>≤≥])\s?([^<>≤≥]{1,40}?)(?:\s?([<>≤≥])\s?([^<>≤≥]{1,40}))?$")
_FROM_TO = re.compile(
    r"(?:from |从)?(?:(?P<between>between ))?([-+]?\d[\d.,]{0,20}) ?(?:to|-|到|至|(?(between)and)) ?([-+]?\d[\d.,]{0,20})"
)
MARKER = r"[ \t]*(?:[-*•+–—·][ \t]+|[(（]?\d{1,3}[.)）][ \t]+|\d{1,2}、)"
"""What a line of a bulleted or numbered list begins with."""
LETTERED = r"(?m:^)[ \t]*[(（]?([A-Za-z])[.)）][ \t]+"
_LABEL = re.compile(
    r"(?i)(?:^|(?<=[\s;；,，。.、]))(?:(?:part|question|blank)\s|第)?(?:(?P<bracket>[(（])?(?P<label>\d{1,2}|[a-z]|[ivx]{1,4})"
    r"(?(bracket)[)）]|(?:[)）]|[.:：]\s))|(?P<circled>[①-⑨]))[:：.]?\s?(?=[^\s,;，；()（）])"
)
_ROMAN = "i ii iii iv v vi vii viii ix x".split()
MOST_ITEMS = 500
"""Items of a list that are compared one with another; longer lists must be equal as texts."""
MOST_BOXES = 100
_TERM = r"\d[\d.]{0,12}(?:[ ,]\d{3}(?!\d)){0,3}"
RATIO = re.compile(
    r"(?:[^\d:：]*\b(?:is|are|as|of)\s|[^\d:：]{0,40}[:：是为]\s?)?"
    rf"({_TERM}(?:\s?(?:[:：∶比]|\bto\b|\bfor every\b|\bfor each\b)\s?{_TERM}){{1,4}})"
)
_NAME = r"(\\?[A-Za-z\u0370-\u03ff](?:_?\{?\w{1,3}\}?)?'?(?:\(\w\))?|\\[a-z]{2,7})\s?=\s?"
_NAMED = re.compile(rf"{_NAME}([^=<>≤≥]+)")
_VALUE = r"[^\s=<>≤≥,;，；]{1,40}"
NAMED_RUN = re.compile(
    rf"(?<![\w\\^+*/=-])(?:{_NAME}{_VALUE}(?:\s?[,;，；]\s?(?:and |or )?| and | or )){{1,8}}{_NAME}{_VALUE}?(?=[.。]?$)"
)
"""Values of names one after another at the end of a sentence."""
_TUPLES = re.compile(r"\(([a-zA-Z](?:,\s?[a-zA-Z])+)\)\s?=\s?\(([^()=]+)\)")
GOES_ON = "one list goes on"
_OPEN_END = re.compile(r"(?:\.\.\.|…|\betc\b\.?|and so on|等等?)[\s\])}.。]*$", re.IGNORECASE)
Interval = tuple[str, str, str, str]
"""Opening bracket, lower end, upper end, closing bracket."""
Box = tuple[float, float, float, float]
"""x1, y1, x2, y2."""


def read_list(text: str) -> tuple[list[str], bool]:
    """Split a list into its items, and say whether it stands in round or square brackets."""
    parts, ordered = _items(text)
    items = [undress(re.sub(r"^[A-Za-z]\w?\s?=\s?", "", part)).strip(" '\"") for part in parts]
    if len(bold := [found[1] for part in parts if (found := re.match(r"\*\*([^*]+)\*\*\s?[–—:：-]", part))]) == len(items) > 1:
        return bold, ordered  # **Fever** - with a remark
    return [item for item in items if item], ordered


def read_ratio(text: str) -> list[str] | None:
    """Read the terms of a ratio; None for anything else."""
    found = RATIO.fullmatch(undress(text[:400]).strip(" .。"))
    return [re.sub("[ ,]", "", term) for term in re.findall(_TERM, found[1])] if found else None


def labelled(text: str) -> list[str] | None:
    """Split a text whose parts have the labels (1), (2), ... or a), b), ..., i), ii), ...; None for any other."""
    text = text.strip()
    found = list(_LABEL.finditer(text))
    if len(found) < 2 or found[0].start():
        return None
    said = [one["circled"] and str(ord(one["circled"]) - 0x245F) or one["label"].lower() for one in found]
    for names in (_ROMAN, "abcdefghijklmnopqrstuvwxyz", [str(number) for number in range(1, 100)]):
        if sorted(said) == sorted(names[: len(said)]):
            ends = [one.start() for one in found[1:]] + [len(text)]
            parts = {name: text[one.end() : end].strip(" \n,;，；、") for name, one, end in zip(said, found, ends, strict=True)}
            return [re.sub(r"\s(?:and|or)$|[和与。.]$", "", parts[name]) for name in names[: len(said)]]
    return None


def _items(text: str) -> tuple[list[str], bool]:
    text = re.sub(r"\\(?:left|right)", "", re.sub(r"\\([{}])", r"\1", undress(text.strip(" .。\n")))).strip()
    if parts := labelled(text):
        return parts, False
    ordered = False
    depths = list(accumulate((character in "[({") - (character in "])}") for character in text))
    if text[:1] + text[-1:] in {"[]", "()", "{}"} and depths.count(0) == 1 and depths[-1] == 0:  # one bracket around the whole
        ordered, text = text[0] != "{", text[1:-1]
    text = re.sub(rf"(?m)^{MARKER}", "\n", text)
    if re.search("[;；]", text) and not re.search(r"[(\[{]|(?<!\d),|,(?!\d)", text):  # 1,5; 2,5
        text = re.sub(r"(?<=\d),(?=\d{1,2}(?!\d))", ".", text)
    parts, depth, start = [], 0, 0
    for found in re.finditer(r"[\[({]|[\])}]|[;,，、；\n]|\s(?:and|or|&)\s|[和与或]", text):
        mark = found[0].strip() or "\n"
        if mark in "[({":
            depth += 1
        elif mark in "])}":
            depth = max(0, depth - 1)
        elif depth == 0 and not (
            mark == ","
            and re.match(r"\d{3}(?!\d)", text[found.end() :])
            and re.search(r"(?<!\d)[1-9]\d{0,2}$", text[: found.start()][-8:])
        ):
            parts.append(text[start : found.start()])
            start = found.end()
    parts.append(text[start:])
    return [kept for part in parts if (kept := re.sub(r"^(?:and|or)\s", "", part.strip()).strip())], ordered


def named_values(text: str) -> list[tuple[str, str]] | None:
    """Read a list whose items are all values of names, `x = 2, y = 3` or `(x, y) = (2, 3)`; None for anything else."""
    if text.count("=") == 1 and (found := _TUPLES.fullmatch(undress(text).strip(" .。"))):
        names, values = ([part.strip() for part in found[side].split(",")] for side in (1, 2))
        return list(zip(names, values, strict=True)) if len(names) == len(values) else None
    parts = _items(text)[0] if text.count("=") > 1 else []
    found_parts = [_NAMED.fullmatch(undress(part)) for part in parts]
    return [(found[1], found[2]) for found in found_parts if found] if len(parts) > 1 and all(found_parts) else None


def same_list(answer: str, truth: str, same: Callable[[str, str], bool]) -> tuple[bool, str]:
    """Whether two lists have the same items; their order counts only where the truth lists numbers in round or square brackets."""
    (given, _), (known, ordered) = read_list(answer), read_list(truth)
    if (one := named_values(answer)) and (other := named_values(truth)):
        right = paired(one, other, lambda a, b: a[0] == b[0] and same(a[1], b[1]))
        return right, "the same values" if right else "a value differs"
    if named := one or named_values(truth):  # the values alone stand in the order of the names
        ordered = len({name for name, _ in named}) > 1
        values = [value for _, value in (sorted(named, key=lambda pair: pair[0]) if ordered else named)]
        given, known = (values, known) if one else (given, values)
    if len({bool(_OPEN_END.search(text)) for text in (answer, truth)}) > 1:
        return False, GOES_ON
    if len(given) != len(known):
        return False, f"{len(given)} items instead of {len(known)}"
    if len(given) > MOST_ITEMS:
        return given == known, f"lists of more than {MOST_ITEMS} items, compared as texts"
    if _numbered(truth) or (_numbered(answer) and re.search("[;；]", truth)):  # (1) 3, (2) 5
        wrong = [number for number, pair in enumerate(zip(given, known, strict=True), 1) if not same(*pair)]
        return not wrong, f"part {wrong[0]} differs" if wrong else "the same parts"
    if ordered and all(re.search(r"\d", item) for item in known):
        wrong = [number for number, pair in enumerate(zip(given, known, strict=True), 1) if not same(*pair)]
        return not wrong, "the same items in order" if not wrong else f"item {wrong[0]} differs"
    right = paired(given, known, same)
    return right, "the same items" if right else "an item is not in the ground truth"


def _numbered(text: str) -> bool:
    return bool(re.match(r"\W{0,3}[(（①]", text)) and labelled(undress(text.strip())) is not None


def paired(given: Sequence[Any], known: Sequence[Any], same: Callable[[Any, Any], bool]) -> bool:
    """Whether every given item has a known one of its own (augmenting paths of a bipartite matching)."""
    partner: dict[int, int] = {}
    alike = cache(lambda one, other: same(given[one], known[other]))

    def place(one: int, seen: set[int]) -> bool:
        for other in range(len(known)):
            if other not in seen and alike(one, other):
                seen.add(other)
                if other not in partner or place(partner[other], seen):
                    partner[other] = one
                    return True
        return False

    return len(given) == len(known) and all(place(one, set()) for one in range(len(given)))


def read_intervals(text: str) -> list[Interval] | None:
    """Read an interval, a union of intervals, or an inequality of one variable; None for anything else."""
    if len(text) > 2000:
        return None
    text = undress(text).replace("\\left", "").replace("\\right", "").replace("\\infty", "∞").replace("\\cup", "∪")
    text = re.sub(r"\\l(?:e|eq|eqslant)\b|<=", "≤", re.sub(r"\\g(?:e|eq|eqslant)\b|>=", "≥", text))
    text = text.replace("\\lt", "<").replace("\\gt", ">")
    text = re.sub(r"\binfinity\b|\binf\b|\boo\b", "∞", plain_math(text)).strip(" .。$")
    text = re.sub(r"^\\?\{\s?[a-z]\s?(?:[|∣:]|\\mid\b)\s?(.+?)\\?\}$", r"\1", text)  # {x | x > 3}
    text = re.sub(r"^(?:[a-z]|[A-Z]{2})\s?(?:∈|\\in\b|=)\s?", "", text).replace("+∞", "∞")
    found = [_interval(part.strip()) for part in re.split(r"\s?(?:∪|\bU\b|\bor\b)\s?", text)]
    return None if None in found else found  # type: ignore[return-value]


def _interval(text: str) -> Interval | None:
    if match := _INTERVAL.fullmatch(text):
        opening, low, high, closing = match.groups()
        return "(" if opening == "]" else opening, low.strip(), high.strip(), ")" if closing == "[" else closing
    if match := _FROM_TO.fullmatch(text):
        return "[", match[2], match[3], "]"
    if (match := _BOUND.match(text)) is None:
        return None
    first, sign, second, other, third = match.groups()
    if third is None and not re.fullmatch(r"[a-z]", second):  # x < 3 as -∞ < x < 3
        far = "-∞" if sign in "<≤" else "∞"
        first, sign, second, other, third = far, "<" if sign in "<≤" else ">", first, sign, second
    elif third is None:  # 3 < x
        other, third = ("<", "∞") if sign in "<≤" else (">", "-∞")
    if not re.fullmatch(r"[a-z]", second) or (sign in "<≤") != (other in "<≤"):
        return None
    low, high, lower, upper = (first, third, sign, other) if sign in "<≤" else (third, first, other, sign)
    return ("[" if lower in "≤≥" else "(", low.strip(), high.strip(), "]" if upper in "≤≥" else ")")


def same_intervals(answer: str, truth: str, same: Callable[[str, str], bool]) -> tuple[bool, str]:
    """Whether two intervals, or unions of them, are the same: the same ends, closed and open alike."""
    given, known = read_intervals(answer), read_intervals(truth)
    if given is None or known is None:
        return False, f"{'the answer' if given is None else 'the ground truth'} is not an interval"
    letters = [set(re.findall(r"(?<![A-Za-z\\])[a-z](?![A-Za-z])", text)) for text in (answer, truth) if re.search("[<>≤≥]", text)]
    if len(letters) == 2 and letters[0] != letters[1]:
        return False, "another variable"
    if len(given) != len(known):
        return False, f"{len(given)} intervals instead of {len(known)}"

    def alike(one: Interval, other: Interval) -> bool:
        return (one[0], one[3]) == (other[0], other[3]) and all(
            a == b or ("∞" not in a + b and same(a, b)) for a, b in ((one[1], other[1]), (one[2], other[2]))
        )

    right = paired(given, known, alike)
    return right, "the same interval" if right else "an end or a bracket differs"


def read_boxes(text: str) -> list[Box] | None:
    """Read the boxes `[x1, y1, x2, y2]` of a text; None where there are none or a list has another length."""
    text = re.sub(r"</?box>", " ", text[:20_000])
    named = re.findall(rf"\b([xy])_?(?:(min|1)|max|2)[\"']?\s?[=:：]\s?({_NUMBER})", text)  # x1=10, y1=20, ...
    if len({(axis, low) for axis, low, _ in named}) == 4 == len(named):
        text = "[" + ", ".join(number for *_, number in sorted(named, key=lambda side: (not side[1], side[0]))) + "]"
    groups = [re.findall(_NUMBER, group) for group in re.findall(r"[\[(]([-+\de.,\s]{1,200})[\])]", text)]
    groups = [group for group in groups if len(group) == 4] or groups
    if groups and all(len(group) == 2 for group in groups) and len(groups) % 2 == 0:  # corners
        groups = [groups[place] + groups[place + 1] for place in range(0, len(groups), 2)]
    if not groups and len(bare := re.findall(_NUMBER, text)) == 4 and re.fullmatch(r"[-+\de.,\s]+", text.strip()):
        groups = [bare]
    if not groups or len(groups) > MOST_BOXES or any(len(group) != 4 for group in groups):
        return None
    return [(float(a), float(b), float(c), float(d)) for a, b, c, d in groups]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, 0 to 1; a box without area covers only its equal."""
    if one == other:
        return 1.0
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (one, other)]
    return width * height / (sum(areas) - width * height)


def same_boxes(answer: str, truth: str, least: float) -> tuple[bool, str]:
    """Whether every box of the answer covers its own one of the ground truth, with an IoU of `least` or more."""
    given, known = read_boxes(answer), read_boxes(truth)
    if given is None or known is None:
        return (False, f"{'the answer' if given is None else 'the ground truth'} has no box [x1, y1, x2, y2]")
    if len(given) != len(known):
        return False, f"{len(given)} boxes instead of {len(known)}"
    right = paired(given, known, lambda one, other: overlap(one, other) >= least)
    return right, f"IoU {overlap(given[0], known[0]):.2f}" if len(given) == 1 else "a box for each" if right else "a box differs"


# Questions with blanks: `The area is ____ and the perimeter is ____.`


_BLANK = re.compile(
    r"_{2,}|\\_(?:\\_)+|\\underline\{[\s\\,~quad]*\}|[(（]\s{1,20}[)）]|【\s*】|\[\s*(?:blank|mask)\s*\]", re.IGNORECASE
)
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n+")
_PLACE = re.compile(
    rf"(?i)(?:\b(?P<word>{'|'.join(ORDINALS)}) blank|\bblank\s?[(#]?(?P<number>\d)[)]?"
    r"|第(?P<han>[一二三四五六\d])[个]?空格?)\s?(?:is|should be|:|：|填|为|是|应填|=)\s?[:：]?\s?"
    r"(?P<value>[^\n;；。]{1,80}?)(?=\s?(?:[;；。\n]|\.(?:\s|$)|$"
    r"|[,，]?\s?(?:and |和)?(?:the )?(?:\w+ blank|blank\s?[(#]?\d|第[一二三四五六\d])))"
)
_ASKS = re.compile(r"(?i)[?？]|^(?:what|how|which|find|calculate|compute|determine|name|give|state|求|计算|写出)")
_FIRST = re.compile(r"(?i)(?:^|(?<=[\s,.;:：，。；?？]))(?:part |question )?(?:[(（]?(?:1|a|i)[)）.:：]|①)")


def count_blanks(asked: str) -> int:
    """Return how many blanks a question has."""
    return len(_BLANK.findall(asked[-4000:]))


def count_parts(asked: str) -> int:
    """Return how many answers a question wants in order: one a blank, or one for each of its labelled questions."""
    if blanks := count_blanks(asked):
        return blanks
    start = _FIRST.search(asked[-4000:])
    parts = labelled(asked[-4000:][start.start() :]) if start else None
    return len(parts) if parts and all(_ASKS.search(part) for part in parts) else 0


def in_parts(text: str, many: int) -> list[str]:
    """Return so many parts of an answer: those with labels or between semicolons where it has as many, as parts may have commas."""
    parts = labelled(text) or [part.strip() for part in re.split("[;；]", text.strip(" ;；"))]
    return parts if len(parts) == many else read_list(text)[0]


def filled(response: str, asked: str) -> list[str] | None:
    """Return what a response writes into the blanks of a question, in order; None where it does not say it for each.

    It repeats the question with its blanks filled, or names each blank by its number.
    """
    asked, response = asked[-4000:], response[-4000:]
    many = count_blanks(asked)
    if not many:
        return None
    named = {}
    for found in _PLACE.finditer(response):
        said = (found["word"] or found["number"] or found["han"]).lower()
        place = ORDINALS.index(said) + 1 if said in ORDINALS else "一二三四五六".find(said) + 1 or int(said)
        named[place] = found["value"].strip(" *")
    if many > 1 and sorted(named) == list(range(1, many + 1)):
        return [named[place] for place in sorted(named)]
    with_blanks = [part for part in _SENTENCE.split(asked) if part and _BLANK.search(part)]
    if len(with_blanks) > 1 or not re.search(r"\w{2}|[\u4e00-\u9fff]", _BLANK.sub("", with_blanks[0])):
        return None
    pieces = [r"\W+".join(map(re.escape, re.findall(r"\w+", piece))) for piece in _BLANK.split(with_blanks[0])]
    if not all(pieces[1:-1]):  # two blanks side by side
        return None
    starts = [found.end() for found in re.finditer(rf"(?i)(?<!\w){pieces[0]}", response)] if pieces[0] else [0]
    return next((values for start in reversed(starts[-20:]) if (values := _between(response, start, pieces[1:]))), None)


def _between(text: str, place: int, pieces: list[str]) -> list[str] | None:
    """What stands before each of the pieces, from a place of a text; None where one is missing or far away."""
    values = []
    for piece in pieces:
        end = re.compile(rf"(?i)(?<!\w){piece}(?!\w)" if piece else r"[*\s]*(?:[.。!;；](?=\s|$)|[。；]|\n|$)").search(text, place)
        if end is None or end.start() - place > 80:
            return None
        values.append(text[place : end.start()].strip(" \n\t*$,，:：。."))
        place = end.end()
    return values if all(values) else None
