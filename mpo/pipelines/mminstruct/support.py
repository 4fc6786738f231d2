"""Whether a description supports what is said of its image: that its words are there, and beside what they are said of."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from itertools import combinations

from mpo.data.similar import normalised
from mpo.pipelines.mminstruct.against import figures
from mpo.pipelines.mminstruct.description import NUMBER, Description, clauses, stem, tokens
from mpo.pipelines.mminstruct.language import CJK, IDEOGRAPHS, found_in, length, pairs, rule, words
from mpo.pipelines.step import Record
from mpo.verification.texts import read_yes_no

SHORTEST = {"en": 25, "zh": 30}
"""What is shorter is no description that could support an answer: words in English, characters in Chinese."""
LONGEST = 600
"""What has more clauses is no description, but a text; the time that a check takes grows with the square of their number."""
_read = lru_cache(maxsize=256)(Description)


def find_unsupported(item: Record) -> str | None:
    """What the description of an image does not support, or has otherwise; None where nothing is seen, or there is no description.

    >>> caption = "A red boat lies at the quay, a white one behind it. Two gulls sit on a post, and an old man there mends a net."
    >>> item = {"type": "short", "question": "What does the man mend?", "answer": "a bicycle", "caption": caption}
    >>> find_unsupported(item), find_unsupported({**item, "answer": "a net"})
    ("unsupported: the description has nothing of 'a bicycle'", None)
    """
    caption = item.get("caption") or ""
    if length(caption, item.get("language", "en")) < SHORTEST[item.get("language", "en")] or item["question"] in caption:
        return None
    known = _read(f"{caption}\n{item.get('ocr') or ''}\n{', '.join(item.get('tags') or ())}")
    if not 0 < len(known.clauses) <= LONGEST:
        return None
    asked = normalised(item["question"])
    if any(len(one) > 20 and normalised(one) in asked for one in re.split(r"(?<!\d)[.。!?！？\n]", caption)):
        return "no image needed: the question has a sentence of the description"
    whole, judged = f"{item['question']} {item['answer']}", item["type"] == "judgement"
    placed = rule("order").search(caption) and (rule("side").search(whole) or rule("order").search(whole))
    if rule("of_image").search(item["question"]) or placed:
        return None
    words = {one for one in tokens(item["question"] if judged else whole) if len(one) > 1 and not one.isdigit()} - {"scen"}
    told = read_yes_no(item["answer"]) and len(words) > 1 if judged else item["type"] != "long" and len(words) > 3
    if told and not any(map(known.has_word, words)) and not re.search(r"\d", figures(whole)):
        return None if rule("writing").search(item["question"]) else "no image needed: the description has no word of the question"
    said = _other_count(item, known) or _OF[item["type"]](item, known)
    return f"unsupported: {said}" if said else None


def _of_choice(item: Record, known: Description) -> str | None:
    """Another option that stands beside what the question is about, or that has the place of a superlative."""
    question, answer = item["question"], item["answer"]
    if known.computes(question) or found_in(re.sub(r"\bof th(?:em|[eo]se)\b|其中|这些", "", question), "not_plain"):
        return None
    if rule("ordinal").match(answer):
        return None  # "2 in the first row, 3 in the second"
    asked = {*tokens(question)}
    names: dict[str, set[str]] = {one: {*tokens(one)} - asked for one in item["choices"]}
    shared = set.intersection(*names.values())
    names = {one: own - shared for one, own in names.items()}
    if not names.get(answer) and any(names.values()):
        return None  # point A
    if edge := [name for name in ("most", "least") if found_in(question, name)]:
        values = {one: known.value(own, set().union(*names.values()) - own) for one, own in names.items()}
        given = {one: value for one, value in values.items() if value is not None}
        best = (max if edge == ["most"] else min)(given, key=given.__getitem__, default=answer)
        return f"{best!r:.40} has that place, not {answer!r:.40}" if answer in given and given[best] != given[answer] else None
    numbers = NUMBER.findall(figures(answer))
    if numbers and not {*numbers} & known.known and not _new_number(numbers, item, known):
        return None  # rounded, none, one or a sum
    beside = known.beside(asked)
    none = not any(names.values())
    scores = {one: known.support([*own] or tokens(one), beside) * (bool(own) or none) for one, own in names.items()}
    best = max(scores, key=scores.__getitem__)
    alone = not numbers and not any(score for one, score in scores.items() if one != best) and all(map(known.has_word, names[best]))
    if scores[best] - scores[answer] > (0.09 if alone else 0.15):
        return f"of the options, the description supports {best!r:.40}, not {answer!r:.40}"
    return None


def _of_short(item: Record, known: Description) -> str | None:
    """A number, a colour, a month, a unit or words that the description has not, or has of something else."""
    question, answer, plain = item["question"], item["answer"], figures(item["answer"])
    if read_yes_no(answer) is not None:
        return None
    asked, said, numbers = {*tokens(question)}, tokens(answer), NUMBER.findall(plain)
    if new := _new_number(numbers, item, known):
        return f"the description has no {new}"
    if (fault := _of_closed_lists(item, known)) or known.computes(question):
        return fault
    theirs = (CJK.search(answer) is None) == (item.get("language") == "zh")  # in the other script
    new_words = [one for one in said if one not in asked and not known.has_word(one)]
    vague = found_in(question, "how_many") and found_in(answer, "some")
    written = rule("writing").search(question) and not any(map(known.has_word, tokens(rule("writing").sub(" ", question))))
    if not (numbers or theirs or vague or written) and len(new_words) > len(said) / 2 and not _shades(plain, known):
        return f"the description has nothing of {answer!r:.40}"
    if found_in(question, "most") or found_in(question, "least"):
        return None
    if len(numbers) == 1 and not rule("derived").search(f"{question} {answer}") and (other := known.of_another(numbers[0], asked)):
        return f"the description has {other} there, not {numbers[0]}"
    for kind, find in _KINDS.items():
        own = kind != "number" and {*tokens(re.sub("[色角边侧方面]", "", find.sub("", plain)))}
        if not (kind == "number" and _derived(item)) and (fault := _elsewhere(kind, plain, own or asked, known, 1)):
            return fault
    there = {one for one in said if one in known.known} - asked
    if _derived(item) or (answer in (item.get("ocr") or "") and rule("writing").search(question)):
        return None
    if there and not numbers and len(asked & known.known) > 1:
        beside = known.beside(asked)
        if max(beside) - max(near for near, clause in zip(beside, known.clauses, strict=True) if there & clause[1]) > 0.5:
            return f"the description has {answer!r:.40} of something else"
    return None


def _of_closed_lists(item: Record, known: Description) -> str | None:
    """A unit, a month or a colour of a short answer, and a colour of its question, that the description has not."""
    plain, asked = figures(item["answer"]), figures(item["question"])
    number = re.fullmatch(r"-?\d+(?:\.\d+)? ?(\D*)", plain)
    if number and found_in(number[1], "unit") and not (number[1] == "度" and "°" in item["caption"]):
        value = plain[: number.start(1)].strip()
        clock = rf"(?<!\d){value}:\d\d" if re.match("hour|小时", number[1]) else rf"\d:{value}(?!\d)"
        if re.match("hour|minute|second|小时|分|秒", number[1]) and re.search(clock, item["caption"]):
            return None
        if not re.search(rf"(?<![^\W\d]){re.escape(number[1])}(?![^\W\d{IDEOGRAPHS}])", f"{known.plain} {asked}"):
            return f"the description has no unit {number[1]!r}"
    months = [{*rule("month").findall(text)} for text in (item["answer"], item["caption"], item["question"])]
    if months[1] and not months[0] <= months[1] | months[2]:
        return f"the description has no month {item['answer']!r:.40}"
    return _new_colour(plain if rule("alternatives").search(asked) else f"{plain} {asked}", known)


def _of_long(item: Record, known: Description) -> str | None:
    said = {*tokens(item["answer"])}
    if sum(map(known.has_word, said)) < len(said) / 4 and not rule("measured").search(item["answer"]):
        return f"the description has nothing of {item['answer']!r:.40}"
    return _of_statement(item["answer"], known, derived=rule("derived").search(item["question"]) is not None)


def _of_judgement(item: Record, known: Description) -> str | None:
    """A comparison of two values, a yes to what the description has otherwise, or a no to what it says."""
    question, said = item["question"], read_yes_no(item["answer"])
    more, less, plain = (found_in(question, name) is not None for name in ("more", "less", "not_plain"))
    compared = re.fullmatch(r"(.+?)(?:\bthan\b|比)(.+)", question) if len(NUMBER.findall(figures(item["answer"]))) < 2 else None
    if compared and more != less and not plain:
        compared_by = rule("more" if more else "less")
        one, other = ({*tokens(compared_by.sub(" ", part))} & known.known for part in compared.groups())
        one, other = known.rarest(one - other), known.rarest(other - one)
        values = known.value(one, other), known.value(other, one)
        if None not in values and values[0] != values[1] and ((values[0] > values[1]) == more) != said:  # type: ignore[operator]
            return "the description compares them otherwise"
    asked = {*tokens(question)}
    if said is None or not asked & known.known:
        return None
    beside = known.beside(asked)
    best = max(range(len(beside)), key=beside.__getitem__)
    sentence = [clause for clause in known.clauses if clause[0] == known.clauses[best][0]]
    negated = [
        found_in(text, "negated") is not None for text in (question, known.clauses[best][2], " ".join(one[2] for one in sentence))
    ]
    negated[1] |= re.match("no |neither ", sentence[0][2]) is not None and sentence[1:2] == [known.clauses[best]]
    whole = len(asked) > 1 and beside[best] > 0.8 and not rule("side").search(figures(question))
    why = re.sub(r"^\W*\w+\W*", "", item["answer"])
    about = {one for one in asked if not rule("side").search(one)}
    if length(why, item.get("language", "en")) > 2 and (fault := _of_statement(why, known, about, _derived(item))):
        return fault
    if said:
        nouns = rule("exists").search(question)
        if nouns and not any(known.has_word(one) for one in tokens(nouns[1] or nouns[2])):
            return f"the description has no {nouns[1] or nouns[2]!r:.40}"
        denied = whole and not negated[0] and negated[1] and asked <= known.clauses[best][1]
        return "the description denies it" if denied else _of_statement(question, known)
    new = {*tokens(why)} - asked
    same = re.match(r"(?:it|they|he|she|this|these)\b|[是为]", why, re.IGNORECASE)  # "No, it is at the south bank."
    if new and any(new <= own and (same or asked & own) for _, own, _ in known.clauses):
        return None
    limit = rule("limit").search(NUMBER.sub("#", figures(question)))
    if more or plain or limit or rule("quantified").search(question) or beside[best] < 0.8 or negated[0] or negated[2]:
        return None
    there = frozenset().union(*(clause[1] for clause in sentence))
    if not asked & known.known <= there:
        return None
    whole = whole and asked <= there
    asks = re.sub(r"(?:周|星期|礼拜)\d", "", figures(question))
    closed = [({*find.findall(asks)}, {*find.findall(known.clauses[best][2])}) for find in (rule("colour"), NUMBER)]
    alike = [one == other for one, other in closed if one]
    return "the description says so" if all(alike) and (whole or alike) else None


def _of_statement(text: str, known: Description, asked: Collection[str] = (), derived: bool = False) -> str | None:
    """A number or a colour in a text that the description has not, and a colour or a side that it has otherwise there."""
    sentences = re.split(r"[.](?!\d)|[;!?。；！？\n]", text)
    for at, part in clauses(text):
        plain = figures(re.sub("十分(?!钟|之)|四周", "", part))
        for number in NUMBER.findall(plain):
            if not known.has_number(number, sentences[at], derived) and not _counted(number, plain, known):
                return f"the description has no {number}"
        if fault := _new_colour(plain, known):
            return fault
        for kind in ("colour", "side"):
            if fault := _elsewhere(kind, plain, {*tokens(part), *asked}, known, 2):
                return fault
        for colour, thing in [*rule("coloured").findall(part), *rule("coloured_zh").findall(part)]:
            if fault := _elsewhere("colour", figures(colour + "色" * bool(CJK.match(colour))), {*tokens(thing)}, known, 1):
                return fault
    return None


def _counted(number: str, text: str, known: Description) -> bool:
    """Whether a number that the description has not is a limit, or a small one of things that it does not count."""
    marked = re.sub(rf"(?<![\d.]){re.escape(number)}(?![\d.])", "#", text)
    before = re.search(r"([a-z]+) #", marked)
    named = before and before[1] not in words("empty") and re.search(rf"\b{before[1]} \d", known.plain)  # Line 5
    if rule("limit").search(marked) or named or not number.isdigit() or int(number) > 12:
        return rule("limit").search(marked) is not None
    after = re.search(r"# ?[个只张根条名位辆棵种座盏枚把间本台朵片株头杯艘匹道块层盆]?([\u3400-\u9fff]{1,8}|[a-z -]+)", marked)
    things = {*tokens(after[1])[:3]} if after else set()
    return not any(things & own and re.search(r"\d", plain) for _, own, plain in known.clauses)


def _other_count(item: Record, known: Description) -> str | None:
    """A number of things in a question, "the five bars", that the description counts otherwise: "three blue bars"."""
    for number, *things in rule("counted").findall(figures(item["question"])) if item["type"] != "judgement" else []:
        most = max((int(one) for one, *others in rule("counted").findall(known.plain) if others == things), default=int(number))
        if int(number) > most and not found_in(things[0], "unit"):  # fewer are some of them
            return f"the description has {most} {''.join(things)}, not {number}"
    return None


def _new_number(numbers: list[str], item: Record, known: Description) -> str | None:
    """The first of an answer's numbers that the description neither has nor gives as a sum, a difference or a list's length."""
    question, made = item["question"], _derived(item)
    counts = found_in(question, "how_many") is not None
    has = (known.has_number(one, question, made) or (counts and _counts(one, question, known)) for one in numbers)
    return next((one for one, there in zip(numbers, has, strict=True) if not there), None)


def _derived(item: Record) -> bool:
    return any(rule(name).search(figures(item[part])) for part in ("question", "answer") for name in ("derived", "reckoned"))


def _counts(number: str, question: str, known: Description) -> bool:
    """Whether a count is made of two of a sentence, or is that of a list, and the description has no number beside the things."""
    thing = {*tokens(question)[:1]}
    if any(thing & own and re.search(r"\d", plain) for _, own, plain in known.clauses):
        return False
    if number in known.listed and number > "2" and thing & known.known:
        return True
    for sentence in {clause[0] for clause in known.clauses}:
        of_sentence = " ".join(clause[2] for clause in known.clauses if clause[0] == sentence)
        there = [int(one) for one in NUMBER.findall(of_sentence) if one.isdigit()][:12]
        if number.isdigit() and any(one + other == int(number) for one, other in combinations(there, 2)):
            return True
    return False


def _shades(text: str, known: Description) -> bool:
    there = {*rule("colour").findall(known.plain)}
    alike = [{*group.split("/")} for group in words("colours_alike")]
    return any(one in group and there & group for one in rule("colour").findall(text) for group in alike)


def _new_colour(text: str, known: Description) -> str | None:
    new = [one for one in rule("colour").findall(text) if one not in known.plain and not _shades(one, known)]
    return f"the description has no {new[0]}" if new and rule("colour").search(known.plain) else None


_KINDS = {"colour": rule("colour"), "side": rule("side"), "number": NUMBER}


def _elsewhere(kind: str, text: str, about: set[str], known: Description, least: int) -> str | None:
    """The one value of a kind in a text, where the description has another one nearer to at least some words.

    Args:
        kind: ``colour``, ``side`` or ``number``.
        text: normalised, with the value.
        about: the words that it is said of.
        known: the description.
        least: number of these that the description must have.
    """
    find = _KINDS[kind]
    if not 0 < len(said := {*find.findall(text)}) <= 1 + (kind == "side"):
        return None
    there = [{*find.findall(plain)} for _, _, plain in known.clauses]
    has = [all(one in (clause[2] if CJK.match(one) else {*find.findall(clause[2])}) for one in said) for clause in known.clauses]
    if kind == "number":  # alike, and not one of a list
        there = [{one for one in others if _form(one) == _form(*said)} if len(others) < 3 else set() for others in there]
    own = {*map(stem, [*said, *find.findall(known.plain)])}
    asked = {one for one in about & known.known if not find.fullmatch(one) and one not in own}
    asked -= {one for one in asked if kind != "number" and NUMBER.fullmatch(one)}
    if len(asked) < least:
        return None
    beside = known.beside(asked)
    mine = max((near for near, found in zip(beside, has, strict=True) if found), default=-1.0)
    best = max(range(len(there)), key=lambda at: (beside[at] if there[at] - about else -1.0, bool(has[at])))
    if kind == "side" and not any(pairs("facing").get(one) in there[best] for one in said):
        return None  # what is below may be on the left
    of_said = [own for _, own, plain in known.clauses if said <= {*find.findall(plain)}]
    listed = kind == "number" and any(all(map(NUMBER.fullmatch, own)) for own in of_said)
    apart = 0.15 if kind == "number" else 0.3
    if listed or mine < 0 or has[best] or beside[best] < 0.3 + apart or beside[best] - mine < apart:
        return None
    return f"the description has {', '.join(sorted(there[best]))} there, not {', '.join(said)}"


def _form(number: str) -> tuple[bool, bool]:
    return "." in number, "." not in number and len(number) > 2


_OF = {"choice": _of_choice, "short": _of_short, "long": _of_long, "judgement": _of_judgement}
