"""Benchmarks in the forms that they are published in, as questions with their scoring rules."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

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


class Form(NamedTuple):
    """The published form of a benchmark. `read` makes the lines of a file of questions of a row and the folder of its files."""

    hub: str  # name on the Hub
    split: str  # that is scored
    columns: str  # that each row must have; of names with | between them one
    read: Callable[[Row, Path], Iterator[dict[str, Any]]]
    subject: str = ""  # column of a question's part of the benchmark
    configuration: str | None = None  # on the Hub


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

        shards: Sequence[Any] = of_dataset(load_dataset(form.hub, form.configuration, split=form.split), form.hub)
    else:
        shards = open_files(path, form.split if os.path.isdir(path) else "train")
    return _questions(name, form, shards, root)


def _questions(name: str, form: Form, shards: Sequence[Any], root: Path) -> Iterator[Question]:
    seen = 0
    for shard in shards:
        for where, row in shard.lines():
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
    yield _choice({"question": question}, row["choices"], row["answer"], id=row["id"], image=row.get("image"))


def _chartqa(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question, answer = row.get("question") or row["query"], row.get("answer", row.get("label"))
    image = row.get("image") or os.path.join("png", row["imgname"])
    answers = answer if isinstance(answer, list) else [answer]
    yield {"question": question, "answers": answers, "kind": "chart", "image": image}


def _docvqa(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    rest = {"image": row["image"], "metadata": {SCORE: ANLS}}
    yield {"id": str(row["questionId"]), "question": row["question"], "answers": row["answers"], "kind": "document", **rest}


def _pope(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    question, answer = row.get("question") or row["text"], row.get("answer") or row["label"]
    name = "-".join(str(one) for one in (row.get("category"), row["question_id"]) if one is not None)
    yield {"question": question, "answer": answer, "kind": "yes_no", "id": name, "image": row["image"]}


def _mmbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """Every rotation of the choices is a question, and they count as one."""
    given = {key: str(value) for key, value in row.items() if str("" if value is None else value) not in ("", "nan")}
    question = f"{given['hint']}\n{row['question']}" if "hint" in given else row["question"]
    letters = [letter for letter in LETTERS if letter in given]
    choices, right = [given[letter] for letter in letters], letters.index(row["answer"])
    for shift in range(len(choices)):
        name = f"{row['index']}/{shift}"
        about = {GROUP: str(row["index"])}
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
    yield _choice(row, row["candidates"], row["answer"], video=row["video"])


def _muirbench(row: Row, root: Path) -> Iterator[dict[str, Any]]:
    """Images stand where the question and the options name them."""
    question = "\n".join([row["question"], *(option for option in row["options"] if "<image>" in option)])
    choices = [option.replace("<image>", "the image") for option in row["options"]]
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
