"""What the responses of an evaluation amount to: scores, figures, comparisons, and the files that hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpo.evaluation.page import page_of
from mpo.evaluation.published import ANLS, GROUP, SCORE, SUBJECT
from mpo.evaluation.statistics import clustered_interval, compare_paired, difference_interval, holm
from mpo.evaluation.voting import answer_classes, best_at, majority_at
from mpo.io import write_json_lines, write_text
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.step import question_of
from mpo.schema import Question
from mpo.verification import final_answer, verify

GREEDY, SAMPLED = "greedy", "sampled"
RESULTS, PAGE, ANSWERS = "results.json", "report.html", "answers.jsonl"


def cluster_of(record: Mapping[str, Any]) -> str:
    """What questions share that are not independent: their images or videos, or else themselves."""
    shown = [*record.get("images", ()), *record.get("videos", ())]
    return repr([one if isinstance(one, str) else content_hash(one) for one in shown]) if shown else record["id"]


def judged(record: dict[str, Any], answered: dict[str, Any] | None, ranks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A question with the scores of its responses: nothing that was dropped has a score."""
    question = question_of(record)
    about = question.metadata
    row: dict[str, Any] = {
        "id": record["id"],
        "group": about.get(GROUP) or record["id"],
        "subject": about.get(SUBJECT) or question.source,
        "cluster": cluster_of(record),
        "ground_truths": list(question.ground_truths),
        "dropped": answered is None,
    }
    for field in (GREEDY, SAMPLED):
        row[field] = []
        for text in (answered or {}).get(field, []):
            found = verify(text, question)
            score = score_of(text, question, found.correct)
            row[field].append({"text": text, "score": score, "reason": found.reason, "none": found.method == "none"})
    row["classes"] = answer_classes([one["text"] for one in row[SAMPLED]], question)
    row["ranks"] = {name: by_id.get(record["id"]) for name, by_id in ranks.items()}
    return row


def score_of(response: str, question: Question, correct: bool) -> float:
    """The score of a response by the rule of its benchmark, from 0 to 1."""
    if question.metadata.get(SCORE) == ANLS:
        from mpo.verification.texts import document_distance

        # The published rule takes the whole response; a chain of thought has its answer after a label in its last line.
        stated = re.search(r"(?i)(?:\A|\n)[^\w\n]{0,9}(?:final )?answer\W{0,9}:\s*(\S[^\n]*)\Z", response.strip())
        given = {response.strip(), stated[1] if stated else "", final_answer(response, question, kind="document").answer or ""} - {
            ""
        }
        distance = min((document_distance(one, truth) for one in given for truth in question.ground_truths), default=1.0)
        return 1 - distance if distance < 0.5 else 0.0
    return float(correct)


def figures(row: Mapping[str, Any], k: int) -> dict[tuple[str, int], float]:
    """What a question contributes to each figure, by its name and the number of samples."""
    greedy = row[GREEDY][0]["score"] if row[GREEDY] else 0.0
    found = {("greedy", 1): greedy}
    scores = [one["score"] for one in row[SAMPLED]]
    for size in sizes(k) if k > 1 else ():
        whole = len(scores) == k
        found["majority", size] = majority_at(size, row["classes"], scores) if whole else 0.0
        found["pass", size] = best_at(size, scores, scores) if whole else 0.0
        for name, ranks in row["ranks"].items():
            found[f"best by {name}", size] = best_at(size, ranks, scores) if whole and ranks else 0.0
    return found


def sizes(k: int) -> list[int]:
    """The points of a curve up to k: powers of two, and k.

    >>> sizes(12)
    [1, 2, 4, 8, 12]
    """
    return [*(2**power for power in range(k.bit_length()) if 2**power < k), k]


def units(rows: Sequence[dict[str, Any]], k: int) -> list[dict[str, Any]]:
    """The units that count: a question, or a group of them, which has the lowest score of its members."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    found = []
    for name, members in groups.items():
        each = [figures(row, k) for row in members]
        found.append(
            {
                "id": name,
                **{field: members[0][field] for field in ("subject", "cluster")},
                "figures": {key: min(one[key] for one in each) for key in sorted(each[0])},
                "unranked": {f"best by {name}" for row in members for name, ranks in row["ranks"].items() if not ranks},
                "unparsable": {name: any(all(one["none"] for one in row[name]) for row in members) for name in (GREEDY, SAMPLED)},
                "dropped": any(row["dropped"] for row in members),
            }
        )
    return found


def summarize(found: Mapping[tuple[str, str, str], Sequence[dict[str, Any]]], k: int) -> dict[str, Any]:
    """All figures with intervals, and every model compared with the first one."""
    counted = {key: units(rows, k) for key, rows in found.items()}
    results = []
    for (model, benchmark, mode), each in counted.items():
        for figure, size in each[0]["figures"]:
            row = {"model": model, "benchmark": benchmark, "mode": mode, "figure": figure, "k": size}
            row |= measured(each, (figure, size))
            row["unparsable"] = sum(unit["unparsable"][GREEDY if figure == "greedy" else SAMPLED] for unit in each)
            row["dropped"] = sum(unit["dropped"] or figure in unit["unranked"] for unit in each)
            if figure == "greedy":
                row["subjects"] = {name: measured(own, (figure, size)) for name, own in by_subject(each).items()}
                row |= yes_no_figures(found[model, benchmark, mode])
            results.append(row)
    first = next(iter(counted))[0]
    others = [key for key in counted if key[0] != first]
    comparisons = [row for key in others for row in compared(first, key, counted[first, *key[1:]], counted[key])]
    families: dict[Any, dict[int, float]] = {}
    for place, row in enumerate(comparisons):
        families.setdefault((row["after"], row["mode"], row["figure"]), {})[place] = row["p_value"]
    for family in families.values():
        for place, value in holm(family).items():
            comparisons[place]["p_value_holm"] = value
    for row in comparisons:
        low, high = row["interval"]
        shown = (low > 0 or high < 0) and row["p_value_holm"] < 0.05
        row["verdict"] = "no difference shown" if not shown else "better" if low > 0 else "worse"
    return {"results": results, "comparisons": comparisons}


def by_subject(each: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The units of each part of a benchmark, where it has several."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for unit in each:
        parts.setdefault(str(unit["subject"] or ""), []).append(unit)
    return dict(sorted(parts.items())) if len(parts) > 1 else {}


def measured(each: Sequence[dict[str, Any]], key: tuple[str, int]) -> dict[str, Any]:
    """The sum and the mean of the scores of units in a figure, with its interval."""
    scores = [unit["figures"][key] for unit in each]
    interval = list(clustered_interval(scores, [unit["cluster"] for unit in each]))
    return {"correct": round(sum(scores), 6), "total": len(scores), "score": sum(scores) / len(scores), "interval": interval}


def yes_no_figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """F1 of yes, and the share of yes among the responses, where every ground truth is yes or no."""
    from mpo.verification.texts import read_yes_no

    truths = [read_yes_no(row["ground_truths"][0]) for row in rows]
    if None in truths or not any(truths):
        return {}
    right = [bool(row[GREEDY] and row[GREEDY][0]["score"]) for row in rows]
    found = sum(bool(truth and one) for truth, one in zip(truths, right, strict=True))
    answered = [bool(row[GREEDY]) and not row[GREEDY][0]["none"] for row in rows]
    said = found + sum(has and not truth and not one for has, truth, one in zip(answered, truths, right, strict=True))
    return {"f1": 2 * found / (said + sum(map(bool, truths))), "yes": said / len(rows)}


def compared(
    first_model: str, key: tuple[str, str, str], before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The change from the first model to another, for the figures that both have: greedy, and each at the largest k."""
    rows: list[dict[str, Any]] = []
    model, benchmark, mode = key
    for figure, size in dict(sorted(before[0]["figures"])).items():
        if (figure, size) not in after[0]["figures"]:
            continue
        row = {"before": first_model, "after": model, "benchmark": benchmark, "mode": mode, "figure": figure, "k": size}
        row |= change(before, after, (figure, size))
        if figure == "greedy":
            then = by_subject(after)
            row["subjects"] = {name: change(own, then[name], (figure, size)) for name, own in by_subject(before).items()}
        rows.append(row)
    return rows


def change(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], key: tuple[str, int]) -> dict[str, Any]:
    """The change of the mean score of the same units in a figure, with its interval and test."""
    first, then = ([unit["figures"][key] for unit in each] for each in (before, after))
    clusters = [unit["cluster"] for unit in before]
    found = {"total": len(first), "difference": (sum(then) - sum(first)) / len(first)}
    return found | {"interval": list(difference_interval(first, then, clusters)), **asdict(compare_paired(first, then, clusters))}


def write_results(
    folder: Path,
    results: dict[str, Any],
    found: Mapping[tuple[str, str, str], Sequence[dict[str, Any]]],
    records: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write the results (`summarize`), the rows of all questions (`judged`) and the page of their records; return the results."""
    for name in (RESULTS, PAGE):  # of other answers, and after a kill of none
        (folder / name).unlink(missing_ok=True)
    answers = [dict(zip(("model", "benchmark", "mode"), key, strict=True)) | one for key, rows in found.items() for one in rows]
    write_json_lines(folder / ANSWERS, answers)
    write_text(folder / PAGE, page_of(results, answers, records))
    write_text(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    return results
