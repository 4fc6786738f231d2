"""Read published responses with their verdicts in their authors' forms: see verification_unseen.md for the files.

A line is what `benchmarks/verification.py` reads: `id`, `question`, `choices`, `unit`, `answer_type` or `kind`, `ground_truth`,
`response` and the published verdict `is_right`.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Lines = Iterator[tuple[str, dict[str, Any]]]
_EMPTY = {"choices": None, "unit": None, "answer_type": "text"}


def drawn(identifier: object, parts: int) -> bool:
    """Whether a question is in a sample of one in so many."""
    return int.from_bytes(hashlib.sha256(str(identifier).encode()).digest()[:4]) % parts == 0


def mathvista(path: Path, records: Any) -> Lines:
    for pid, record in records.items():
        if all(key in record for key in ("response", "extraction", "true_false")):
            kept = {key: record[key] for key in ("question", "choices", "unit", "answer_type")}
            kept |= {"id": pid, "ground_truth": record["answer"], "response": record["response"] or ""}
            yield path.stem.replace("output_", "mathvista_"), kept | {"is_right": bool(record["true_false"])}


def mmlu_pro(path: Path, records: Any) -> Lines:
    for record in (record for record in records if drawn(record["question_id"], 24)):
        kept = {"id": str(record["question_id"]), "question": record["question"], "choices": record["options"]}
        kept |= {"ground_truth": record["options"][record["answer_index"]], "is_right": record["pred"] == record["answer"]}
        said = record.get("model_outputs") or record.get("generated_text") or ""
        yield path.stem.replace("model_outputs_", "mmlu-pro_").removesuffix("_5shots"), {**kept, "response": said}


def rho(path: Path, records: Any) -> Lines:
    for record in records:
        kept = {"id": str(record["idx"]), "question": record["question"], "ground_truth": record["gt"], "kind": "math"}
        yield f"rho_{path.stem}", {**kept, "response": record["code"][0], "is_right": record["score"][0]}


def mathvision(path: Path, records: Any) -> Lines:
    """MATH-Vision: its questions stand in a file beside it."""
    asked = {line["id"]: line for line in map(json.loads, path.with_name("test.jsonl").read_text().splitlines())}
    for record in (record for record in records if drawn(record["id"], 4)):
        question = asked[record["id"]]
        truth, options = question["answer"], question["options"] or None
        kept = {"id": record["id"], "question": question["question"], "choices": options, "kind": "choice" if options else "math"}
        kept |= {"ground_truth": options["ABCDE".index(truth)] if options else truth, "is_right": record["correct"]}
        yield path.stem, kept | {"response": record["response"] or ""}


def gsm8k(path: Path, records: Any) -> Lines:
    """GSM8K: four systems in one file."""
    for number, record in enumerate(records):
        kept = {"id": f"{number}", "question": record["question"], "answer_type": "integer"}
        kept |= {"ground_truth": record["ground_truth"].rpartition("A:")[2].strip()}
        for system in (name for name in record if isinstance(record[name], dict)):
            said = {"response": record[system]["solution"], "is_right": record[system]["is_correct"]}
            yield f"gsm8k_{system}", kept | said


def m3cot(path: Path, records: Any) -> Lines:
    """M3CoT: the last turn is the response; the verdict is that of the authors' rules."""
    for record in (record for record in records if drawn(record["id"], 4)):
        choices, said = record["choices"], record["messages"][-1]
        letters = re.findall(r"\(([A-Za-z])\)", said.split("[Answer]")[-1].split("[Rationale]")[0].split("[Context]")[0])
        words = re.split(r"[\s.,!?]", said)
        named = (
            [letter.upper() for letter in letters]
            or [chr(65 + place) for place, choice in enumerate(choices) if choice.lower() in said.lower()]
            or [chr(65 + place) for place in range(len(choices)) if chr(65 + place) in words]
            or [chr(65 + place) for place in range(len(choices)) if chr(97 + place) in words]
        )
        kept = {"id": record["id"], "question": record["messages"][0], "choices": choices, "kind": "choice"}
        kept |= {"ground_truth": choices["ABCDEF".index(record["answer"])], "is_right": named[-1:] == [record["answer"]]}
        yield path.stem, kept | {"response": said}


def mmmu_pro(path: Path, records: Any) -> Lines:
    for record in (record for record in records if drawn(record["id"], 2)):
        choices = [str(choice) for choice in ast.literal_eval(record["options"])]
        kept = {"id": record["id"], "question": record["question"], "choices": choices, "kind": "choice"}
        kept |= {"ground_truth": choices["ABCDEFGHIJ".index(record["answer"])], "is_right": record["if_right"]}
        yield path.stem, kept | {"response": record["response"] or ""}


def blink(path: Path, records: Any) -> Lines:
    """BLINK: the files have no choices, so a response without any letter is left out."""
    for record in (record for record in records["val"] if drawn(record["idx"], 4)):
        if re.search(r"(?<![A-Za-z])[A-E](?![A-Za-z])", record["full_prediction"] or ""):
            kept = {"id": record["idx"], "question": "", "kind": "choice", "ground_truth": record["answer"].strip("()")}
            kept |= {"response": record["full_prediction"], "is_right": record["prediction"] == record["answer"]}
            yield f"blink_{path.stem.split('_')[1]}", kept


def gaokao(path: Path, records: Any) -> Lines:
    """GAOKAO-Bench: Chinese questions with their choices in the text; in physics several may be right."""
    for record in records["example"]:
        truth, said = "".join(record["standard_answer"]), "".join(record["model_answer"])
        kept = {"id": f"{records['keyword']}_{record['index']}", "question": record["question"], "ground_truth": truth}
        kept |= {"kind": "choices" if "Physics" in records["keyword"] else "choice", "is_right": set(said) == set(truth)}
        yield "gaokao_gpt-4-0314", kept | {"response": record["model_output"]}


def chartqa(path: Path, records: Any) -> Lines:
    """ChartQA: the verdict is relaxed accuracy by the authors' rule, on the whole response."""

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            return None

    for place, record in enumerate(records):
        said, truth = record["prediction"].strip(), record["answer"].strip()
        given, known = number(said), number(truth)
        close = abs(given - known) <= 0.05 * abs(known) if given is not None and known else said.lower() == truth.lower()
        kept = {"id": str(place), "question": record["query"], "kind": "chart", "ground_truth": truth}
        yield path.stem, kept | {"response": record["prediction"], "is_right": close}


_READERS: dict[str, Callable[[Path, Any], Lines]] = {
    "output_": mathvista,
    "model_outputs_": mmlu_pro,
    "rho-": rho,
    "mathvision_": mathvision,
    "example_model_solutions": gsm8k,
    "m3cot_": m3cot,
    "mmmu-pro_": mmmu_pro,
    "blink_": blink,
    "gaokao_": gaokao,
    "chartqa_": chartqa,
}


def published(path: Path) -> Lines:
    """The lines of a file in its authors' form, each with the name of the responses; none for a file of another name."""
    reader = next((reader for start, reader in _READERS.items() if path.name.startswith(start)), None)
    if reader is None:
        return
    text = path.read_text(encoding="utf-8")
    records = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    for name, line in reader(path, records):
        yield name, _EMPTY | line
