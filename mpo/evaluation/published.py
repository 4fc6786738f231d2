"""Benchmarks in the forms that they are published in, as questions with their scoring rules."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mpo.data.files import of_dataset, open_files
from mpo.data.questions import to_question
from mpo.io import BadRecord, did_you_mean
from mpo.schema import Question

Row = Mapping[str, Any]
GROUP, SUBJECT, SCORE = "group", "subject", "score"
"""Metadata of a benchmark's question: questions of a group count as one, right if all are; its part of the benchmark; its rule."""
ANLS = "anls"
BOX_SCALE = 1000
"""Coordinates of boxes run from 0 to this, as InternVL writes them."""
LETTERS = "ABCDEFGHIJ"
JUDGED = ("mmvet", "mm-vet", "llavabench", "llava-bench", "mmhal", "mmhal-bench", "wildvision", "hallusionbench-gpt")
"""Benchmarks whose published scores a judging model gives."""


@dataclass(frozen=True)
class Form:
    """The published form of a benchmark.

    Attributes:
        hub: name on the Hub, and the configuration or None.
        split: the split that is scored.
        columns: the columns that each row must have; of names with ``|`` between them one.
        read: makes one question, or several, of a row and the folder of its files, as lines of a file of questions
            (`mpo.data.load_questions`).
        rule: how a response is scored, in words.
    """

    hub: tuple[str, str | None]
    split: str
    columns: tuple[str, ...]
    read: Callable[[Row, Path], Iterator[dict[str, Any]]]
    rule: str


def load_benchmark(name: str, path: str | Path | None = None, *, image_root: str | Path | None = None) -> Iterator[Question]:
    """Read the questions of a published benchmark.

    Args:
        name: one of `FORMS`.
        path: local file or folder in its form (JSONL, JSON, Parquet); None for the Hub.
        image_root: folder that image and video paths are relative to; None for that of the file.

    Raises:
        ValueError: for an unknown name, and one whose scores a judging model gives.
        BadRecord: for a row without the form's columns, naming these, and one that is no question.
    """
    if name.lower() in JUDGED:
        raise ValueError(f"{name} is scored by a judging model, and rules would give other numbers. Use its own evaluation.")
    if name not in FORMS:
        raise ValueError(f"Benchmark {name!r} is unknown; there are {', '.join(FORMS)}.{did_you_mean(name, FORMS)}")
    form = FORMS[name]
    root = Path(image_root if image_root is not None else os.path.dirname(os.path.abspath(path or ".")))
    if path is None:
        from datasets import load_dataset

        shards: Sequence[Any] = of_dataset(load_dataset(form.hub[0], form.hub[1], split=form.split), form.hub[0])
    else:
        shards = open_files(path, form.split if os.path.isdir(path) else "train")
    return _questions(name, form, shards, root)


def _questions(name: str, form: Form, shards: Sequence[Any], root: Path) -> Iterator[Question]:
    seen = 0
    for shard in shards:
        for where, row in shard.lines():
            if isinstance(row, BadRecord):
                raise row
            missing = [one for one in form.columns if not any(row.get(column) is not None for column in one.split("|"))]
            if missing:
                raise BadRecord(
                    where,
                    f"this row of {name} lacks {', '.join(missing)}; expected {', '.join(form.columns)}.",
                )
            try:
                lines = list(form.read(row, root))
            except (ValueError, KeyError, SyntaxError, TypeError, IndexError) as error:
                raise BadRecord(where, f"this row is not in the published form of {name}: {error}") from None
            for line in lines:
                line = {key: value for key, value in line.items() if value not in (None, "", [])}
                line.setdefault("id", f"{name}/{seen}")
                line.setdefault("source", name)
                seen += 1
                yield to_question(line, where=where, image_root=root)


def _choice(row: Row, choices: Sequence[Any], answer: Any, **rest: Any) -> dict[str, Any]:
    """A question of several choices; the answer is a letter or the text of one."""
    texts = [str(one) for one in choices]
    known = str(answer).strip()
    if known not in texts and not (len(known) == 1 and known.upper() in LETTERS[: len(texts)]):
        raise ValueError(f"the answer {known!r:.80} is none of the choices {texts!r:.200}")
    return {"question": row["question"], "choices": texts, "answer": known, "kind": "choice", **rest}


def _mmmu(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """Images stand before the question, which names them by number; options are the text of a Python list."""
    options = row["options"] if isinstance(row["options"], list) else ast.literal_eval(row["options"])
    used = sorted({*re.findall(r"<image (\d)>", " ".join(map(str, (row["question"], *options))))}) or "1234567"
    images = [row[f"image_{number}"] for number in used if row.get(f"image_{number}") is not None]
    named = [re.sub(r"<image (\d)>", r"[image \1]", str(text)) for text in (row["question"], *options)]
    rest = {"id": row["id"], "images": images, "metadata": {SUBJECT: re.sub(r"^[a-z]+_|_\d+$", "", row["id"])}}
    if row["question_type"] == "multiple-choice":
        yield _choice({"question": named[0]}, named[1:], row["answer"], **rest)
    else:
        known = str(row["answer"])
        answers = [str(one) for one in ast.literal_eval(known)] if re.fullmatch(r"\[.*\]", known) else [known]
        yield {"question": named[0], "answers": answers, **rest}


def _mathvista(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    rest = {"id": row["pid"], "image": row.get("decoded_image") or row["image"], "unit": row.get("unit")}
    about = row.get("metadata")
    rest["metadata"] = {SUBJECT: about["task"]} if isinstance(about, Mapping) and about.get("task") else None
    if row["question_type"] == "multi_choice":
        yield _choice(row, row["choices"], row["answer"], **rest)
    else:
        kind = {"integer": "number", "float": "number", "list": "list"}.get(str(row["answer_type"]), "text")
        yield {"question": row["question"], "answer": row["answer"], "kind": kind, **rest}


def _m3cot(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question = f"{row['context']}\n{row['question']}" if row.get("context") else row["question"]
    rest = {"id": row["id"], "image": row.get("image"), "metadata": {SUBJECT: row.get("domain")}}
    yield _choice({"question": question}, row["choices"], row["answer"], **rest)


def _chartqa(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question, answer = row.get("question") or row["query"], row.get("answer", row.get("label"))
    image = row.get("image") or os.path.join("png", row["imgname"])
    answers = answer if isinstance(answer, list) else [answer]
    yield {"question": question, "answers": answers, "kind": "chart", "image": image, "metadata": {SUBJECT: row.get("type")}}


def _docvqa(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    rest = {"id": str(row["questionId"]), "image": row["image"], "metadata": {SCORE: ANLS}}
    yield {"question": row["question"], "answers": row["answers"], "kind": "document", **rest}


def _pope(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question, answer = row.get("question") or row["text"], row.get("answer") or row["label"]
    about = {SUBJECT: row.get("category")}
    name = "-".join(str(one) for one in (row.get("category"), row["question_id"]) if one is not None)
    yield {"question": question, "answer": answer, "kind": "yes_no", "id": name, "image": row["image"], "metadata": about}


def _mmbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """Every rotation of the choices is a question, and they count as one."""
    given = {key: str(value) for key, value in row.items() if str("" if value is None else value) not in ("", "nan")}
    question = f"{given['hint']}\n{row['question']}" if "hint" in given else row["question"]
    letters = [letter for letter in LETTERS if letter in given]
    choices, right = [given[letter] for letter in letters], letters.index(row["answer"])
    for shift in range(len(choices)):
        name = f"{row['index']}/{shift}"
        about = {GROUP: str(row["index"]), SUBJECT: row.get("category")}
        turned = [*choices[shift:], *choices[:shift]]
        answer = LETTERS[(right - shift) % len(choices)]
        yield _choice({"question": question}, turned, answer, id=name, image=row["image"], metadata=about)


def _refcoco(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """A box is in pixels, as corner and size; the two corners where the row has a `sent`, as in InternVL's files."""
    if "sent" in row:
        names, width, height = [row["sent"]], row["width"], row["height"]
        box = [*row["bbox"]]
    else:
        given = row["image"]["bytes"] if isinstance(row["image"], Mapping) else row["image"]
        with Image.open(BytesIO(given) if isinstance(given, bytes) else root / given) as image:
            width, height = image.size
        left, top, *size = row["bbox"]
        names, box = row["answer"], [left, top, left + size[0], top + size[1]]
    scaled = [round(value / side * BOX_SCALE, 2) for value, side in zip(box, (width, height, width, height), strict=True)]
    for place, name in enumerate([names] if isinstance(names, str) else names):
        given = row.get("question_id", row.get("id"))
        rest = {"id": None if given is None else f"{given}/{place}", "image": row["image"]}
        yield {"question": f"Where is {name}?", "answer": str(scaled), "kind": "box", **rest}


def _mvbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    rest = {"video": row["video"], "metadata": {SUBJECT: row.get("task_type")}}
    yield _choice(row, row["candidates"], row["answer"], **rest)


def _muirbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """Images stand where the question and the options name them."""
    question = row["question"]
    for option in row["options"]:
        if "<image>" in option:
            question += f"\n{option}"
    choices = [re.sub("<image>", "the image", option) for option in row["options"]]
    rest = {"id": str(row["idx"]), "images": row["image_list"], "metadata": {SUBJECT: row.get("task")}}
    yield _choice({"question": question}, choices, row["answer"], **rest)


_LETTER = "the letter or the text of the right choice"
FORMS = {
    "chartqa": Form(
        ("lmms-lab/ChartQA", None),
        "test",
        ("question|query", "answer|label", "image|imgname"),
        _chartqa,
        "relaxed accuracy: numbers within 5 %, text equal",
    ),
    "docvqa": Form(
        ("lmms-lab/DocVQA", "DocVQA"),
        "validation",
        ("questionId", "question", "answers", "image"),
        _docvqa,
        "ANLS, the mean over questions",
    ),
    "m3cot": Form(("LightChen2333/M3CoT", None), "test", ("id", "question", "choices", "answer"), _m3cot, _LETTER),
    "mathvista": Form(
        ("AI4Math/MathVista", None),
        "testmini",
        ("pid", "question", "answer", "question_type", "answer_type", "decoded_image|image"),
        _mathvista,
        f"{_LETTER}; numbers to the digits of the ground truth",
    ),
    "mmbench": Form(
        ("lmms-lab/MMBench", "en"),
        "dev",
        ("index", "question", "A", "B", "answer", "image"),
        _mmbench,
        f"{_LETTER}, in every rotation of the choices (circular)",
    ),
    "mmmu": Form(
        ("lmms-lab/MMMU", None),
        "validation",
        ("id", "question", "options", "answer", "question_type", "image_1"),
        _mmmu,
        f"{_LETTER}; open answers by their kind",
    ),
    "muirbench": Form(
        ("MUIRBENCH/MUIRBENCH", None), "test", ("idx", "question", "options", "answer", "image_list"), _muirbench, _LETTER
    ),
    "mvbench": Form(
        ("OpenGVLab/MVBench", "action_sequence"), "train", ("video", "question", "candidates", "answer"), _mvbench, _LETTER
    ),
    "pope": Form(
        ("lmms-lab/POPE", None), "test", ("question_id", "question|text", "answer|label", "image"), _pope, "yes or no; F1 beside it"
    ),
    "refcoco": Form(
        ("lmms-lab/RefCOCO", None), "val", ("image", "bbox", "answer|sent"), _refcoco, "intersection over union of 0.5 or more"
    ),
}
"""The benchmarks, by name."""
