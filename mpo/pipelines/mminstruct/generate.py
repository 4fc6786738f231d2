"""Write instructions about an image from its caption alone, after seed questions; the responses are parsed strictly."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import pairwise
from os.path import commonprefix
from typing import Any
from unicodedata import normalize

from mpo.data.similar import normalised
from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.io import BadRecord, parse_json
from mpo.pipelines.mminstruct.description import reworded
from mpo.pipelines.mminstruct.domains import ASKED, TYPES, check_domain, load_domains, prompt, without_placeholders
from mpo.pipelines.mminstruct.language import CJK, LONGEST_SHORT, found_in, length, pairs, rule, without_thinking, words
from mpo.pipelines.step import Record, Step
from mpo.verification.dress import undress
from mpo.verification.number import read_number
from mpo.verification.texts import read_yes_no, same_text

COUNTS = {"judgement": 4, "choice": 3, "long": 3, "short": 3}
"""Instructions that are asked for at a time, by type: two Yes and two No, as in the paper's code."""
ROUNDS = 4
"""Rounds of a dialogue."""
KEPT = ("images", "source", "domain", "language", "caption", "image_id", "licence", "origin", "ocr", "tags", "width", "height")
"""Fields of an image that its instructions have too."""
_TEXT = {"type": "string"}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


_INSTRUCTION = _object(question=_TEXT, choices={"type": "array", "items": _TEXT}, answer=_TEXT)
SCHEMA = _object(items={"type": "array", "items": _INSTRUCTION})
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "instructions", "strict": True, "schema": SCHEMA}}
"""Field of a request by which a server keeps to the schema: OpenAI's, vLLM's, SGLang's; LMDeploy's with guided decoding."""
_CLAUSE = re.compile(r"[^,:，：?？]{1,100}[,:，：?？]\s*(?=\S)")
_TAG = re.compile(r"<(/?)([QCA])(\d{1,3})>")
_LETTERED = re.compile(r"\s*(?:[-*•]\s+)?[(（]?([A-HＡ-Ｈ])\s*[.):：．、，）]\s*(\S.*?)\s*", re.DOTALL)
_SPACED = re.compile(r"\s*([A-H])\s+(\S.*?)\s*", re.DOTALL)
_LEAD = re.compile(r"^(?:the )?(?:(?:correct|right) )?(?:answer|option|答案|选项?)(?: is|是|为)?\s*[:：]?\s*(?=\S)", re.IGNORECASE)
_CURRENCY = re.compile(r"[$€£¥₩₹]")
_SIGNS = re.compile(r"(?<=[A-Za-z])[#♯♭+]+")


def draw(*parts: Any) -> random.Random:
    """A random number generator that depends on some values alone."""
    return random.Random(int.from_bytes(blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "big"))


class Seed(Step):
    """Give an image with a caption its ``seeds``: for each type and round, some random seed questions of its domain.

    Args:
        types: the types of instructions, and ``dialogue``.
        rounds: how often each type is asked for.
        per: maximum number of seed questions of a round.
        domains: files of further domains (`load_domains`).
        seed: of the random choice.

    Raises:
        ValueError: for an unknown type.
    """

    verb = "seed"

    def __init__(
        self, *, types: Sequence[str] = TYPES, rounds: int = 1, per: int = 3, domains: Sequence[str] = (), seed: int = 0
    ) -> None:
        if wrong := [one for one in types if one not in ASKED] or ["none"] * (not types):
            raise ValueError(f"Expected types among {', '.join(ASKED)}; got {wrong[0]!r}.")
        if rounds < 1 or per < 0:
            raise ValueError(f"Expected rounds of 1 or more and 0 or more seeds; got rounds={rounds}, per={per}.")
        self.types, self.rounds, self.per, self.seed = [*dict.fromkeys(types)], rounds, per, seed
        self.domains = [str(one) for one in domains]
        self._known = load_domains(self.domains)
        known = repr(sorted((name, domain.model_dump()) for name, domain in self._known.items()))
        self.questions = blake2b(known.encode(), digest_size=8).hexdigest()

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:  # noqa: D102
        domain = self._known[check_domain(record.get("domain"), self._known, record["id"])]
        language, seeds = record.get("language", "en"), []
        for type in self.types:
            pool = domain.questions(type, language)
            wanted = self.per * self.rounds
            order = draw(self.seed, record["id"], type).sample(pool * (1 + wanted // len(pool)), wanted)
            for number in range(self.rounds):
                own = [*dict.fromkeys(order[self.per * number : self.per * (number + 1)])]
                seeds.append({"type": type, "round": number, "questions": own})
        return {**record, "seeds": seeds}


class Generate(Step):
    """Ask a language model for instructions about an image, which it knows by the caption alone.

    The outputs have ``type``, ``question``, ``choices`` (of a choice), ``answer``, and what is known of the image; ``fault`` where
    a part of a response cannot be used (`mpo.pipelines.mminstruct.check.Check` drops it). The rounds of a dialogue have its id as
    ``dialogue``, their place in it as ``turn``, and the ``earlier`` rounds, of which they may speak.

    Args:
        generator: the model.
        counts: as `COUNTS`, where it differs; ``dialogue``: its rounds (`ROUNDS`).
        form: ``tags``, or ``json`` for a server that keeps to a schema (`RESPONSE_FORMAT` among the generator's `extra` fields).
        domains: files of further domains (`load_domains`).
        sampling: settings of `mpo.generation.generator.Generator.generate`.
    """

    verb, many = "generate", True

    def __init__(
        self,
        generator: Generator,
        *,
        counts: Mapping[Any, int] | None = None,
        form: str = "tags",
        domains: Sequence[str] = (),
        **sampling: Any,
    ) -> None:
        if form not in ("tags", "json"):
            raise ValueError(f"Expected form to be tags or json; got {form!r}.")
        if wrong := [one for one, count in (counts or {}).items() if one not in ASKED or count < 1]:
            raise ValueError(f"Expected counts of 1 or more for {', '.join(ASKED)}; got {wrong[0]!r}.")
        self.generator, self.form, self.domains = generator, form, [str(one) for one in domains]
        self.counts = {**COUNTS, **(counts or {})}
        self.sampling = asdict(Decoding(**{"temperature": 0.7, **sampling}))
        self._known = load_domains(self.domains)

    def requests(self, record: Record) -> list[Request]:  # noqa: D102
        if not record.get("caption"):
            raise ValueError("it has no caption. Make one (mpo mminstruct caption).")
        if not record.get("seeds"):
            raise ValueError("it has no seeds. Choose some (mpo mminstruct seed).")
        domain = self._known[check_domain(record.get("domain"), self._known, record["id"])]
        language, found = record.get("language", "en"), []
        given = {"about": domain.about[language], "priors": priors(record), "caption": record["caption"]}  # type: ignore[index]
        for seed in record["seeds"]:
            type, count = seed["type"], self.counts.get(seed["type"], ROUNDS)
            given |= {"count": count, "kind": prompt("kind", language, type), "rule": prompt("rule", language, type)}
            given["form"] = prompt("form", self.form, language, choice=type == "choice", count=count)
            asked = prompt("generate", language, seeds=seed["questions"], **given)
            found.append(Request.ask(without_placeholders(asked)))
        return found

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> list[Record]:  # noqa: D102
        items: list[Record] = []
        for seed, several in zip(record["seeds"], responses, strict=True):
            for place, response in enumerate(several):
                found = read_items(without_thinking(response.text), seed["type"], cut=response.finish_reason == "length")
                if seed["type"] == "dialogue":
                    _make_rounds(found, f"{record['id']}/{seed['round']}.{place}", record.get("language", "en"))
                items += [{"type": seed["type"], "round": seed["round"], **item} for item in found]
        mark_repeats(sorted(items, key=lambda one: "dialogue" not in one))  # what a dialogue asks is not asked alone again
        for before, after in pairwise(items):
            if "fault" in before and "dialogue" in before and before["dialogue"] == after.get("dialogue"):
                after.setdefault("fault", "dialogue: an earlier round cannot be used")
        return [{**{name: record[name] for name in KEPT if name in record}, **item} for item in items]


def _make_rounds(items: Sequence[Record], dialogue: str, language: str) -> None:
    """Make the parts of a response the rounds of a dialogue; the type of each follows from its answer."""
    earlier: list[Record] = []
    for turn, item in enumerate(items):
        item |= {"dialogue": dialogue, "turn": turn, "earlier": [*earlier]}
        if "fault" not in item:
            item["type"] = "long" if length(item["answer"], language) > LONGEST_SHORT[language] else "short"
            polar = item["type"] == "short" and found_in(item["question"], f"polar_{language}")
            if found_in(item["answer"], "bare_yes_no") or (polar and read_yes_no(item["answer"]) is not None):
                item["type"] = "judgement"
            earlier.append({name: item[name] for name in ("type", "question", "answer", "turn")})


def priors(record: Record) -> str:
    """What is known of an image beforehand, as a line."""
    tags = ", ".join(record.get("tags", ()))
    parts = (("tags", tags), ("text in the image", record.get("ocr", "")))
    return "; ".join(f"{name}: {value}" for name, value in parts if value)


def lettered(choices: Sequence[str]) -> list[str]:
    """Options as lines, each after its letter."""
    return [f"{chr(ord('A') + place)}. {one}" for place, one in enumerate(choices)]


def read_items(text: str, type: str, *, cut: bool = False) -> list[dict[str, Any]]:
    """Read the instructions of a response, as tags or as JSON.

    Each has ``question``, ``answer`` and, of a choice, ``choices`` without letters; what cannot be read has ``fault`` and ``raw``.

    Args:
        text: the response.
        type: the type that was asked for.
        cut: the response was truncated: its last instruction may lack its end.

    >>> read_items("<Q1>Is it red?</Q1><A1>Yes</A1>", "judgement")
    [{'question': 'Is it red?', 'answer': 'Yes'}]
    >>> read_items("It is red.", "judgement")[0]["fault"]
    'malformed: the response has no tags'
    """
    bare = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip())
    if bare[:1] == "{":
        return _from_json(bare, type, cut)
    tags = list(_TAG.finditer(text))
    found: list[dict[str, Any]] = []
    for number in dict.fromkeys(tag[3] for tag in tags):
        places = [place for place, tag in enumerate(tags) if tag[3] == number]
        own = tags[places[0] : places[-1] + 1]  # with any of another number between them
        raw = text[own[0].start() : own[-1].end()]
        marks = " ".join(tag[0] for tag in own)
        names = ("QCA", "QA")[: 1 if type == "choice" else 2]  # other types may have empty options
        empty = type == "choice" or "<C" not in marks or not text[own[2].end() : own[3].start()].strip()
        if not empty or marks not in [" ".join(f"<{name}{number}> </{name}{number}>" for name in one) for one in names]:
            why = "is cut off" if cut and own[-1] is tags[-1] else f"needs {', '.join(names[-1])}, each once, closed, in order"
            found.append({"fault": f"malformed: number {number} {why}", "raw": raw})
            continue
        parts = {start[2]: text[start.end() : end.start()].strip() for start, end in zip(own[::2], own[1::2], strict=True)}
        found.append(_item(parts["Q"], _listed(parts["C"]) if type == "choice" else None, parts["A"], raw))
        if type == "dialogue" and int(number) != len(found):
            found[-1] = {"fault": f"malformed: round {len(found)} has the number {number}", "raw": raw}
    return found or [{"fault": "malformed: the response has no tags", "raw": text}]


def _from_json(text: str, type: str, cut: bool) -> list[dict[str, Any]]:
    why = "cut off" if cut else "not JSON of the schema"
    nothing = [{"fault": f"malformed: the response is {why}", "raw": text}]
    try:
        given = parse_json(text, "the response")["items"]
    except (BadRecord, TypeError, KeyError):
        return nothing
    return [_of_object(one, type, text) for one in given] or nothing if isinstance(given, list) else nothing


def _of_object(given: Any, type: str, raw: str) -> dict[str, Any]:
    given = given if isinstance(given, dict) else {}
    question, answer, choices = given.get("question"), given.get("answer"), given.get("choices") or []
    if not isinstance(question, str) or not isinstance(answer, str) or not isinstance(choices, list):
        return {"fault": "malformed: an item is not of the schema", "raw": raw}
    if not all(isinstance(one, str) for one in choices):
        return {"fault": "malformed: an option is no text", "raw": raw}
    if choices and type != "choice" and rule("by_letter").match(answer):
        return {"fault": f"malformed: it has options, and is of the type {type}", "raw": raw}
    if not any(one.fullmatch(choice) for one in (_LETTERED, _SPACED) for choice in choices):
        choices = lettered(choices)  # their places in the list are their letters
    return _item(question.strip(), choices if type == "choice" else None, answer.strip(), raw)


def _listed(text: str) -> list[str]:
    """Options, each after a letter, on lines of their own or on one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return lines
    return [
        part.strip(" ;,；，|/") for part in re.split(r"(?:(?<=\s)|(?<=[;,；，|]))(?=[(（]?[B-H]\s*[.):：．、）])", text.strip())
    ]


def _item(question: str, choices: list[str] | None, answer: str, raw: str) -> dict[str, Any]:
    if not question or not answer:
        return {"fault": f"malformed: the {'question' if answer else 'answer'} is empty", "raw": raw}
    if choices is None:
        return {"question": question, "answer": answer}
    read = [_LETTERED.fullmatch(one) for one in choices]
    read = read if any(read) else [_SPACED.fullmatch(one) for one in choices]
    letters = "".join(normalize("NFKC", one[1]) for one in read if one)
    if len(letters) < len(choices) or letters != "ABCDEFGH"[: len(letters)] or len(letters) < 2:
        return {"fault": "malformed: the options are not A, B, ... in order", "raw": raw}
    texts, answer = [one[2] for one in read if one], _LEAD.sub("", undress(answer))
    said = _LETTERED.fullmatch(answer)
    bare = normalize("NFKC", said[1] if said else answer.strip(" .()（）。"))
    same = [at for at, one in enumerate(texts) if bare == letters[at] or (not said and normalised(one) == normalised(bare))]
    if len(same) != 1:
        return {"fault": f"wrong letter: {answer!r:.40} is none of the options", "raw": raw}
    right, letter = texts[same[0]], letters[same[0]]
    if said and normalised(said[2]) != normalised(right):
        return {"fault": f"wrong letter: {letter} is {right!r:.40}, not {said[2]!r:.40}", "raw": raw}
    return {"question": question, "choices": texts, "answer": right}


def mark_repeats(items: Sequence[Record]) -> None:
    """Give those of an image's instructions a ``fault`` that ask what an earlier one has asked.

    The same question is one with the same words in the same order, but for words such as "please", "in the image", "is", "of" and
    "which", of the same type or as a choice and a short one; or, of the same type and answer, one that is `reworded`. With another
    answer it is a contradiction, also of a short answer with that of a choice, and of a judgement with its negation. A round that
    goes on from the earlier ones (`goes_on`) is compared with those alone.
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
        alike = type == "long" or _alike(other["answer"], one["answer"])
        if type == "judgement" and one["negated"] != other["negated"]:
            alike = not alike
        if alike and (len(kinds) == 1 or kinds == {"choice", "short"}) and (asks_the_same or plain):
            yield "repeat: an earlier instruction about the image asks the same"
        in_order = one["key"] == other["key"] and (type == "judgement" or len(one["key"].split()) > 2)
        if not alike and (len(kinds) == 1 or kinds == {"choice", "short"}) and (asks_the_same or in_order):
            yield f"contradiction: an earlier instruction has the same question and the answer {other['answer']!r:.60}"
    if read_yes_no(one["answer"]) and any(_opposed(one["loose"], other) for other in seen):
        yield "contradiction: an earlier instruction has the same answer to the opposite question"
    for other in seen:
        if other["type"] == type and other not in same and _alike(other["answer"], one["answer"]):
            told = type != "judgement" or len(normalised(one["answer"])) > 8
            if _slip(other["question"], one["question"]):
                yield "repeat: an earlier instruction about the image asks the same, but for a letter"
            exact = read_number(one["answer"]) is not None
            told = told and type != "long" and same_answer(other["answer"], one["answer"])
            if told and reworded(other["loose"], one["loose"], exact=exact):
                yield "repeat: an earlier instruction about the image asks the same in other words"


def _opposed(loose: str, other: Record) -> bool:
    """Whether a comparison is the opposite of one that was answered by yes: by a word, or by what is compared with what."""
    if other["type"] != "judgement" or not read_yes_no(other["answer"]):
        return False
    split = [[*text] if CJK.search(text) else text.split() for text in (loose, other["loose"])]
    plain = [[pairs("opposite").get(word, word) for word in said] for said in split]
    if sorted(plain[0]) != sorted(plain[1]) or not {"than", "比"} & {*plain[0]}:
        return False
    return sum(word in pairs("opposite") for said in split for word in said) % 2 != (plain[0] != plain[1])


def question_key(question: str, *, loose: bool = False) -> str:
    """A question without words that do not change what is asked; loose: without those that seldom do.

    >>> question_key("Please tell me, what colour is the car in this picture?") == question_key("What color is the car?")
    True
    """
    question = rule("asked").sub("", question)
    while (clause := _CLAUSE.match(question)) and _frames(clause[0]):
        question = question[clause.end() :]
    said = rule("in_image").sub(" ", normalised(question).replace("colour", "color").replace("grey", "gray"))
    if loose:
        said = rule("loose_zh").sub("", re.sub(r"(\w)[没不]\1", r"\1", said.replace("which", "what")))
    left_out = words("fillers") | words("loose") if loose else words("fillers")
    return " ".join(word for word in said.split() if word not in left_out)


def _frames(clause: str) -> bool:
    """Whether a clause before a question says no more than that it is one, about the image."""
    said = normalised(clause)
    return all(word in words("framing") for word in CJK.sub(" ", said).split()) and {*CJK.findall(said)} <= {
        *"".join(words("framing_zh"))
    }


def _slip(one: str, other: str) -> bool:
    """Whether two questions differ by a letter that one of them lacks, or by spaces, and not by two words, such as he and she."""
    matched = zip(re.findall(r"\w+", one), re.findall(r"\w+", other), strict=False)
    differ = [word for pair in matched if pair[0].casefold() != pair[1].casefold() for word in pair]
    if all(word.isupper() or word.casefold() in words("english") - {"the"} for word in differ):
        return False
    short, long = sorted((normalised(text).replace(" ", "") for text in (one, other)), key=len)
    if len(short) < 12 or len(long) - len(short) > 1:
        return False
    at = len(commonprefix((short, long)))
    turned = len(short) == len(long) and short[at + 2 :] == long[at + 2 :] and short[at : at + 2] == long[at : at + 2][::-1]
    if turned and short[at : at + 2].isalpha() and not CJK.search(short[at : at + 2]):
        return True
    return short == long or (short[at:] == long[at + 1 :] and long[at].isalpha() and not CJK.match(long[at]))


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
