"""Drop instructions that cannot be used: by rules that need no model, by asking without the image, and by a judge.

The rules know what an instruction and its caption say. Whether general knowledge answers a question, and whether the answer follows
from what the caption means, only a model can tell (`Blind`, `Agree`). `benchmarks/mminstruct.py` measures all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from mpo.data.similar import normalised
from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.pipelines.mminstruct.against import figures, find_contradiction, has, whole_numbers
from mpo.pipelines.mminstruct.description import tokens
from mpo.pipelines.mminstruct.domains import prompt
from mpo.pipelines.mminstruct.forms import find_cut, find_repetition
from mpo.pipelines.mminstruct.generate import draw, lettered, priors
from mpo.pipelines.mminstruct.language import (
    CJK,
    IDEOGRAPHS,
    LONGEST_SHORT,
    SHORTEST_LONG,
    found_in,
    length,
    other_language,
    rule,
    without_thinking,
)
from mpo.pipelines.mminstruct.repeats import find_round_fault, mark_repeats, same_answer
from mpo.pipelines.mminstruct.support import find_unsupported
from mpo.pipelines.step import Dropped, Record, Step
from mpo.verification import match
from mpo.verification.texts import read_yes_no

YES_NO = {"en": ("Yes", "No"), "zh": ("是", "否")}


def find_fault(item: Record) -> str | None:
    """Why an instruction cannot be used, as far as rules know: its kind, a colon, and the reason; None for a good one.

    Args:
        item: with ``type``, ``question``, ``answer``, ``choices`` of a choice; as far as known, ``language``, ``caption``, ``ocr``,
            ``fault`` and, of a round of a dialogue, ``earlier`` of `Generate`.

    >>> find_fault({"type": "short", "question": "What colour is the red car?", "answer": "red"})
    "leak: the question contains the answer 'red'"
    """
    return next(_faults(item), None)


def _faults(item: Record) -> Iterator[str]:
    if item.get("fault"):
        yield str(item["fault"])
    if earlier := item.get("earlier"):
        about = tuple((name, item[name]) for name in ("language", "caption", "ocr") if name in item)
        if not _usable(tuple((one["type"], one["question"], one["answer"]) for one in earlier), about):
            yield "dialogue: an earlier round cannot be used"
    known = f"{item.get('caption', '')}\n{item.get('ocr', '')}".strip()
    for name, text in (("question", item["question"]), ("answer", item["answer"]), *(("option", one) for one in _options(item))):
        yield from _of_text(name, text, item, known)
    yield from _of_question(item, known)
    yield from _FORM[item["type"]](item, item.get("language", "en"))
    yield from _of_language(item, known)
    yield from _leaks(item)
    if "earlier" in item and (fault := find_round_fault(item)):
        yield fault
    if fault := find_contradiction(item):
        yield fault
    if fault := find_unsupported(item):
        yield fault


def _options(item: Record) -> list[str]:
    return item.get("choices") or []


def _new(text: str, name: str, known: str) -> str | None:
    said = found_in(text, name)
    return said if said and said.strip().casefold() not in known.casefold() else None


def _of_text(name: str, text: str, item: Record, known: str) -> Iterator[str]:
    language, type = item.get("language", "en"), item["type"]
    if not text.strip():
        yield f"malformed: the {name} is empty"
    plain = re.sub(r"(\\[A-Za-z]+|√) *(?=\{)", r"\1_", text)  # LaTeX
    # "f(-1) is ____ f(0).", not "What is the ____?"
    cloze = name == "question" and not re.search("[?？]", text) and length(re.sub("_{2,}", " ", text), language) > 2
    if said := _new(re.sub("_{3,}", "__", plain) if cloze else plain, "marks", known):
        yield f"malformed: the {name} has {said!r:.40}"
    if known and (name == "question" or type != "long") and (said := _new(plain, "signs", known)):
        yield f"malformed: the {name} has {said!r:.40}"
    blank = name == "question" and re.match(r"\W*(?:finish|complete|continue|fill)\b|.*(?:补全|续写|填空)", text, re.IGNORECASE)
    if name != "option" and not blank and (said := find_cut(text.strip(), type if name == "answer" else name, language, known)):
        yield f"malformed: the {name} is cut off at {said!r:.40}"
    signs = name == "option" and not any(re.search(r"\w", one) for one in _options(item))  # +, -, <
    if not re.search(r"\S" if signs or (_options(item) and name == "answer") else r"\w", text):
        yield f"malformed: the {name} {text!r:.40} has no word"
    if said := _new(text, "twice", known):
        yield f"malformed: the {name} says {said!r:.40} twice"
    if name != "option" and (again := find_repetition(text, 1 if name == "question" else 2)):
        yield f"malformed: the {name} repeats {again!r:.40}"
    if said := _new(text, "caption", known):
        yield f"caption: the {name} speaks of the caption ({said!r})"
    if said := _new(text, "refuses", known) or (_new(text, "undetermined", known) if name == "answer" else None):
        yield f"refusal: the {name} refuses ({said!r})"


def _of_question(item: Record, known: str) -> Iterator[str]:
    question, answer, type, key = item["question"], item["answer"], item["type"], normalised(item["question"])
    bare = not item.get("turn") and rule("bare").search(question)  # "Why?", in a dialogue
    cut = item.get("language") == "zh" and CJK.search(question)
    cut = cut and not all(rule(name).search(question.strip()) for name in ("asks_zh", *["ends_zh"] * bool(known)))
    if bare or cut:
        yield f"malformed: the question {question!r:.40} asks nothing"
    if said := _new(question, "alone", known):
        yield f"no image needed: the question alone gives the answer ({said!r:.60})"
    if known and (said := _new(question, "numbered", known)):
        yield f"malformed: the question has its number {said!r:.40}"
    if known and (rule("states").search(question) or rule("apart").search(question)):
        yield f"malformed: the question {question!r:.40} is no question"
    if not re.search(r"[?？_]|[(（]\s*[)）]", question) and len(key) > 25 and key in normalised(known):
        yield f"malformed: the question {question!r:.40} is a sentence of the description"
    if type != "choice" and rule("by_letter").match(answer) and rule("lettered").search(question):
        yield f"malformed: the question {question!r:.40} has options, and is of the type {type}"
    asked, said = (re.sub('["“][^"”]*["”]', "", text) for text in (question, answer))  # what is quoted asks nothing
    if type != "long" and rule("twofold").search(asked):
        yield f"malformed: the question {question!r:.40} asks two things"
    if type != "choice" and re.match(r"\(?[A-H][.):．、）]\s", answer) and answer.casefold() not in known.casefold():
        yield f"malformed: the answer {answer!r:.40} is an option, and there is none"
    ends = {"short": r"[?？]\W*$|\n\s*\d+[.)、]\s", "long": r"[?？]\W*$|\n\s*\d+[.)、]\s[^\n]*[?？]"}.get(type, r"[?？]|\n\s*\d")
    if type != "choice" and re.search(ends, said) and answer.strip() not in known:
        yield f"malformed: the answer asks {answer!r:.40}"


def _of_language(item: Record, known: str) -> Iterator[str]:
    question, answer, type, language = item["question"], item["answer"], item["type"], item.get("language", "en")
    if known and not rule("writing").search(known) and (said := found_in(f"{question}\n{answer}", "of_text")):
        yield f"caption: it speaks of a text ({said!r}), and the image has none"
    own = language == "zh" or CJK.search(known) or not CJK.search(answer) or re.search("[A-Za-z]", answer)
    written = own and rule("writing").search(question)  # what is read in the image is in any language
    names = type == "short" and (not known or written)
    texts = [("question", question)] + [("answer", answer)] * (type != "choice" and not names)
    texts += [("options", "the " + ", ".join(_options(item)))] * (known != "" and language == "en")
    for name, text in [*texts, *(("option", one) for one in _options(item) if known)]:  # without a caption, names are not known
        # What is read in the image is in the other script, and so may be the other options.
        other = (CJK.search(answer) is None) == (language == "zh") and re.search(r"[^\W\d_]", answer)
        theirs = name == "option" and answer != text and other and answer.casefold() in known.casefold()
        if not theirs and other_language(text, language, known):
            yield f"language: the {name} is not in {'English' if language == 'en' else 'Chinese'}: {text!r:.60}"


@lru_cache(maxsize=4096)
def _usable(rounds: tuple[tuple[str, str, str], ...], about: tuple[tuple[str, str], ...]) -> bool:
    """Whether all of the first rounds of a dialogue can be used; remembered, as every later round asks it."""
    given = [dict(zip(("type", "question", "answer", "turn"), (*one, turn), strict=True)) for turn, one in enumerate(rounds)]
    return find_fault({**dict(about), **given[-1], "earlier": given[:-1]}) is None


def yes_or_no(text: str, language: str) -> bool | None:
    """Read a judgement: True for yes, None if it is neither, takes itself back, or is in another language."""
    if bool(CJK.search(text)) != (language == "zh") or re.match(r"\W*[a-z]*[^\W\d_a-z\u3400-\u9fff]", text, re.IGNORECASE):
        return None  # "Não"
    if language == "zh" and (done := re.match(r"\W*(?:(看不|未|尚未)|[\u3400-\u9fff]{1,2}[了过着](?=\W|$))", text)):
        return not done[1]  # 画了
    first, _, rest = re.sub(r"[\W]+", " ", text.strip()).partition(" ")
    said, then = read_yes_no(text), read_yes_no(rest) if read_yes_no(first) is not None else None
    turned = then is not None and then != said and not re.match("是(?!的?\\W*$)|有", rest)  # "不是，是二等座"
    return None if turned or rule("hedged").search(text) else said


def _judgement(item: Record, language: str) -> Iterator[str]:
    if yes_or_no(item["answer"], language) is None:
        yield f"malformed: the answer is neither {' nor '.join(YES_NO[language])}: {item['answer']!r:.60}"
    asked, said = (tuple(dict.fromkeys(tokens(text))) for text in (item["question"], re.sub(r"^\W*\w+\W+", "", item["answer"])))
    negated = re.search(r"\W(?:not|no)\b|n['’]t\b|\w\W.*[不没]", item["answer"]) is not None
    if () != asked == said and read_yes_no(item["answer"]) == negated:
        yield "contradiction: the reason is the opposite of the answer"
    if rule(f"open_{language}").match(item["question"]):
        yield f"malformed: {' or '.join(YES_NO[language])} does not answer {item['question']!r:.60}"


def _choice(item: Record, language: str) -> Iterator[str]:
    choices, answer = _options(item), item["answer"]
    if not 2 <= len(choices) <= 8:
        yield f"options: there are {len(choices)} options, not 2 to 8"
    if answer not in choices:
        yield f"wrong letter: the answer {answer!r:.40} is none of the options"
    others = [one for one in choices if rule("all").search(one)]
    if others and len(others) < len(choices):  # but points "A and B", "B and C"
        yield f"options: {others[0]!r:.40} refers to the others"
    plain = [normalised(one) for one in choices]
    if found := next((one for one in plain if sum(has(one, other) for other in {*plain} - {one, ""}) > 1), None):
        yield f"options: {found!r:.40} holds two of the others"
    letter = (rf"[(（]?{one}\s?[.):．、)）](?:\s|$)" for one in "ABCDEFGH")
    if again := [one for own, one in zip(letter, choices, strict=False) if re.match(own, one)]:
        yield f"malformed: the option {again[0]!r:.40} has its letter twice"
    of_letters = rf"(?i:letter)|字母|(?<![^\W{IDEOGRAPHS}])[B-H](?![^\W{IDEOGRAPHS}])"
    alone = choices == [*"ABCDEFGH"][: len(choices)] and (item.get("caption") or item.get("ocr"))
    if alone and not re.search(of_letters, f"{item['question']} {item.get('caption', '')}"):
        yield "options: they are letters alone"
    if (found := next(filter(rule("shown").search, choices), None)) is not None:
        yield f"leak: the option {found!r:.40} says whether it is right"
    same = ((one, other) for place, one in enumerate(choices) for other in choices[:place] if same_answer(one, other))
    for one, other in same:
        yield f"options: {one!r:.40} is the same as {other!r:.40}"


def _open(item: Record, language: str) -> Iterator[str]:
    """A long or short answer of another length or kind than is asked for: yes or no, a number, a colour."""
    question, answer, short = item["question"], item["answer"].strip(), item["type"] == "short"
    count = length(answer, language)
    if count > LONGEST_SHORT[language] if short else count < SHORTEST_LONG[language]:
        yield f"malformed: a {item['type']} answer of {count} words"
    polar = short and found_in(question, f"polar_{language}") and read_yes_no(answer) is None
    if polar or (found_in(answer, "bare_yes_no") and rule(f"open_{language}").match(question)):
        yield f"malformed: {answer!r:.40} does not answer {question!r:.60}"
    if short and found_in(question, "how_many") and not re.search(r"\d", figures(answer)) and not found_in(answer, "some"):
        yield f"malformed: {answer!r:.40} is no number"
    if short and found_in(question, "which_colour") and found_in(figures(answer), "no_colour"):
        yield f"malformed: {answer!r:.40} is no colour"
    written = short and re.fullmatch(r"\d{1,2}.?", figures(answer)) and not re.search(r"\d", answer)
    if written and not found_in(question, "quantity"):
        yield f"malformed: {question!r:.60} asks for no number"


_FORM = {"judgement": _judgement, "choice": _choice, "long": _open, "short": _open}


def _leaks(item: Record) -> Iterator[str]:
    question, answer, type = item["question"], item["answer"], item["type"]
    asked, said = (normalised(whole_numbers(text)) for text in (question, answer))
    given = rule("given").search(question)
    if given and re.match(rf"{re.escape(said)}(?!\w)" if said else "$", normalised(given[1] or given[2] or "")):
        yield f"leak: the question says {given[0]!r:.40}"
    if (kind := {"judgement": "told", "choice": "letter"}.get(type)) and (told := found_in(question, kind)):
        yield f"leak: the question says {told!r:.40}"
    why = type == "judgement" and length(said, item.get("language", "en")) > 4 and has(asked, said.partition(" ")[2])
    if why and (not CJK.search(said) or re.search("[，,:：(（]", question)):  # a Chinese statement has the order of its question
        yield "leak: the question says why"
    if type == "long" and (first := normalised(re.split(r"(?<=[.!?。！？])", answer)[0])) and first in asked:
        yield "leak: the question contains the answer's first sentence"
    said = re.sub(r"^(?:an?|the) (?=\w)", "", said)
    if type in ("judgement", "long") or said in ("", "a", "i", "one") or not has(asked, said):  # words, too
        return
    rest = re.sub(rf"(?<![A-Za-z]){re.escape(said)}(?![A-Za-z])", " ", asked)
    if (last := re.search(r"[(（]([^()（）,，、/]*)[)）]\W*$", question)) and re.search(r"\b(?:is|was|are)\b|[是为]", last[1]):
        if has(normalised(last[1]), said):
            yield f"leak: the question says {last[0]!r:.40}"
    alternatives = re.search(r"\bor\b|\bamong\b|\bchoose\b|\bcompar|\b(?:of|between)\b.*\band\b|还是|或|[和与跟].*[哪谁]", rest)
    listed = re.search(r"[(（][^()（）]*[,，、][^()（）]*[)）]", question)
    limit = re.fullmatch(r"[\d_]+", said) and rule("bound").search(re.sub(rf"(?<![\w_]){said}(?![\w_])", "#", asked))
    if not (alternatives or listed or limit or any(has(asked, normalised(one)) for one in _options(item) if one != answer)):
        yield f"leak: the question contains the answer {answer!r:.60}"


class Check(Step):
    """Drop an instruction for what rules know (`find_fault`); the answer of a judgement becomes Yes or No."""

    verb = "check"

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:  # noqa: D102
        if fault := find_fault(record):
            raise Dropped(fault, kind=fault.partition(":")[0])
        if record["type"] == "judgement":
            language = record.get("language", "en")
            record["answer"] = YES_NO[language][not yes_or_no(record["answer"], language)]
        return record


def check_all(items: Sequence[Record]) -> list[str | None]:
    """The faults of the instructions about one image, repeats included, in their order."""
    marked = [{**item} for item in items]
    mark_repeats(marked)
    return [find_fault(item) for item in marked]


class Blind(Step):
    """Drop an instruction that a language model answers without the image.

    It may say that it does not know. If all of `n` responses are right, the options being in another order each time, no image is
    needed; a guess among four options is right as often in one of 64 cases with n 3.

    Args:
        generator: the language model.
        n: number of times that it is asked, and has to be right.
        sampling: settings of `mpo.generation.generator.Generator.generate`.
    """

    verb = "blind"

    def __init__(self, generator: Generator, *, n: int = 3, **sampling: Any) -> None:
        if n < 1:
            raise ValueError(f"Expected n to be 1 or more; got n={n}.")
        self.generator, self.n = generator, n
        self.sampling = asdict(Decoding(**{"temperature": 0.7, "max_new_tokens": 32, **sampling}))

    def _orders(self, record: Record) -> list[list[str]]:
        choices = record.get("choices") or []
        return [draw(record["id"], number).sample(choices, len(choices)) for number in range(self.n)]

    def requests(self, record: Record) -> list[Request]:  # noqa: D102
        given: dict[str, Any] = {name: record["type"] == name for name in ("long", "choice")}
        given["earlier"], language = record.get("earlier", ()), record.get("language", "en")
        asked = ["\n".join([record["question"], *lettered(order)]) for order in self._orders(record)]
        return [Request.ask(prompt("blind", language, question=one, **given)) for one in asked]

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:  # noqa: D102
        said = [without_thinking(several[0].text) for several in responses]
        if all(self._right(text, record, order) for text, order in zip(said, self._orders(record), strict=True)):
            raise Dropped(f"no image needed: without it, a model says {said[0]!r:.60}", kind="no image needed")
        return record

    @staticmethod
    def _right(said: str, record: Record, order: Sequence[str]) -> bool:
        plain = said.strip(" .*`\"'。")
        if not plain or plain.upper() == "UNKNOWN":
            return False
        if record["type"] == "long":
            return plain.upper() == "YES"
        if record["type"] == "judgement":
            return read_yes_no(plain) == read_yes_no(record["answer"])
        known = normalised(record["answer"])
        stated = not order and len(plain) < 10 * len(known) and len(known) > 2 and has(normalised(plain), known)  # in a sentence
        return stated or (match(plain, record["answer"], choices=order).correct if order else same_answer(plain, record["answer"]))


_VERDICT = re.compile(r"verdict[\s*_`\"']*[:：][\s*_`\"']*(SUPPORTED|CONTRADICTED|UNKNOWN)", re.IGNORECASE)


class Agree(Step):
    """Drop an instruction whose answer the caption contradicts, as a language model judges. No verdict keeps it.

    Args:
        generator: the language model.
        sampling: settings of `mpo.generation.generator.Generator.generate`.
    """

    verb = "agree"

    def __init__(self, generator: Generator, **sampling: Any) -> None:
        self.generator = generator
        self.sampling = asdict(Decoding(**{"temperature": 0.0, "max_new_tokens": 256, **sampling}))

    def requests(self, record: Record) -> list[Request]:  # noqa: D102
        if not record.get("caption"):
            return []
        given = {name: record[name] for name in ("caption", "question", "answer")}
        given |= {"priors": priors(record), "earlier": record.get("earlier", ())}
        return [Request.ask(prompt("judge", record.get("language", "en"), **given))]

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:  # noqa: D102
        said = without_thinking(responses[0][0].text) if responses else ""
        found = _VERDICT.findall(said)
        if found and found[-1].upper() == "CONTRADICTED":
            raise Dropped(f"contradiction: a judge says {said!r:.120}", kind="contradiction")
        return {**record, "verdict": found[-1].lower()} if found else record
