"""Write instructions about an image from its caption alone, after seed questions; the responses are parsed strictly."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from itertools import pairwise
from typing import Any
from unicodedata import normalize

from mpo.data.similar import normalised
from mpo.generation.generator import Decoding, Generator, Request, Response
from mpo.io import BadRecord, parse_json
from mpo.pipelines.mminstruct.against import whole_numbers
from mpo.pipelines.mminstruct.domains import ASKED, TYPES, check_domain, load_domains, prompt, without_placeholders
from mpo.pipelines.mminstruct.language import LONGEST_SHORT, found_in, length, rule, without_thinking
from mpo.pipelines.mminstruct.repeats import mark_repeats
from mpo.pipelines.step import Record, Step
from mpo.verification.dress import undress
from mpo.verification.texts import read_yes_no

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
_TAG = re.compile(r"<(/?)([QCA])(\d{1,3})>")
_LETTERED = re.compile(r"\s*(?:[-*•]\s+)?[(（]?([A-HＡ-Ｈ])\s*[.):：．、，）]\s*(\S.*?)\s*", re.DOTALL)
_SPACED = re.compile(r"\s*([A-H])\s+(\S.*?)\s*", re.DOTALL)
_LEAD = re.compile(r"^(?:the )?(?:(?:correct|right) )?(?:answer|option|答案|选项?)(?: is|是|为)?\s*[:：]?\s*(?=\S)", re.IGNORECASE)


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
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > 1:
        return lines
    parts = re.split(r"(?:(?<=\s)|(?<=[;,；，|]))(?=[(（]?[B-H]\s*[.):：．、）])", text.strip())
    return [part.strip(" ;,；，|/") for part in parts]


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
    texts, given = [one[2] for one in read if one], undress(answer)
    answer = _LEAD.sub("", given)
    said = _LETTERED.fullmatch(answer)
    bare = normalize("NFKC", said[1] if said else answer.strip(" .()（）。"))
    same = [at for at, one in enumerate(texts) if bare == letters[at] or (not said and normalised(one) == normalised(bare))]
    same = same or _named(given, answer, question, texts)
    if len(same) != 1:
        return {"fault": f"wrong letter: {answer!r:.40} is none of the options", "raw": raw}
    right, letter = texts[same[0]], letters[same[0]]
    if said and normalised(said[2]) != normalised(right):
        return {"fault": f"wrong letter: {letter} is {right!r:.40}, not {said[2]!r:.40}", "raw": raw}
    return {"question": question, "choices": texts, "answer": right}


def _named(given: str, answer: str, question: str, texts: Sequence[str]) -> list[int]:
    """The options that an answer names by letter in a sentence without another one's text, or among words of the question alone."""
    plain, *options = (f" {normalised(whole_numbers(text))} " for text in (answer, *texts))
    there = [at for at, one in enumerate(options) if one.strip() and one in plain]
    if named := [ord(one) - ord("A") for one in re.findall(r"(?i:\boption |选项)([A-H])\b", given)]:
        one_alone = len(named) == 1 and there in ([], named) and named[0] < len(texts) and not rule("negated").search(given)
        return named if one_alone else []
    rest = plain.replace(options[there[0]], " ").split() if len(there) == 1 else [""]
    return there if {*rest} <= {*normalised(whole_numbers(question)).split()} else []
