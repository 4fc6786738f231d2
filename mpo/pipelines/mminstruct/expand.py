"""Read public sets in their published layouts as instructions of the four types.

Layouts were read here. GeoQA+: SCNU203/GeoQA-Plus@931f9d2 ``GeoQA+/utils.py``; TabMWP: lupantech/PromptPG@869bae8 ``README.md``,
``data/tabmwp/tables``; DVQA: kushalkafle/DVQA_dataset@53cff67 ``README.md``; FigureQA: Maluuba/FigureQA@dc0a65f
``docs/json_png_format.md``; MMInstruct's files: yuecao0119/MMInstruct@1137756 ``README.md``.
"""

from __future__ import annotations

import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from mpo.data.paths import inside
from mpo.io import BadRecord, bad_record, did_you_mean, read_json_object
from mpo.pipelines.flow import log
from mpo.pipelines.mminstruct.check import YES_NO, yes_or_no
from mpo.pipelines.mminstruct.collect import image_of, read_lines
from mpo.pipelines.mminstruct.domains import TYPES, Domain, check_domain, load_domains
from mpo.pipelines.mminstruct.language import CJK, SHORTEST_LONG, length
from mpo.pipelines.step import Record

Lines = Iterator[tuple[str, dict[str, Any]]]
FIELDS = ("id", "image", "question", "answer", "choices", "type", "language", "domain")
_LETTERED = re.compile(r"^[(（]?([A-H])[.):：．、）]\s*(\S.*)$", re.MULTILINE)


@dataclass
class Expansion:
    """A public set as instructions, read anew each time it is iterated over.

    Args:
        set: ``geoqa_plus``, ``tabmwp``, ``dvqa``, ``figureqa``, ``mminstruct``, or ``fields`` for any other, by its field map.
        path: its file of questions, or the folder that has it.
        name: the beginning of the ids; None for `set`.
        image_root: folder of the images, where it is not that of the layout.
        domain, licence: of all its instructions.
        fields: for ``fields``: the names of the set's fields by ours (`FIELDS`); ``question`` and ``answer`` are needed.
        limit: maximum number of instructions.
        drop_bad: give what cannot be used, such as for an image that is gone, a ``fault`` (`Check` drops it), instead of raising.
        domains: the known domains; None for `load_domains`.

    Attributes:
        notices: what was noticed about it: languages that are not those of its name.

    Raises:
        ValueError: for an unknown set, domain or field; BadRecord while iterating, naming the place.
    """

    set: str
    path: str | Path
    name: str | None = None
    image_root: str | Path | None = None
    domain: str | None = None
    licence: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    drop_bad: bool = False
    domains: Mapping[str, Domain] | None = None

    def __post_init__(self) -> None:
        if self.set not in READERS:
            raise ValueError(f"Unknown set {self.set!r}; sets are {', '.join(READERS)}.{did_you_mean(self.set, READERS)}")
        self.path, self.name, self.notices = Path(os.path.abspath(self.path)), self.name or self.set, list[str]()
        if not self.path.exists():
            raise ValueError(f"There is no {self.path}. Give the file of {self.set}'s questions, or its folder.")
        if (wrong := [one for one in self.fields if one not in FIELDS]) or (self.fields and self.set != "fields"):
            found = f"{wrong[0]!r}" if wrong else f"fields for {self.set}, whose layout is known"
            raise ValueError(f"Expected fields among {', '.join(FIELDS)}, for the set fields; got {found}.")
        if self.set == "fields" and (lost := [one for one in ("question", "answer", "image") if one not in self.fields]):
            raise ValueError(f"The set fields needs the name of its {lost[0]}: fields: {{{lost[0]}: NAME}}.")
        if self.domain is not None:
            self.domain = check_domain(self.domain, self.domains or load_domains(), str(self.path))

    def __iter__(self) -> Iterator[Record]:
        seen = Counter[str]()
        for number, (where, line) in enumerate(islice(READERS[self.set](self), self.limit)):
            try:
                with bad_record(where):
                    found = self._instruction(line)
                seen[found["language"]] += 1
            except BadRecord as error:
                if not self.drop_bad:
                    raise
                seen["none"] += 1
                found = {"type": "short", "language": "en", "question": "", "answer": "", "fault": f"bad: {error}"}
                found |= {name: line[name] for name in ("dialogue", "turn") if name in line}
            yield {"id": f"{self.name}/{line.get('id', number)}", "source": str(self.name), **found}
        if not (number := seen.total()):
            raise ValueError(f"{self.path} has no questions of {self.set}. Give its file of questions.")
        if self.set == "mminstruct" and (said := re.search(r"(?:^|_)(cn|zh|en)(?=[_.]|$)", Path(self.path).stem)):
            named = "en" if said[1] == "en" else "zh"
            if 2 * seen[named] < number:
                others = f"{number - seen[named]} of {number} texts are in the other language"
                self.notices = [f"{self.path} is called {said[1]}, and {others}; each instruction has its own"]
                log.warning(self.notices[0])

    def _instruction(self, line: dict[str, Any]) -> Record:
        if lost := [name for name in ("question", "answer", "image") if line.get(name) is None]:
            raise ValueError(f"it has no {self.fields.get(lost[0], lost[0])!r}. Fill it in, or drop such lines (--drop-bad).")
        question, answer, choices = line["question"], line["answer"], line.get("choices") or []
        question = re.sub(r"\s*<image>\s*", " ", question).strip() if isinstance(question, str) else None
        if not question:
            raise ValueError(f"its question is {line['question']!r:.60}. Expected text.")
        if not isinstance(answer, str | int | float):
            raise ValueError(f"its answer is {answer!r:.60}. Expected text, a number, true or false.")
        if not isinstance(choices, list | tuple):
            raise ValueError(f"its choices are {choices!r:.60}. Expected a list.")
        language = line.get("language") or ("zh" if len(CJK.findall(question)) > len(question) / 8 else "en")
        if language not in YES_NO:
            raise ValueError(f"its language is {language!r}. Expected en or zh.")
        answer = YES_NO[language][not answer] if isinstance(answer, bool) else str(answer).strip()
        choices, answer = _plain([str(one).strip() for one in choices], answer)
        type = line.get("type") or _type(answer, choices, language)
        if type not in TYPES:
            raise ValueError(f"its type is {type!r}. Expected {', '.join(TYPES)}.")
        if type == "judgement" and (said := yes_or_no(answer, language)) is not None:
            answer = YES_NO[language][not said]
        if (image := image_of(line["image"])) is None:
            raise ValueError("its image has neither bytes nor a path.")
        if domain := self.domain or line.get("domain"):
            domain = check_domain(domain, self.domains or load_domains(), "its domain")
        image = inside(self.image_root or line["root"], image) if isinstance(image, str) else image
        given = {"domain": domain, "licence": self.licence, "choices": choices if type == "choice" else None}
        given = {name: value for name, value in given.items() if value} | {
            one: line[one] for one in ("dialogue", "turn") if one in line
        }
        return {"images": [image], "type": type, "language": language, "question": question, "answer": answer, **given}


def _plain(choices: list[str], answer: str) -> tuple[list[str], str]:
    """Options without their letters, if they have them all, and the right one's text where the answer is, or has, its letter."""
    read = [_LETTERED.fullmatch(one) for one in choices]
    letters = [one[1] if one else "" for one in read]
    if sorted(letters) == [*"ABCDEFGH"[: len(choices)]]:
        choices = [one[2] for one in read if one]
    else:
        letters = [*"ABCDEFGH"[: len(choices)]]
    by_letter = dict(zip(letters, choices, strict=False))
    said = re.fullmatch(r"[(（]?([A-H])(?:[.):：．、）]\s*(.*))?", answer, re.DOTALL)
    if answer in choices or not said or said[1] not in by_letter or said[2] not in (None, "", by_letter[said[1]]):
        return choices, answer
    return choices, by_letter[said[1]]


def _type(answer: str, choices: list[str], language: str) -> str:
    is_long = length(answer, language) > 2 * SHORTEST_LONG[language]
    return "choice" if choices else "judgement" if yes_or_no(answer, language) is not None else "long" if is_long else "short"


def _file(given: Expansion, pattern: str) -> Path:
    path = Path(given.path)
    found = sorted(path.rglob(pattern)) if path.is_dir() else [path]
    if len(found) != 1:
        many = f"{len(found)} files" if found else "no file"
        raise ValueError(f"{path} has {many} {pattern}. Give the file of {given.set}'s questions.")
    return found[0]


class _Plain(pickle.Unpickler):
    """Unpickles plain values and numpy's arrays, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        of_numpy = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype", "scalar")
        if of_numpy or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise ValueError(f"it holds {module}.{name}, and only numpy's arrays and plain values are read from a pickle.")


def _geoqa_plus(given: Expansion) -> Lines:
    """``*.pk``: a list of problems with ``image`` (an array of grey pixels), ``subject`` or ``token_list``, ``choices``."""
    path = _file(given, "*.pk")
    with bad_record(str(path)), open(path, "rb") as file:
        try:
            problems = _Plain(file).load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"it is not a whole pickle ({error}). Give the file of {given.set}'s questions, *.pk.") from None
    for number, one in enumerate(problems):
        with bad_record(f"{path}:{number}"):
            values = {f"N_{place}": f"{value:g}" for place, value in enumerate(one.get("numbers", ()))}
            question = one.get("subject") or "".join(values.get(token, token) for token in one["token_list"])
            choices = one.get("choices") or [f"{value:g}" for value in one["choice_nums"]]
            image = Image.fromarray(one["image"].astype("uint8"))
            if (label := one["label"]) not in range(len(choices)):
                raise ValueError(f"its label is {label!r}. Expected 0 to {len(choices) - 1}, the place of the right option.")
            answer = str(choices[int(label)])
        fields = {"id": str(one.get("id", number)), "image": image, "question": question, "choices": choices, "answer": answer}
        yield f"{path}:{number}", {**fields, "type": "choice"}


def _tabmwp(given: Expansion) -> Lines:
    """``problems_*.json``: by id, ``question``, ``choices`` or null, ``answer``, ``unit``; its image is ``tables/ID.png``."""
    path = _file(given, "problems_*.json")
    for name, one in read_json_object(path).items():
        with bad_record(f"{path}: {name}"):
            unit = f" (unit: {one['unit']})" if one.get("unit") and not one.get("choices") else ""
            fields = {"question": f"{one['question']}{unit}", "choices": one.get("choices"), "answer": one["answer"]}
        yield f"{path}: {name}", {"id": name, "image": f"tables/{name}.png", "root": path.parent, **fields}


def _dvqa(given: Expansion) -> Lines:
    """``*_qa.json``: a list with ``image`` (a name in ``images``), ``question``, ``answer``, ``question_id``."""
    path = _file(given, "*_qa.json")
    root = next((one / "images" for one in path.parents[:2] if (one / "images").is_dir()), path.parent)
    for where, one in read_lines(path):
        with bad_record(where):
            yield where, {"id": one["question_id"], "root": root, **{name: one[name] for name in ("image", "question", "answer")}}


def _figureqa(given: Expansion) -> Lines:
    """``qa_pairs.json``: ``qa_pairs`` with ``question_string``, ``answer`` (0, 1), ``image_index`` of ``png/INDEX.png``."""
    path = _file(given, "qa_pairs.json")
    for number, one in enumerate(read_json_object(path).get("qa_pairs", ())):
        with bad_record(f"{path}:{number}"):
            if one["answer"] not in (0, 1):
                raise ValueError(f"its answer is {one['answer']!r}. Expected 0 or 1.")
            fields = {"image": f"png/{one['image_index']}.png", "question": one["question_string"], "answer": bool(one["answer"])}
        yield f"{path}:{number}", {"id": number, "root": path.parent, **fields, "type": "judgement"}


def _mminstruct(given: Expansion) -> Lines:
    """MMInstruct's ``qa_en.jsonl``, ``caption_cn.jsonl``, ``caption_en.jsonl``: ``image``, ``conversations`` of rounds.

    Each round is an instruction; those of one conversation have its id as ``dialogue`` and stay one, as a later round may speak of
    an earlier one.
    """
    for place, (where, one) in enumerate(read_lines(_file(given, "*.jsonl"))):
        with bad_record(where):
            turns = one["conversations"]
            if len(turns) % 2 or [turn["from"] for turn in turns] != ["human", "gpt"] * (len(turns) // 2) or not turns:
                raise ValueError("its conversations are not rounds of human and gpt.")
            rounds = [(asked["value"], said["value"]) for asked, said in zip(turns[::2], turns[1::2], strict=True)]
        for number, (asked, said) in enumerate(rounds):
            question, choices = re.sub(r"\s*<image>\s*", "", asked), _LETTERED.findall(asked)
            if len(choices) > 1 and re.fullmatch(r"[(（]?[A-H]\b.*", said.strip(), re.DOTALL):
                question, said = _LETTERED.split(question)[0].strip(), said.strip(" (（")[0]
            else:
                choices = []
            language = {"language": "zh" if len(CJK.findall(said)) > len(said) / 8 else "en"} if len(said) > 40 else {}
            fields = {"image": one["image"], "question": question, "answer": said, "choices": [text for _, text in choices]}
            known = {"id": f"{one.get('id', place)}/{number}", "root": Path(given.path).parent}
            known |= {"dialogue": f"{one.get('id', place)}", "turn": number} if len(rounds) > 1 else {}
            yield where, {**known, **fields, **language}


def _fields(given: Expansion) -> Lines:
    path = Path(given.path)
    for number, (where, line) in enumerate(read_lines(path)):
        with bad_record(where):
            needed = [given.fields[ours] for ours in ("question", "answer", "image")]
            if lost := [name for name in needed if name not in line]:
                raise ValueError(f"it has no {lost[0]!r}; it has {', '.join(line)}.{did_you_mean(lost[0], line)}")
        own = {ours: line[name] for ours, name in given.fields.items() if line.get(name) is not None}
        yield where, {"id": number, "root": path if path.is_dir() else path.parent, **own}


READERS: dict[str, Callable[[Expansion], Lines]] = {
    "geoqa_plus": _geoqa_plus,
    "tabmwp": _tabmwp,
    "dvqa": _dvqa,
    "figureqa": _figureqa,
    "mminstruct": _mminstruct,
    "fields": _fields,
}
