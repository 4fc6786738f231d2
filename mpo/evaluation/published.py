"""Benchmarks in the forms that they are published in, as questions with their scoring rules."""

from __future__ import annotations

import ast
import csv
import json
import os
import re
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_dataset
from PIL import Image

from mpo.data.files import of_dataset, open_files
from mpo.data.questions import to_question
from mpo.data.shards import one_line
from mpo.io import BadRecord, did_you_mean
from mpo.schema import Question

Row = Mapping[str, Any]
GROUP, SUBJECT, SCORE = "group", "subject", "score"
"""Metadata of a benchmark's question: questions of a group count as one, right if all are; its part of the benchmark; its rule."""
ANLS = "anls"
BOX_SCALE = 1000
"""Coordinates of boxes run from 0 to this, as InternVL writes them."""
LETTERS = "ABCDEFGHIJ"
JUDGED = ("mmvet", "llavabench", "llavainthewild", "mmhal", "miabench", "mmdu", "vibeeval", "videochatgpt", "wildvision")
"""How the names of benchmarks begin, in letters and digits alone, whose published scores a judging model gives."""


class Form(NamedTuple):
    """The published form of a benchmark. `read` makes the lines of a file of questions of a row and the folder of its files."""

    hub: str  # name on the Hub
    split: str  # that is scored
    columns: str  # that each row must have; of names with | between them one
    read: Callable[[Row, Path], Iterator[dict[str, Any]]]
    subject: str = ""  # column of a question's part of the benchmark
    configuration: str | None = None  # on the Hub


def load_benchmark(
    name: str, path: str | Path | None = None, *, image_root: str | Path | None = None, limit: int | None = None
) -> Iterator[Question]:
    """Read the questions of a published benchmark.

    Args:
        name: one of `FORMS`.
        path: local file or folder in its form (JSONL, JSON, Parquet, TSV); None for the Hub.
        image_root: folder that image and video paths are relative to; None for that of the file.
        limit: the number of rows to read; None for all.

    Raises:
        ValueError: for an unknown name, and one whose scores a judging model gives.
        BadRecord: for a row without the form's columns, naming these, and one that is no question.
    """
    if re.sub(r"[\W_]", "", name.lower()).startswith(JUDGED):
        raise ValueError(f"{name} is scored by a judging model, and rules would give other numbers. Use its own evaluation.")
    if name not in FORMS:
        raise ValueError(f"Benchmark {name!r} is unknown; there are {', '.join(FORMS)}.{did_you_mean(name, FORMS)}")
    form = FORMS[name]
    root = Path(image_root if image_root is not None else os.path.dirname(os.path.abspath(path or ".")))
    return _questions(name, form, islice(_rows(name, form, path), limit), root)


def _rows(name: str, form: Form, path: str | Path | None) -> Iterator[tuple[str, Any]]:
    if str(path).lower().endswith(".tsv"):
        csv.field_size_limit(2**31 - 1)  # images in base64
        with open(str(path), newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, delimiter="\t")
            yield from ((f"{path}:{lines.line_num}", row) for row in lines)
    elif str(path).lower().endswith(".json") and (held := _of_object(Path(str(path)))):
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(held, 1))
    elif path is not None:
        for shard in open_files(path, form.split if os.path.isdir(path) else "train"):
            yield from shard.lines()
    else:
        try:
            data = load_dataset(form.hub, form.configuration, split=form.split)
        except Exception as error:  # of many types: no network, another form
            found = f"{name} could not be loaded from the Hub ({form.hub}: {one_line(error)})"
            raise ValueError(f"{found}. Give its file as {name}=PATH, or unset HF_HUB_OFFLINE to download it.") from error
        for shard in of_dataset(data, form.hub):
            yield from shard.lines()


def _of_object(path: Path) -> list[Any]:
    """The rows of a file that is one object: DocVQA's list `data`, or MathVista's rows by their ids."""
    try:
        given = json.loads(path.read_text("utf-8-sig"))
    except ValueError:  # lines, or damage
        return []
    values = [*given.values()] if isinstance(given, dict) else []
    held = next((one for one in values if isinstance(one, list)), values)
    return held if all(isinstance(one, dict) for one in held) else []


def _questions(name: str, form: Form, rows: Iterator[tuple[str, Any]], root: Path) -> Iterator[Question]:
    seen = 0
    for where, row in rows:
        if isinstance(row, BadRecord):
            raise row
        columns = form.columns.split()
        missing = [one for one in columns if not any(row.get(column) is not None for column in one.split("|"))]
        if missing:
            raise BadRecord(where, f"this row of {name} lacks {', '.join(missing)}; expected {', '.join(columns)}.")
        try:
            lines = list(form.read(row, root))
        except (ValueError, KeyError, SyntaxError, TypeError, IndexError) as error:
            raise BadRecord(where, f"this row is not in the published form of {name}: {error}") from None
        for line in lines:
            line = {key: value for key, value in line.items() if value not in (None, "", [])}
            line.setdefault("id", f"{name}/{seen}")
            line.setdefault("source", name)
            line["metadata"] = line.get("metadata", {}) | ({SUBJECT: row.get(form.subject)} if form.subject else {})
            seen += 1
            yield to_question(line, where=where, image_root=root)


def _listed(value: Any) -> list[Any]:
    found = ast.literal_eval(value) if isinstance(value, str) else value
    if not isinstance(found, list | tuple):
        raise ValueError(f"expected a list; got {value!r:.80}")
    return [*found]


def _choice(row: Row, choices: Sequence[Any], answer: Any, *, letter: bool = True, **rest: Any) -> dict[str, Any]:
    """A question of several choices; the answer is the `letter` or else the text of one, and becomes its letter."""
    texts, known = [str(one).strip() for one in _listed(choices)], str(answer).strip()
    if len(texts) < 2:  # none, or the text of an array, which has no commas
        raise ValueError(f"expected several choices; got {choices!r:.200}")
    letters = LETTERS[: len(texts)]
    if not (letter and len(known) == 1 and known.upper() in letters):
        if known not in texts:
            raise ValueError(f"the answer {known!r:.80} is none of the choices {texts!r:.200}")
        known = letters[texts.index(known)]
    return {"question": row["question"], "choices": texts, "answer": known.upper(), "kind": "choice", **rest}


def _mmmu(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """Images stand before the question, which names them by number; options are the text of a Python list."""
    options = _listed(row["options"])
    used = sorted({*re.findall(r"<image (\d)>", " ".join(map(str, (row["question"], *options))))})
    if lost := [number for number in used if row.get(f"image_{number}") is None]:
        raise ValueError(f"it names <image {lost[0]}>, and image_{lost[0]} is empty")
    images = [row[f"image_{number}"] for number in used or "1234567" if row.get(f"image_{number}") is not None]
    named = [re.sub(r"<image (\d)>", r"[image \1]", str(text)) for text in (row["question"], *options)]
    rest = {"id": row["id"], "images": images, "metadata": {SUBJECT: re.sub(r"^[a-z]+_|_\d+$", "", row["id"])}}
    if row["question_type"] == "multiple-choice":
        yield _choice({"question": named[0]}, named[1:], row["answer"], **rest)
    else:
        known = str(row["answer"])
        try:
            answers = [str(one) for one in _listed(known)]
        except (ValueError, SyntaxError):  # one answer, such as 8 or [0, 2)
            answers = [known]
        yield {"question": named[0], "answers": answers, **rest}


def _mathvista(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    rest = {"id": row["pid"], "image": row.get("decoded_image") or row["image"], "unit": row.get("unit")}
    about = row.get("metadata")
    rest["metadata"] = {SUBJECT: about["task"]} if isinstance(about, Mapping) and about.get("task") else None
    if row["question_type"] == "multi_choice":
        yield _choice(row, row["choices"], row["answer"], letter=False, **rest)
    else:
        kind = {"integer": "number", "float": "number", "list": "list"}.get(str(row["answer_type"]), "text")
        yield {"question": row["question"], "answer": row["answer"], "kind": kind, **rest}


def _m3cot(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question = f"{row['context']}\n{row['question']}" if row.get("context") else row["question"]
    yield _choice({"question": question}, row["choices"], row["answer"], id=row["id"], image=row.get("image"))


def _chartqa(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question, answer = row.get("question") or row["query"], row.get("answer", row.get("label"))
    image = row.get("image") or os.path.join("png", row["imgname"])
    answers = answer if isinstance(answer, list) else [answer]
    yield {"question": question, "answers": answers, "kind": "chart", "tolerance": 0.05, "image": image}


def _docvqa(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    rest = {"image": row["image"], "metadata": {SCORE: ANLS}}
    yield {"id": str(row["questionId"]), "question": row["question"], "answers": row["answers"], "kind": "document", **rest}


def _pope(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question, answer = row.get("question") or row["text"], row.get("answer") or row["label"]
    if str(answer).strip().lower() not in ("yes", "no"):
        raise ValueError(f"the answer {answer!r:.80} is neither yes nor no")
    name = "-".join(str(one) for one in (row.get("category"), row["question_id"]) if one is not None)
    yield {"question": question, "answer": answer, "kind": "yes_no", "id": name, "image": row["image"]}


def _mmbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """Every rotation of the choices is a question, and they count as one. Those of its files (10**6 or more) are not read."""
    index = str(row["index"]).removesuffix(".0")  # a float, in files of columns with gaps
    if index.isdecimal() and int(index) >= 10**6:
        return
    given = {key: str(value) for key, value in row.items() if str("" if value is None else value) not in ("", "nan")}
    question = f"{given['hint']}\n{row['question']}" if "hint" in given else row["question"]
    letters = [letter for letter in LETTERS if letter in given]
    choices, answer = [given[letter] for letter in letters], row["answer"]
    if answer not in letters:
        raise ValueError(f"the answer {answer!r:.80} is none of the choices {', '.join(letters)}")
    image, right = row["image"], letters.index(answer)
    if isinstance(image, str) and image.isdecimal():
        raise ValueError(f"its image is that of row {image}. Write that image into this row")
    if isinstance(image, str) and "." not in image:  # no path: base64, as in its TSV files
        image = {"bytes": b64decode(image), "path": None}
    for shift in range(len(choices)):
        about: dict[str, Any] = {"id": f"{index}/{shift}", "metadata": {GROUP: index}, "image": image}
        yield _choice({"question": question}, choices[shift:] + choices[:shift], LETTERS[(right - shift) % len(choices)], **about)


def _refcoco(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """A box is in pixels, as corner and size; the two corners where the row has a `sent`, as in InternVL's files.

    Its evaluation takes boxes from 0 to 1 too, so that each answer is there in both scales.
    """
    box = [*map(float, row["bbox"])]
    if "sent" in row:
        names, width, height = [row["sent"]], row["width"], row["height"]
    else:
        given = row["image"]["bytes"] if isinstance(row["image"], Mapping) else row["image"]
        with Image.open(BytesIO(given) if isinstance(given, bytes) else root / given) as image:
            width, height = image.size
        names, box[2:] = row["answer"], [start + size for start, size in zip(box, box[2:], strict=False)]
    if len(box) != 4 or not (width > 0 and height > 0 and box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"bbox {row['bbox']!r:.80} is no box in an image of {width} x {height} pixels")
    shares = [value / side for value, side in zip(box, (width, height, width, height), strict=True)]
    answers = [str([round(share * scale, digits) for share in shares]) for scale, digits in ((BOX_SCALE, 2), (1, 5))]
    for place, name in enumerate([names] if isinstance(names, str) else names):
        given = row.get("question_id", row.get("id"))
        rest = {"id": None if given is None else f"{given}/{place}", "image": row["image"]}
        yield {"question": f"Where is {name}?", "answers": answers, "kind": "box", **rest}


def _mvbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    yield _choice(row, row["candidates"], row["answer"], letter=False, video=row["video"])


def _muirbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    options = [str(option) for option in _listed(row["options"])]
    question = "\n".join([row["question"], *(option for option in options if "<image>" in option)])
    choices = [option.replace("<image>", "the image") for option in options]
    yield _choice({"question": question}, choices, row["answer"], id=str(row["idx"]), images=row["image_list"])


FORMS = {
    "chartqa": Form("lmms-lab/ChartQA", "test", "question|query answer|label image|imgname", _chartqa, "type"),
    "docvqa": Form("lmms-lab/DocVQA", "validation", "questionId question answers image", _docvqa, configuration="DocVQA"),
    "m3cot": Form("LightChen2333/M3CoT", "test", "id question choices answer", _m3cot, "domain"),
    "mathvista": Form(
        "AI4Math/MathVista", "testmini", "pid question answer question_type answer_type decoded_image|image", _mathvista
    ),
    "mmbench": Form("lmms-lab/MMBench", "dev", "index question A B answer image", _mmbench, "category", "en"),
    "mmmu": Form("lmms-lab/MMMU", "validation", "id question options answer question_type image_1", _mmmu),
    "muirbench": Form("MUIRBENCH/MUIRBENCH", "test", "idx question options answer image_list", _muirbench, "task"),
    "mvbench": Form("OpenGVLab/MVBench", "train", "video question candidates answer", _mvbench, "task_type", "action_sequence"),
    "pope": Form("lmms-lab/POPE", "test", "question_id question|text answer|label image", _pope, "category"),
    "refcoco": Form("lmms-lab/RefCOCO", "val", "image bbox answer|sent", _refcoco),
}
"""The benchmarks, by name."""
