"""What contradicts a description: another value, another colour, a false comparison of its figures."""

from __future__ import annotations

import re
from fractions import Fraction

from mpo.data.similar import normalised
from mpo.pipelines.mminstruct.language import CJK, IDEOGRAPHS, found_in, pairs, rule
from mpo.pipelines.step import Record
from mpo.verification.texts import read_yes_no
from mpo.verification.words import HAN, read_han

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
    for part in re.split(r"[.](?!\d)|[。;；\n]", _plain(answer)) if type == "long" else []:
        highest, lowest = rule("most").search(part), rule("least").search(part)
        if highest and lowest and highest.start() < lowest.start():
            high, low = (_figures(one) for one in (part[highest.start() : lowest.start()], part[lowest.start() :]))
            if len(high) == len(low) == 1 and high[0] < low[0]:
                return f"contradiction: the highest is {float(high[0])} and the lowest {float(low[0])}"
    if type == "long" and (denied := rule("denied").search(answer)):
        noun, before = (denied[1] or denied[2]).casefold().rstrip("s"), answer[: denied.start()].casefold()
        there = rf"\b(?:an?|the|one|two|\d+|several|many) (?:\w+ )?{re.escape(noun)}" if noun.isascii() else noun
        if re.search(there, before) and not found_in(before, "negated"):
            return f"contradiction: the answer denies {noun!r:.40}, of which it speaks"
    known = f"{item.get('caption', '')}\n{item.get('ocr', '')}".strip()
    if not known:
        return None
    return _of_series(item, read_series(known), known)


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


def _figures(text: str) -> list[Fraction]:
    return [Fraction(token) for token in _TOKEN.findall(text) if re.fullmatch(_NUMBER, token)]


def _plain(text: str) -> str:
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)


def _named(text: str, names: dict[tuple[str, ...], Fraction]) -> list[tuple[str, ...]]:
    tokens = [token.casefold() for token in _TOKEN.findall(text)]
    places = [(at, name) for name in names for at in range(len(tokens)) if tuple(tokens[at : at + len(name)]) == name]
    return [name for _, name in sorted(places)]


def _of_another(text: str, place: str, name: tuple[str, ...], known: str) -> bool:
    """Whether a superlative may be of something else than a series: of what the description has not, or has as one itself."""
    nouns = [[one[1].casefold()] if one[1] else [*one[2]] for one in rule("superlative").finditer(text) if one[1] or one[2]]
    said = any(found_in(part, place) and _named(part, {name: Fraction()}) for part in _PART.split(known))
    return said or any(not any(word in known.casefold() for word in noun) for noun in nouns)


def _of_series(item: Record, values: dict[tuple[str, ...], Fraction], known: str) -> str | None:
    if len({*values.values()}) < 2 or found_in(item["question"], "not_plain"):
        return None
    question, answer, type = item["question"], item["answer"], item["type"]
    asked, said = _named(question, values), read_yes_no(answer)
    edge = {"most": max(values, key=values.__getitem__), "least": min(values, key=values.__getitem__)}
    more, less = (found_in(question, name) is not None for name in ("more", "less"))
    judged = type == "judgement" and said is not None
    compares = re.search(r"\bthan\b|比", question) and len(re.findall(_NUMBER, answer)) < 2 and not _figures(question)
    if judged and compares and len(asked) == 2 and more != less and values[asked[0]] != values[asked[1]]:
        if ((values[asked[0]] > values[asked[1]]) == more) != said:
            return "contradiction: the description compares them otherwise"
    wanted = [name for name in ("most", "least") if found_in(question, name)]
    if judged and len(asked) == len(wanted) == 1 and not _of_another(question, wanted[0], asked[0], known):
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
        if type == "long" and len(numbers) == 1 and not any(rounded(numbers[0], values[names[0]] / by) for by in (1, 1000)):
            return f"contradiction: {numbers[0]}, and the description has another number of {' '.join(names[0])!r:.40}"
    number = re.fullmatch(rf"({_NUMBER})\W*", _plain(answer).strip())
    of_more = any(re.fullmatch(_NUMBER, token) for token in _TOKEN.findall(question))  # "in 2019"
    if type in ("short", "choice") and len(asked) == 1 and number and not of_more and found_in(question, "value_asked"):
        if not rounded(number[1], values[asked[0]]):
            return f"contradiction: {answer!r:.40}, and the description has another value"
    return None


def rounded(text: str, value: Fraction) -> bool:
    """Whether a number is a value, as far as it is written out, or, if it ends in zeros, but for 2 %."""
    digits, _, power = text.partition("e")
    off = abs(Fraction(text) - value)
    close = off <= Fraction(10) ** (int(power or 0) - len(digits.partition(".")[2])) / 2
    return close or (re.fullmatch(r"-?\d+0", text) is not None and off <= abs(value) / 50)


def has(text: str, part: str) -> bool:
    """Whether a normalised text has another one in whole words; in Chinese, two characters at least, and whole numbers."""
    before = r"(?<![\d.])" if part[:1].isdigit() else ""
    if CJK.search(part):
        return len(part) > 1 and re.search(before + re.escape(part), text) is not None
    return re.search(rf"{before}(?<![^\W{IDEOGRAPHS}]){re.escape(part)}(?![^\W{IDEOGRAPHS}]|\.\d)", text) is not None


def figures(text: str) -> str:
    """A normalised text with its numbers in digits, and colours by one name."""
    written = text
    text = re.sub(rf"(?<![\d.]){HAN}+", lambda run: str(run[0] if (value := read_han(run[0])) is None else value), text)
    text = re.sub(r"(?<=\d)_(?=\d)", ".", normalised(whole_numbers(_plain(re.sub(r"(?i)(?<=ty)-(?=[a-z])", " ", text)))))
    text = re.sub(r"(?<=\d)(?=(?:[kcm]?m|kg)\b)", " ", text)
    text = " ".join(pairs("same").get(word, word) for word in text.split())
    return re.sub(r"\b([2-9])0 ([1-9])\b(?= [a-z])", r"\1\2", text) if "ty" in written else text


def whole_numbers(text: str) -> str:
    """A text whose decimal points stay when it is normalised, as underlines."""
    return re.sub(r"(?<=\d)\.(?=\d)", "_", text)
