r"""Measure `mpo.verification` on real responses with published verdicts, beside math-verify and the rules of InternVL's checker.

    python benchmarks/verification.py FOLDER            # JSON into results/
    python benchmarks/verification.py FOLDER --disagreements second
    python benchmarks/verification.py FOLDER --unseen   # all of it measures; see verification_unseen.md

FOLDER has files `*.jsonl.gz` whose lines are `{"id", "question", "choices", "unit", "ground_truth", "answer_type", "response",
"is_right"}`. Ids are halved by a hash: the rules were decided on the first half, the second half measures them.
With `--unseen` FOLDER has files as published, named as verification_unseen.md says.
`verification_labels.jsonl` has the verdicts corrected by hand on reading every disagreement: ids and labels, no responses;
`verification_labels_unseen.jsonl` those of the disagreements of the unseen rounds that were read (a sample where they are many).
Where both a published and another verdict can be defended (arguable), the published one stays.

The rules of InternVL's data pipeline (`utils/accuracy_reward.py`): the text after `Final answer:` or `Answer:`, else the last
`\boxed{}`, else the whole response is right when it is the ground truth (case aside), when both are the same after VQA's
normalisation, when it begins with the letter of the right choice, or when math-verify says so.
"""

import argparse
import gzip
import hashlib
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from verification_sources import published

from mpo.schema import Question
from mpo.verification import match, verify
from mpo.verification.dress import boxed
from mpo.verification.texts import normalize

HERE = Path(__file__).parent
RESULTS = HERE / "results"
LABELS = HERE / "verification_labels.jsonl", HERE / "verification_labels_unseen.jsonl"
HOSTILE = [
    "9^9^9^9",
    "10^8!",
    "10^{10^9}",
    "\\frac{1}{" * 60 + "2" + "}" * 60,
    "(x+1)^{5000}",
    "x^{x^{x^{x}}}",
    "(a+b+c+d+e+f)^{90}",
]
HOSTILE += ["\\sum_{n=1}^{99999999} \\frac{1}{n}", "\\int e^{x^2} \\sin(x^3) dx", "\\prod_{k=1}^{9999999} k"]


def question_of(line: dict[str, Any]) -> Question:
    """The question of a line."""
    kind = line.get("kind") or ("choice" if line["choices"] else "list" if line["answer_type"] == "list" else "number")
    asked = [{"role": "user", "content": line["question"]}]
    return Question(
        asked, ground_truths=[line["ground_truth"]], kind=kind, choices=line["choices"], unit=line["unit"], id=line["id"]
    )


def half(identifier: str) -> str:
    """The half of the data that a question is in."""
    return ("first", "second")[hashlib.sha256(identifier.encode()).digest()[0] % 2]


def read(folder: Path, *, unseen: bool = False) -> Iterator[dict[str, Any]]:
    """The lines of a folder, with the name of their responses, the half they are in, and the corrected verdict as `correct`."""
    labels = (json.loads(line) for path in LABELS for line in path.read_text().splitlines())
    corrected = {(label["responses"], label["id"]): label for label in labels}
    for path in sorted(folder.glob("*.json*")):
        name = path.name.removesuffix(".jsonl.gz")
        if unseen:
            lines = list(published(path))
        else:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = [(name, json.loads(line)) for line in file]
        for name, line in lines:
            label = corrected.get((name, line["id"]))
            yield {
                **line,
                "responses": name,
                "half": "unseen" if unseen else half(line["id"]),
                "correct": label["correct"] if label else line["is_right"],
                "arguable": bool(label and label["arguable"]),
                "read": label is not None,
            }


def ours(line: dict[str, Any]) -> bool:
    """The verdict of mpo.verification."""
    return verify(line["response"], question_of(line)).correct


def math_verify_says(text: str, truth: str) -> bool:
    """The verdict of math-verify on a text."""
    import math_verify

    return bool(math_verify.verify(math_verify.parse(truth, parsing_timeout=3), math_verify.parse(text, parsing_timeout=3)))


def plain_math_verify(line: dict[str, Any]) -> bool:
    """The verdict of math-verify on the whole response."""
    return math_verify_says(line["response"], line["ground_truth"])


def official_rules(line: dict[str, Any]) -> bool:
    """The verdict of the rules of InternVL's checker."""
    found = re.findall(r"(?:Final answer:|Answer:)\s*(.*)", line["response"], re.IGNORECASE)
    boxes = boxed(line["response"])
    answer = (found[-1] if found else boxes[-1][2] if boxes else line["response"]).strip()
    truth = line["ground_truth"]
    if answer.lower() == truth.lower() or normalize(answer) == normalize(truth):
        return True
    if line["choices"] and (letter := re.match(r"[\s(*]*([A-J])(?:[).:\s*]|$)", answer)):
        if "ABCDEFGHIJ".index(letter[1]) == line["choices"].index(truth):
            return True
    return math_verify_says(answer, truth)


CHECKERS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "mpo.verification": ours,
    "math-verify": plain_math_verify,
    "official rules": official_rules,
}


def scores(counts: Counter[tuple[bool, bool]]) -> dict[str, float]:
    """Precision and recall of counts of (verdict, label)."""
    right, wrong, missed = counts[True, True], counts[True, False], counts[False, True]
    found = {"precision": right / max(1, right + wrong), "recall": right / max(1, right + missed)}
    return {**found, "true_positives": right, "false_positives": wrong, "false_negatives": missed}


def measure(
    folder: Path, checkers: dict[str, Callable[[dict[str, Any]], bool]] = CHECKERS, *, unseen: bool = False
) -> dict[str, Any]:
    """Precision and recall of each checker per half, file and labels, and the disagreements in three kinds."""
    counts: dict[tuple[str, str, str, str], Counter[tuple[bool, bool]]] = {}
    kinds: dict[str, Counter[str]] = {}
    judged: dict[str, Counter[tuple[bool, bool, bool]]] = {}  # of disagreements: our verdict, read, the label
    for line in read(folder, unseen=unseen):
        for name, checker in checkers.items():
            said = checker(line)
            for labels, label in (("published", line["is_right"]), ("corrected", line["correct"])):
                for source in (line["responses"], f"{line['responses'].partition('_')[0]} pooled" if unseen else "pooled"):
                    counts.setdefault((line["half"], labels, source, name), Counter())[said, label] += 1
            if name == "mpo.verification" and said != line["is_right"]:
                kind = "arguable" if line["arguable"] else "published label wrong" if said == line["correct"] else "we are wrong"
                kinds.setdefault(line["half"], Counter())[kind] += 1
                judged.setdefault(source, Counter())[said, line["read"], line["correct"]] += 1
    return {
        "scores": [
            dict(zip(("half", "labels", "responses", "checker"), key, strict=True)) | scores(c) for key, c in counts.items()
        ],
        "disagreements": {part: dict(found) for part, found in kinds.items()},
        "estimated": {
            source: estimated(counts["unseen", "published", source, "mpo.verification"], found)
            for source, found in judged.items()
            if unseen
        },
    }


def estimated(counts: Counter[tuple[bool, bool]], judged: Counter[tuple[bool, bool, bool]]) -> dict[str, float]:
    """Precision and recall on corrected labels, the share of wrong labels among the disagreements that were read taken for all.

    Responses on which the published verdict and ours agree count as they are: they were not read.
    """
    right, wrong, missed = float(counts[True, True]), counts[True, False], counts[False, True]
    read = {said: judged[said, True, True] + judged[said, True, False] for said in (True, False)}
    told = wrong * judged[True, True, True] / max(1, read[True])
    lost = missed * (judged[False, True, True] / read[False] if read[False] else 1.0)
    found = {"precision": (right + told) / max(1.0, right + wrong), "recall": (right + told) / max(1.0, right + told + lost)}
    return {**found, "read": sum(read.values()), "disagreements": wrong + missed}


def speed() -> dict[str, float]:
    """Plain answers per second of one core, and the seconds of 1,000 expressions of which 10 are hostile."""
    answers = [str(number * 7919 % 1_000_003) for number in range(10_000)]
    start = time.process_time()
    for answer in answers:
        match(answer, answer[:-1] + "1", "number")
    plain = len(answers) / (time.process_time() - start)
    start = time.perf_counter()
    for number in range(990):
        match(f"(x+{number})(x-1)", f"x^2+{number - 1}x-{number}", "expression")
    for text in HOSTILE:
        match(text, "x+1", "expression")
    return {"plain_answers_per_second": plain, "expressions_seconds": time.perf_counter() - start}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the files of responses")
    parser.add_argument("--disagreements", choices=("first", "second", "unseen"), help="only print those of a half")
    parser.add_argument("--unseen", action="store_true", help="the files are as published, and none of them decided a rule")
    parser.add_argument("--checkers", nargs="+", choices=CHECKERS, default=list(CHECKERS), help="measure only these")
    parser.add_argument("--output", type=Path, help="file of the results; default: one in results/ with today's date")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.disagreements:
        for line in read(arguments.folder, unseen=arguments.unseen):
            if line["half"] == arguments.disagreements:
                verdict = verify(line["response"], question_of(line))
                if verdict.correct != line["is_right"]:
                    print(json.dumps({**line, "verdict": str(verdict)}, ensure_ascii=False, indent=1))
        return
    results = {
        **measure(arguments.folder, {name: CHECKERS[name] for name in arguments.checkers}, unseen=arguments.unseen),
        **({} if arguments.unseen else speed()),
        "versions": {name: version(name) for name in ("math-verify", "sympy", "rapidfuzz")},
        "cores": os.cpu_count(),
    }
    output = arguments.output or RESULTS / f"verification_{'unseen_' * arguments.unseen}{date.today()}.json"
    output.write_text(json.dumps(results, indent=1) + "\n")
    for row in results["scores"]:
        if row["half"] != "first":
            print(f"{row['labels']:10} {row['responses']:44} {row['checker']:18} {row['precision']:.3f} {row['recall']:.3f}")
    print({key: value for key, value in results.items() if key != "scores"})


if __name__ == "__main__":
    main()
