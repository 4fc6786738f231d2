"""What contradicts a description: another value, another colour, a false comparison of its figures."""

from __future__ import annotations

import re
from fractions import Fraction
from itertools import combinations, pairwise

from mpo.data.similar import normalised
from mpo.pipelines.mminstruct.dialogue import content, said_beside
from mpo.pipelines.mminstruct.language import CJK, IDEOGRAPHS, found_in, pairs, rule, words
from mpo.pipelines.step import Record
from mpo.verification.number import HAN, read_han
from mpo.verification.texts import read_yes_no

_NUMBER = r"(?:(?<![\w.)])-)?(?<![\d.])\d{1,15}(?:\.\d{1,15})?(?:e[+-]?\d{1,2})?(?!\d)"
_TOKEN = re.compile(rf"{_NUMBER}|[^\W\d{IDEOGRAPHS}][^\W{IDEOGRAPHS}]*|[{IDEOGRAPHS}]", re.IGNORECASE)
_PART = re.compile(r"[;:!?，；：。！？、\n]+|[.,](?!\d)")


def find_contradiction(item: Record) -> str | None:
    """What an instruction says against its own words or the figures of its description; None where nothing is seen."""
    answer, type = item["answer"], item["type"]
    for one, than, other in rule("compared").findall(answer):
        more = found_in(than, "more") is not None
        if Fraction(one) == Fraction(other) or (Fraction(one) > Fraction(other)) != more:
            return f"contradiction: {one} is not {than} than {other}"
    if type == "long" and (denied := rule("denied").search(answer)):
        noun, before = (denied[1] or denied[2]).casefold().rstrip("s"), answer[: denied.start()].casefold()
        there = rf"\b(?:an?|the|one|two|\d+|several|many) (?:\w+ )?{re.escape(noun)}" if noun.isascii() else noun
        if re.search(there, before) and not found_in(before, "negated"):
            return f"contradiction: the answer denies {noun!r:.40}, of which it speaks"
    known = f"{item.get('caption', '')}\n{item.get('ocr', '')}".strip()
    if not known:
        return None
    return _of_series(item, read_series(known), known) or _unknown_decimal(item, known) or _other_colour(item, known)


def read_series(text: str) -> dict[tuple[str, ...], Fraction]:
    """The values of a text by name, from parts that are the same but for a name and a number.

    >>> {" ".join(name): float(value) for name, value in read_series("The bar of A is 3 high, the bar of B is 4.5 high.").items()}
    {'a': 3.0, 'b': 4.5}
    """
    alike: dict[tuple[str, str], list[tuple[list[str], str]]] = {}
    listed: dict[tuple[str, ...], Fraction] = {}  # "Rome 3, Oslo 5"
    parts = (one for part in _PART.split(_plain(text)) for one in re.split(r"(?<=\d) and (?=[A-Z])|(?<=\d)[和与]", part))
    for part in parts:
        tokens = [token.casefold() for token in _TOKEN.findall(part)]
        numbers = [token for token in tokens if re.fullmatch(_NUMBER, token)]
        if len(numbers) == 1 and tokens[-1] == numbers[0] and 1 < len(tokens) <= (5 if CJK.search(part) else 3):
            listed[tuple(tokens[:-1])] = Fraction(numbers[0])
        if len(numbers) == 1 and len(tokens) > 2:
            at = tokens.index(numbers[0])
            tokens[at] = "#"
            beside = ("".join(tokens[:at][-1:]), "".join(tokens[at + 1 :][:1]))
            alike.setdefault(beside, []).append((tokens, numbers[0]))
    found: list[dict[tuple[str, ...], Fraction]] = []
    for own in alike.values():
        texts = [tokens for tokens, _ in own]
        least = min(map(len, texts))
        start = next((at for at in range(least) if len({one[at] for one in texts}) > 1), least)
        end = next((at for at in range(least - start) if len({one[-1 - at] for one in texts}) > 1), least - start)
        names = [tuple(one[start : len(one) - end]) for one in texts]
        if len({*names}) == len(names) > 1 and all(0 < len(name) < 5 and "#" not in name for name in names) and start + end > 1:
            found.append({name: Fraction(number) for name, (_, number) in zip(names, own, strict=True)})
    if not found and len(listed) > 2:
        return listed
    return found[0] if len(found) == 1 else {}  # of two, it is not known which one is meant


def _plain(text: str) -> str:
    """A text without separators of thousands."""
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _named(text: str, names: dict[tuple[str, ...], Fraction]) -> list[tuple[str, ...]]:
    """The names in a text, in their order, each as often as it is there."""
    tokens = [token.casefold() for token in _TOKEN.findall(text)]
    places = [(at, name) for name in names for at in range(len(tokens)) if tuple(tokens[at : at + len(name)]) == name]
    return [name for _, name in sorted(places)]


def _of_another(text: str, place: str, name: tuple[str, ...], known: str) -> bool:
    """Whether a superlative may be of something else than a series: of what the description has not, or has as one itself."""
    nouns = [[one[1].casefold()] if one[1] else [*one[2]] for one in rule("superlative").finditer(text) if one[1] or one[2]]
    said = any(found_in(part, place) and _named(part, {name: Fraction()}) for part in _PART.split(known))
    return said or any(not any(word in known.casefold() for word in noun) for noun in nouns)


def _of_series(item: Record, values: dict[tuple[str, ...], Fraction], known: str) -> str | None:
    """A comparison, a superlative or a value that is another's in the description."""
    if len({*values.values()}) < 2 or found_in(item["question"], "not_plain"):
        return None
    question, answer, type = item["question"], item["answer"], item["type"]
    asked, said = _named(question, values), read_yes_no(answer)
    edge = {"most": max(values, key=values.__getitem__), "least": min(values, key=values.__getitem__)}
    more, less = (found_in(question, name) is not None for name in ("more", "less"))
    if type == "judgement" and len(asked) == 2 and more != less and said is not None and values[asked[0]] != values[asked[1]]:
        if re.search(r"\bthan\b|比", question) and ((values[asked[0]] > values[asked[1]]) == more) != said:
            return "contradiction: the description compares them otherwise"
    wanted = [name for name in ("most", "least") if found_in(question, name)]
    if (
        type == "judgement"
        and len(asked) == len(wanted) == 1
        and said is not None
        and not _of_another(question, wanted[0], asked[0], known)
    ):
        if (values[asked[0]] == values[edge[wanted[0]]]) != said:
            return f"contradiction: in the description {' '.join(edge[wanted[0]])!r:.40} has that place"
    parts = [] if asked or type == "judgement" else [f"{question} {answer}"]
    for part in _PART.split(_plain(answer)) if type == "long" else parts:
        names, wanted = _named(part, values), [name for name in ("most", "least") if found_in(part, name)]
        if len(names) != 1 or len(wanted) != 1 or found_in(part, "not_plain") or _of_another(part, wanted[0], names[0], known):
            continue
        if values[names[0]] != values[edge[wanted[0]]]:
            return f"contradiction: in the description {' '.join(edge[wanted[0]])!r:.40} has that place, not {' '.join(names[0])!r}"
        numbers = re.findall(_NUMBER, part)  # of what has that place
        if type == "long" and len(numbers) == 1 and not any(_rounded(numbers[0], values[names[0]] / by) for by in (1, 1000)):
            return f"contradiction: {numbers[0]}, and the description has another number of {' '.join(names[0])!r:.40}"
    number = re.fullmatch(rf"({_NUMBER})\W*", _plain(answer).strip())
    of_more = any(re.fullmatch(_NUMBER, token) for token in _TOKEN.findall(question))  # "in 2019"
    if type in ("short", "choice") and len(asked) == 1 and number and not of_more and found_in(question, "value_asked"):
        if not _rounded(number[1], values[asked[0]]):
            return f"contradiction: {answer!r:.40}, and the description has another value"
    return None


def _rounded(text: str, value: Fraction) -> bool:
    """Whether a number is a value, as far as it is written out, or, if it ends in zeros, but for 2 %."""
    digits, _, power = text.partition("e")
    off = abs(Fraction(text) - value)
    close = off <= Fraction(10) ** (int(power or 0) - len(digits.partition(".")[2])) / 2
    return close or (re.fullmatch(r"-?\d+0", text) is not None and off <= abs(value) / 50)


def _unknown_decimal(item: Record, known: str) -> str | None:
    """A decimal, or in a long answer a number above 20, that the description has not, also not rounded or computed of two."""
    asked, answer, known = item["question"], _plain(item["answer"]).strip(), _plain(known)
    if item["type"] != "long" and not (item["type"] == "choice" and found_in(asked, "value_asked")):
        return None
    numbers = [Fraction(one) for one in dict.fromkeys(re.findall(_NUMBER, known))]
    if not _has_figures(known, asked) or rule("computed").search(f"{asked} {answer}"):
        return None
    numbers += [value for one, other in combinations(numbers[:30], 2) for value in (one + other, abs(one - other))]
    numbers += [one * scale for one in numbers for scale in (100, 1000, Fraction(1, 100), Fraction(1, 1000))]  # percent, kilo
    for text in re.findall(_NUMBER, answer) if item["type"] == "long" else [answer]:
        if re.fullmatch(_NUMBER, text) and text[0] != "-" and _exact(text) and not any(_rounded(text, one) for one in numbers):
            return f"contradiction: {text}, and the description has another number"
    return None


def _exact(number: str) -> bool:
    """Whether a number is measured or written, and no year: fewer things are counted."""
    return "." in number or number.startswith("-") or (float(number) > 20 and not re.fullmatch(r"(?:19|20)\d\d", number))


def _has_figures(known: str, asked: str) -> bool:
    """Whether a description has several exact numbers that the question has not, so that it gives the figures of the image."""
    new = [one for one in {*re.findall(_NUMBER, known)} - {*re.findall(_NUMBER, asked)} if _exact(one)]
    return len(new) > 3 or sum("." in one for one in new) > 1


def _other_colour(item: Record, known: str) -> str | None:
    """A thing in a colour that the description does not know, and that is in another one there."""
    if item["type"] == "judgement" and not read_yes_no(item["answer"]):
        return None
    for text in (item["question"], *([item["answer"]] if item["type"] == "long" else [])):
        for colour, thing in _coloured(text):
            there = {one.casefold() for one, other in _coloured(known) if other.casefold() == thing.casefold()}
            if there and colour.casefold() not in known.casefold() and not there & _alike(colour.casefold()):
                return f"contradiction: {colour} {thing}, and the description has another colour"
    return None


def _coloured(text: str) -> list[tuple[str, str]]:
    return [*rule("coloured").findall(text), *rule("coloured_zh").findall(text)]


def _alike(colour: str) -> set[str]:
    return {other for group in words("colours_alike") for other in group.split("/") if colour in group.split("/")}


def unsupported(item: Record) -> str | None:
    """A choice whose right option is not in the caption, while another one is; values that are computed need not be there."""
    if rule("computed").search(item["question"]) or max(map(len, item["choices"])) < 2:
        return None
    known = figures(f"{item.get('caption', '')} {item.get('ocr', '')}")
    if not known:
        return None
    plain = {one: re.sub(r"^(?:an?|the) (?=\w)", "", figures(one)) for one in item["choices"]}
    asked = figures(item["question"])  # what the question gives is no answer
    there = {one: has(known, text) and not has(asked, text) for one, text in plain.items()}
    words = [word for word in plain[item["answer"]].split() if len(word) > 2]
    if len(words) > 2 and sum(word in known for word in words) > len(words) / 2:
        return None  # said in another order
    if not there[item["answer"]] and sum(there.values()) == 1 and not _derived(plain[item["answer"]], known):
        other = next(one for one, found in there.items() if found)
        if found_in(item["question"], "which_colour") and not {*rule("colour").findall(plain[other])} & _colours_of(item):
            return None
        counts = found_in(item["question"], "how_many") and re.search(r"\d", plain[item["answer"]])
        if counts and not said_beside(plain[other], item["question"], known):
            return None  # it may be of something else
        return f"contradiction: of the options, the caption has {other!r:.40} alone, not {item['answer']!r:.40}"
    return None


def other_value(item: Record) -> str | None:
    """What the caption has otherwise, by closed lists: a short answer's colour, unit or figure, and how many things there are."""
    known = figures(f"{item.get('caption', '')}\n{item.get('ocr', '')}")
    said, asked = figures(item["answer"]), figures(item["question"])
    of = "the caption has another"
    if item["type"] == "judgement" and read_yes_no(item["answer"]) is False:
        return None
    for number, thing in rule("counted").findall(f"{asked} {said}" if item["type"] == "short" else asked):
        there = [int(one) for one, other in rule("counted").findall(known) if other == thing]
        place = rf"{thing} (?:on|at|in|to) the (?:left|right|top|bottom|middle|front|back)\b|[左右上下前后][边面方]\S{{0,8}}{thing}"
        some = re.search(place, known)  # not all of them
        if there and not some and int(number) > max(sum(there), max(there) + 1):
            return f"contradiction: {number} {thing}, and {of} number"
    if item["type"] != "short":
        return None
    found = re.fullmatch(r"(-?\d+(?:\.\d+)?) ?(\D*)", said)
    if found and found_in(found[2], "unit") and has(known, found[1]):
        if not re.search(rf"(?<![^\W\d]){re.escape(found[2])}(?![^\W\d{IDEOGRAPHS}])", f"{known} {asked}"):
            return f"contradiction: {item['answer']!r:.40}, and the caption has no such unit"
    if rule("computed").search(item["question"]):
        return None
    colours = {*rule("colour").findall(said)} if found_in(item["question"], "which_colour") else set()
    if colours and not any(one in known for one in colours) and _colours_of(item):
        return f"contradiction: {item['answer']!r:.40}, and {of} colour"
    months = [{*rule("month").findall(text)} for text in (item["answer"], item.get("caption", ""), item["question"])]
    if months[1] and not months[0] <= months[1] | months[2]:
        return f"contradiction: {item['answer']!r:.40}, and {of} month"
    if not found:
        return None
    units = {*rule("converted").findall(f"{asked} {said}")} - {*rule("converted").findall(known)}
    powers = (0, -3, -2, -1, 3, 4, 6) if units else (0, -3, 3, 4, 6)
    counts = _counts_of(item["question"], known) if found_in(item["question"], "how_many") else []
    beside = " ".join(one for one in counts if not has(asked, one))
    if beside and not has(known, found[1]) and not _derived(found[1], beside):
        return f"contradiction: {item['answer']!r:.40}, and {of} number of these"
    stated = has(known, found[1]) or _derived(found[1].lstrip("-"), known, powers)
    if _exact(found[1]) and not stated and _has_figures(known, asked):
        return f"contradiction: {item['answer']!r:.40}, and {of} number"
    return None


def _counts_of(question: str, known: str) -> list[str]:
    """The numbers that a normalised description has beside what is asked about; none where one is of a part of it."""
    if re.search(r"\d of (?:the|them|these|which)\b|其中", known):
        return []
    return [one for one in dict.fromkeys(re.findall(_NUMBER, known)[:30]) if said_beside(one, question, known)]


def _colours_of(item: Record) -> set[str]:
    """The colours that the description may give what is asked about: not those of other things beside it.

    What the description does not name may be anything in it.
    """
    plain, characters = CJK.sub(" ", " ".join(content(item["question"]))).split(), "".join(CJK.findall(item["question"]))
    things = {word.rstrip("s") for word in plain if len(word) > 2} | {one + other for one, other in pairwise(characters)}
    parts = [figures(part) for part in re.split(r"[.。!！?？;；\n]", f"{item.get('caption', '')}\n{item.get('ocr', '')}")]
    own = {at for at, part in enumerate(parts) if any(thing in part for thing in things)}
    before = {at - 1 for at in own if re.match(r"(?:its?|their|they)\b|[它其]", parts[at])}  # of what it speaks of
    left = [
        re.sub(rule("coloured_run"), lambda run: run[0] if any(thing in run[0] for thing in things) else " ", parts[at])
        for at in own - before
    ]
    return {*rule("colour").findall(" ".join([*left, *(parts[at] for at in before)] if own else parts))}


def _derived(answer: str, known: str, powers: tuple[int, ...] = (0, -3, 3, 4, 6)) -> bool:
    """Whether a number is none, one (of an article), or a rounded one, the sum, difference or product of numbers that are known."""
    if not (said := re.match(r"\d{1,15}(?:\.\d{1,15})?(?![\d])", answer)):
        return False
    values = [Fraction(one) for one in re.findall(r"(?<!\d)\d{1,15}(?:\.\d{1,15})?(?!\d)", known)][:30]
    pairs = {found for one, other in combinations(values, 2) for found in (one + other, abs(one - other), one * other)}
    scaled = (one * Fraction(10) ** power for one in values for power in powers)  # units, 万
    return Fraction(said[0]) in {0, 1, sum(values), *pairs} or any(_rounded(said[0], one) for one in scaled)


def has(text: str, part: str) -> bool:
    """Whether a normalised text has another one in whole words; in Chinese, two characters at least, and whole numbers."""
    before = r"(?<![\d.])" if part[:1].isdigit() else ""
    if CJK.search(part):
        return len(part) > 1 and re.search(before + re.escape(part), text) is not None
    return re.search(rf"{before}(?<![^\W{IDEOGRAPHS}]){re.escape(part)}(?![^\W{IDEOGRAPHS}]|\.\d)", text) is not None


def figures(text: str) -> str:
    """A normalised text with its numbers in digits, and colours by one name."""
    text = re.sub(rf"(?<![\d.]){HAN}+", lambda run: str(run[0] if (value := read_han(run[0])) is None else value), text)
    text = re.sub(r"(?<=\d)_(?=\d)", ".", normalised(whole_numbers(_plain(text))))
    text = re.sub(r"(?<=\d)(?=(?:[kcm]?m|kg)\b)", " ", text)
    return " ".join(pairs("same").get(word, word) for word in text.split())


def whole_numbers(text: str) -> str:
    """A text whose decimal points stay when it is normalised, as underlines."""
    return re.sub(r"(?<=\d)\.(?=\d)", "_", text)
