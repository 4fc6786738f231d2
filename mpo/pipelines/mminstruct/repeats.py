"""What repeats or contradicts another instruction about an image, and what is wrong with a round of a dialogue."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from functools import lru_cache, reduce
from itertools import chain, permutations
from os.path import commonprefix

from mpo.data.similar import normalised
from mpo.pipelines.mminstruct.description import CLOSED, reworded, tokens
from mpo.pipelines.mminstruct.language import CJK, IDEOGRAPHS, found_in, pairs, rule, seed_text, words
from mpo.pipelines.step import Record
from mpo.verification.number import read_number
from mpo.verification.texts import read_yes_no, same_text

_WORD = re.compile(f"{CJK.pattern}|[^\\W{IDEOGRAPHS}]+")
_JOINING = r"(?:is|are|was|were|has|have|had|shows?|reads?|says?)"
_NEAR = rf"(?:\s+(?!(?:and|or|with|of|in|on|at|by|to|from|is|are)\b|{_JOINING}\b)\w+)?\s+"
_CLAUSE = re.compile(r"[^,:，：?？]{1,100}[,:，：?？]\s*(?=\S)")
_CURRENCY = re.compile(r"[$€£¥₩₹]")
_SIGNS = re.compile(r"(?<=[A-Za-z])[#♯♭+]+")


def mark_repeats(items: Sequence[Record]) -> None:
    """Give those of an image's instructions a ``fault`` that ask what an earlier one has asked.

    The same question is one with the same words in the same order, but for words such as "please", "in the image", "is", "of" and
    "which", of the same type or as a choice and a short one; or, of the same type and answer, one that is `reworded`, begins with
    the other's end, has slips of typing, compares the same turned round, or differs by what the description has not: words around
    the question, or one in place of a word that it has. With another answer it is a contradiction, also of a short answer with that
    of a choice, and of a judgement with its negation. A round that goes on from the earlier ones (`goes_on`) is compared with those
    alone.
    """
    seen: dict[str, list[Record]] = {}
    for item in items:
        if item.get("fault") or not item.get("question") or (item.get("earlier") and rule("goes_on").search(item["question"])):
            continue
        loose, negation = question_key(item["question"], loose=True), rule("negation")
        negated = item["type"] == "judgement" and negation.search(loose) is not None
        key = " ".join((negation.sub("", loose) if negated else loose).split())
        one = {**item, "strict": question_key(item["question"]), "loose": loose, "key": key, "negated": negated}
        same = seen.setdefault("".join(sorted(key)) if CJK.search(key) else key, [])
        if fault := next(_repeats_of(one, same, [other for own in seen.values() for other in own]), None):
            item["fault"] = fault
        else:
            same.append(one)


def _repeats_of(one: Record, same: Sequence[Record], seen: Sequence[Record]) -> Iterator[str]:
    """What an instruction repeats or contradicts of `seen`, among them the `same` words in their order."""
    type, plain = one["type"], one["type"] != "long" or len(one["key"].split()) > 2
    for other in same:
        asks_the_same, kinds = one["strict"] == other["strict"], {type, other["type"]}
        if kinds == {"choice", "judgement"} and None not in map(read_yes_no, (one["answer"], other["answer"])):
            kinds = {type}
        alike = type == "long" or _alike(other["answer"], one["answer"])
        if type == "judgement" and one["negated"] != other["negated"]:
            alike = not alike
        related = len(kinds) == 1 or kinds == {"choice", "short"}
        if alike and (asks_the_same or (related and plain)):
            yield "repeat: an earlier instruction about the image asks the same"
        in_order = one["key"] == other["key"] and (type == "judgement" or len(one["key"].split()) > 2)
        if not alike and related and (asks_the_same or in_order):
            yield f"contradiction: an earlier instruction has the same question and the answer {other['answer']!r:.60}"
    for other in seen:
        judged = type == other["type"] == "judgement" and read_yes_no(one["answer"]) is read_yes_no(other["answer"]) is not None
        if (turned := _turned(one["loose"], other["loose"]) if judged else None) is True:
            yield "repeat: an earlier instruction about the image compares the same"
        if turned is False and read_yes_no(one["answer"]):
            yield "contradiction: an earlier instruction has the same answer to the opposite question"
        if other["type"] == type and other not in same and _alike(other["answer"], one["answer"]):
            owned = any("'s " in two[0] and " of " in two[1] for two in permutations((one["question"], other["question"])))
            owned = owned and not rule("relation").search(f"{one['question']} {other['question']}")
            told = owned or type != "judgement" or len(normalised(one["answer"])) > 8
            known = f"{one.get('caption', '')}\n{one.get('ocr', '')}"
            if _slipped(other["question"], one["question"], known) or (known.strip() and _one_apart(other, one, known)):
                yield "repeat: an earlier instruction about the image asks the same, but for a word"
            if _rotated(other["loose"], one["loose"]) or (known.strip() and _framed(other, one, known)):
                yield "repeat: an earlier instruction about the image asks the same"
            exact = owned or read_number(one["answer"]) is not None
            told = told and type != "long" and same_answer(other["answer"], one["answer"])
            if told and reworded(other["loose"], one["loose"], exact=exact):
                yield "repeat: an earlier instruction about the image asks the same in other words"


def _turned(one: str, other: str) -> bool | None:
    """Whether a comparison is another one in other words (True) or its opposite, by a word or by what is compared with what."""
    split = [[*text] if CJK.search(text) else text.split() for text in (one, other)]
    plain = [[pairs("opposite").get(word, word) for word in said] for said in split]
    if split[0] == split[1] or sorted(plain[0]) != sorted(plain[1]) or not {"than", "比"} & {*plain[0]}:
        return None
    return sum(word in pairs("opposite") for said in split for word in said) % 2 == (plain[0] != plain[1])


def question_key(question: str, *, loose: bool = False) -> str:
    """A question without words that do not change what is asked; loose: without those that seldom do.

    >>> question_key("Please tell me, what colour is the car in this picture?") == question_key("What color is the car?")
    True
    """
    question = rule("asked").sub("", question)
    while (clause := _CLAUSE.match(question)) and _frames(clause[0]):
        question = question[clause.end() :]
    question = re.sub(rf"[\u00ad\u200b-\u200d\u2060\ufeff]|(?<=[{IDEOGRAPHS}])\s+(?=[{IDEOGRAPHS}])", "", question)
    said = re.sub(r"^(\w+)n t ", r"\1 ", normalised(question).replace("colour", "color").replace("grey", "gray"))
    said = rule("in_image").sub(" ", rule("in_image").sub(" ", said))
    if loose:
        said = re.sub(r"([高低大小多少长短])于([^ ]+)", r"比\2\1", re.sub(r"(\w)[没不]\1", r"\1", said.replace("which", "what")))
        said = re.sub(rf"({CJK.pattern}{{2,9}})(.{{1,40}}?)\1", r"\1\2", said)  # "the bar of A is higher than the bar of B"
        said = rule("loose_zh").sub("", reduce(lambda text, same: text.replace(*same), pairs("same_zh").items(), said))
    left_out, same = (words("fillers") | words("loose"), pairs("reworded")) if loose else (words("fillers"), {})
    return " ".join(same.get(word) or word for word in said.split() if word not in left_out)


def _frames(clause: str) -> bool:
    said = normalised(clause)
    return {*CJK.sub(" ", said).split()} <= words("framing") and {*CJK.findall(said)} <= {*"".join(words("framing_zh"))}


def _slipped(one: str, other: str, known: str) -> bool:
    """Whether two questions differ by slips of typing: by spaces, or by words like each other, of which we know one each."""
    first, second = (_WORD.findall(text.casefold()) for text in (one, other))
    apart = [at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]]
    if "".join(first) == "".join(second):
        return bool(apart)
    if len(first) != len(second) or not len(apart) < 2 + len(first) / 6:
        return False
    known = f"{known} {seed_text()}".casefold()

    def there(said: list[str], at: int, near: int) -> bool:
        if CJK.match(said[at]):
            return any("".join(said[start : start + near + 1]) in known for start in (at - near, at) if start >= 0)
        return re.search(rf"\b{re.escape(said[at])}\b", known) is not None

    def slip(at: int) -> bool:
        word, typed = first[at], second[at]
        if re.search(r"[\d_]", word + typed) or not (CJK.match(word) and CJK.match(typed)):
            share = SequenceMatcher(None, word, typed).ratio() * (re.search(r"[\d_]", word + typed) is None)
            known_ones = there(first, at, 0) + there(second, at, 0)
            return share > 0.7 and known_ones == 1 or share > 0.75 and known_ones == 0 and len(word) > 4
        ones = next(
            (one for one in ({there(first, at, near), there(second, at, near)} for near in (1, 0)) if one != {False}), set()
        )
        return len(ones) == 2

    return all(map(slip, apart))


def _one_apart(one: Record, other: Record, known: str) -> bool:
    """Whether two questions differ by one word, of which the description has but one form."""
    first, second = (_WORD.findall(item["question"].casefold()) for item in (one, other))
    start = len(commonprefix((first, second)))
    end = len(commonprefix((first[start:][::-1], second[start:][::-1])))
    pair = [run[start : len(run) - end] for run in (first, second)]
    han = all(CJK.match(word) for word in chain(*pair))
    if not all(0 < len(own) <= (3 if han else 1) for own in pair) or start + end < 3:
        return False
    said = ["".join(own) for own in pair]
    if any(re.search(r"[\d_]", word) or word in words("english") or any(found_in(word, kind) for kind in CLOSED) for word in said):
        return False
    there = sum(word in known.casefold() for word in said)
    if one["type"] == "judgement":  # "the lady", "the woman"
        return there == 1 and read_yes_no(one["answer"]) is True and first[start - 1 : start] in (["the"], ["a"], ["an"])
    return there == 1 and read_number(one["answer"]) is None


def _rotated(one: str, other: str) -> bool:
    """Whether a question begins with what another one ends with: "In the middle, is it red?", "Is it red in the middle?"."""
    first, second = (_WORD.findall(text) for text in (one, other))
    return len(first) == len(second) > 2 and any(second[at:] + second[:at] == first for at in range(1, len(first)))


def _framed(one: Record, other: Record, known: str) -> bool:
    """Whether one of two questions is the other with what the description has not around it, or with its alternatives after it."""
    short, long = sorted((item["loose"] for item in (one, other)), key=len)
    bare = [_without_frames(item["question"], known) for item in (one, other)]
    if (bare[0] and bare[0] == bare[1]) or (one["type"] == "judgement" and () != _order(bare[0]) == _order(bare[1])):
        return True
    start, inside, rest = long.partition(short)
    if not start.strip() and one["type"] != "judgement" and rule("alternatives").search(rest):
        return True
    if read_yes_no(one["answer"]) is False or len(_WORD.findall(short)) < 3:
        return False
    whole = CJK.search(short) if inside else None
    return bool(whole or f" {short} " in f" {long} ") and not _says_something(f"{start} {rest}", known.casefold())


def _order(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tokens(text)))


def _says_something(text: str, known: str) -> bool:
    return any(token.isdigit() or token in known or any(found_in(token, kind) for kind in CLOSED) for token in tokens(text))


@lru_cache(maxsize=4096)
def _without_frames(question: str, known: str) -> str:
    """The key of a question without those of its clauses that say nothing of the image."""
    question = re.sub(r"(?<=[?？])[^?？]+$", "", question)
    parts = [one for one in re.split(r"(?<!\d)[,:.!](?=\s)|[，：。！；;]|[?？](?=.)", question) if one.strip()]
    about = known.casefold()

    def says(one: str) -> bool:
        there = (
            len(token) > 1 and token in about if CJK.match(token) else re.search(rf"(?<![\d.])\b{token}(?!\.?\d)", about)
            for token in tokens(one)
        )
        return rule("side").search(rule("below").sub("", one)) is not None or any(there)

    said = [one for one in parts if says(one)]
    return question_key(" ".join(said or parts[-1:]), loose=True)


def _alike(one: str, other: str) -> bool:
    if None not in (said := (read_yes_no(one), read_yes_no(other))):
        return said[0] == said[1]
    first, second = normalised(one), normalised(other)
    return first in second or second in first or same_answer(one, other)


def same_answer(one: str, other: str) -> bool:
    """Whether two short answers are the same: numbers in any notation, other texts but for case, articles and punctuation.

    >>> same_answer("two", "2"), same_answer("Red.", "red"), same_answer("12", "21"), same_answer("25 $", "25 €")
    (True, True, False, False)
    >>> same_answer("C", "C#")
    False
    """
    if _SIGNS.findall(one) != _SIGNS.findall(other):
        return False
    if {*_CURRENCY.findall(one)} != {*_CURRENCY.findall(other)} and _CURRENCY.search(one) and _CURRENCY.search(other):
        return False
    return same_text(one.rstrip("的"), other.rstrip("的"))[0] or (normalised(one) or one) == (normalised(other) or other)


def find_round_fault(item: Record) -> str | None:
    """Why a round of a dialogue cannot be used: its kind, a colon, and the reason; None for a good one.

    The first one stands by itself. A later one asks what no earlier one has asked, and nothing that was said before: it needs the
    image too.

    Args:
        item: with ``type``, ``question``, ``answer`` and ``earlier``, the rounds before it with the same fields.

    >>> first = {"type": "short", "question": "What colour is the car?", "answer": "red"}
    >>> find_round_fault({"type": "judgement", "question": "Is the car red?", "answer": "Yes", "earlier": [first]})
    "leak: an earlier round says that: 'red'"
    """
    question, answer, earlier = item["question"], item["answer"], item.get("earlier") or []
    if not earlier:
        of_nothing = found_in(question, "of_earlier") or (found_in(question, "pronoun") if not content(question) else None)
        return f"dialogue: the first round speaks of something earlier ({of_nothing.strip()!r})" if of_nothing else None
    key = question_key(question, loose=True)
    for one in earlier:
        same = key == question_key(one["question"], loose=True)
        if same and (item["type"] == "long" or same_answer(answer, one["answer"])):
            return "repeat: an earlier round asks the same"
        if same and one is earlier[-1]:
            return f"contradiction: the round before has the same question and the answer {one['answer']!r:.60}"
        if item["type"] == "judgement" and one["type"] == "short" and _says(one, question):
            return f"leak: an earlier round says that: {one['answer']!r:.60}"
    if item["type"] == "short":
        for text in (text for one in earlier for text in (one["question"], one["answer"])):
            if said := said_beside(answer, question, text):
                return f"leak: an earlier round says the answer: {said!r:.60}"
    return None


def content(question: str) -> list[str]:
    """The words of a question that say what it is about, characters in Chinese."""
    plain = CJK.sub(" ", question_key(question, loose=True)).split()
    rest = "".join(CJK.findall(question_key(question, loose=True)))
    for one in sorted(words("general_zh"), key=len, reverse=True):
        rest = rest.replace(one, "")
    return [*(word for word in plain if word not in words("general")), *rest]


def _says(one: Record, question: str) -> bool:
    asked, before, said = {*content(question)}, {*content(one["question"])}, {*content(one["answer"])}
    return bool(before) and before <= asked <= before | said and bool(said & asked)


def said_beside(answer: str, question: str, text: str) -> str | None:
    """Where a text has an answer beside a word of the question: "red car", "the car is red"."""
    said = re.sub(r"^(?:an?|the) (?=\w)", "", normalised(answer))
    if not said or said not in normalised(text) or said in ("a", "i") or (CJK.search(said) and len(said) < 2):
        return None
    named = [word for word in content(question) if not CJK.match(word) and word not in said.split()]
    characters = "".join(word for word in content(question) if CJK.match(word))
    pairs = {characters[at : at + 2] for at in range(len(characters) - 1)} - {said}
    patterns = [
        rf"\b{re.escape(said)}{_NEAR}{re.escape(word)}\b|\b{re.escape(word)}\s+{_JOINING}\s+(?:an? |the )?{re.escape(said)}\b"
        for word in named
    ]
    patterns += [rf"\b(?:is|are|was|were) (?:the )?{re.escape(word)} {re.escape(said)}\b" for word in named[: len(named) == 1]]
    patterns += [f"{re.escape(said)}[个只张根条名位辆棵种幅枚]?的?{pair}|{pair}[是为有]?{re.escape(said)}" for pair in pairs]
    clauses = [normalised(clause) for clause in re.split(r"[.,;:!?。，；：！？、\n]+", text)]
    return next((found[0] for one in patterns for clause in clauses if (found := re.search(one, clause))), None)
