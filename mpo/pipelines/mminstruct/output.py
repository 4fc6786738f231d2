"""Write instructions for training: balanced, with answer-style suffixes, in several forms; and a report with a page."""

from __future__ import annotations

import base64
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mpo.data.images import open_image
from mpo.data.similar import BANDS, ngrams, normalised, numbers, signature
from mpo.io import write_json_lines, write_text
from mpo.pipelines.job import Job
from mpo.pipelines.mminstruct.check import YES_NO, Check
from mpo.pipelines.mminstruct.config import Config
from mpo.pipelines.mminstruct.domains import TYPES, prompts
from mpo.pipelines.mminstruct.generate import draw, lettered
from mpo.pipelines.mminstruct.language import length
from mpo.pipelines.mmpr.config import file_name
from mpo.pipelines.mmpr.make import Correct, Records
from mpo.pipelines.part import DROPPED
from mpo.pipelines.report import STYLE, table
from mpo.pipelines.step import Dropped, Record

META, REPORT, PAGE, LINES = "meta.json", "report.json", "report.html", "annotations"
INSTRUCTIONS, LLAVA, SHAREGPT, TRL, QUESTIONS = "instructions.jsonl", "llava.json", "sharegpt.json", "trl.jsonl", "questions.jsonl"
WRITTEN = (META, REPORT, PAGE, LINES, INSTRUCTIONS, LLAVA, SHAREGPT, TRL, QUESTIONS, DROPPED, "dataset_info.json", "jobs")
PAPER_RATIO = 1 / 6
"""Cost of an instruction in the paper, relative to one that people write."""
SAME = 0.9
"""Share of n-grams by which two long answers are the same."""
SHOWN_SIDE = 160
"""Pixels of an image on the page."""
TITLES = {
    "per instruction": "Cost of a kept instruction",
    "spent": "Spent",
    "drops": "Dropped, by step and kind",
    "collected": "Images",
    "mean length": "Mean length, in words (Chinese: characters)",
    "dialogues": "Dialogues, by rounds",
    "judgements": "Judgements",
    "letters": "Letters of right options",
}
KINDS = {"judgement": "yes_no", "choice": "choice", "short": None}
"""Kinds of answers in `mpo.verification`, of the types that have a known one."""


def _lost(one: Record, step: str, reason: str) -> Record:
    return {"id": one["id"], "job": step, "step": step, "reason": reason, "record": one}


def distinct(instructions: Iterable[Record], lost: list[Record]) -> list[Record]:
    """Add long answers to `lost` that repeat, but for some words, an earlier one about another image or to another question.

    Two answers are the same if they have the same numbers and share `SAME` of the n-grams of the shorter one.
    """
    kept, first = list[Record](), dict[tuple[int, bytes], Record]()
    for one in instructions:
        if one["type"] == "long":
            minima = signature(normalised(one["answer"])).reshape(BANDS, -1)
            bands = [(at, band.tobytes()) for at, band in enumerate(minima)]
            before = next((first[band] for band in bands if band in first and _same(first[band]["answer"], one["answer"])), None)
            if before is not None:
                why = f"repeat: the same was said before, about this image or another ({before['id']})"
                lost.append(_lost(one, "distinct", why))
                continue
            for band in bands:
                first.setdefault(band, one)
        kept.append(one)
    return kept


def _same(one: str, other: str) -> bool:
    first, second = (ngrams(normalised(text)) for text in (one, other))
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared >= SAME * min(len(first), len(second)) and sorted(numbers(one)) == sorted(numbers(other))


def whole(instructions: Iterable[Record], lost: list[Record]) -> list[Record]:
    """Add the rounds of a dialogue after one that was dropped, of which they may speak, to `lost`."""
    kept, rounds = [], Counter[tuple[str, str]]()
    for one in instructions:
        of = (one["source"], one["dialogue"]) if "dialogue" in one else ("", "")
        if of[1] and one["turn"] != rounds[of]:
            lost.append(_lost(one, "dialogue", "dialogue: an earlier round was dropped"))
        else:
            kept.append(one)
            rounds[of] += 1
    return kept


def balance(instructions: Sequence[Record], seed: int = 0) -> tuple[list[Record], list[Record]]:
    """Drop judgements until, in each language, as many answers are yes as are no; those of the most one-sided domains first.

    Returns:
        the instructions that are kept, in their order, and those that are not.
    """
    surplus: set[str] = set()
    for language, (yes, no) in YES_NO.items():
        own = [one for one in instructions if one["type"] == "judgement" and one.get("language", "en") == language]
        many = yes if sum(one["answer"] == yes for one in own) > len(own) / 2 else no
        others = Counter(one.get("domain") for one in own if one["answer"] != many)
        pools: dict[Any, list[str]] = {}
        for one in sorted(own, key=lambda one: ("dialogue" not in one, draw(seed, one["id"]).random())):  # dialogues last
            if one["answer"] == many:
                pools.setdefault(one.get("domain"), []).append(one["id"])
        for _ in range(len(own) - 2 * others.total()):
            surplus.add(pools[max(pools, key=lambda name: len(pools[name]) - others[name])].pop())
    return [one for one in instructions if one["id"] not in surplus], [one for one in instructions if one["id"] in surplus]


def even(instructions: Sequence[Record], lost: list[Record], seed: int = 0) -> list[Record]:
    """Balance instructions, with dialogues `whole`; what is not kept is added to `lost`."""
    kept, surplus = balance(whole(instructions, lost), seed)
    while surplus:  # the rest of a dialogue, which goes with one of them, may have judgements too
        lost += [_lost(one, "balance", "balance: more judgements have this answer than the other") for one in surplus]
        kept, surplus = balance(whole(kept, lost), seed)
    return kept


def arrange(instructions: Sequence[Record], seed: int = 0) -> list[Record]:
    """Order the options so that the right ones' letters are even, and add the suffixes, the ``prompt`` and the ``response``.

    Of choices with the same number of options, every letter is right equally often, but for one.
    """
    met: Counter[int] = Counter()
    arranged = []
    for one in instructions:
        random, language = draw(seed, one["id"]), one.get("language", "en")
        suffix = random.choice(prompts()["suffixes"][one["type"]][language])
        own = {name: value for name, value in one.items() if name != "earlier"}  # rounds that may yet be corrected
        if one["type"] == "choice":
            count = len(one["choices"])
            round_, place = divmod(met[count], count)
            right = draw(seed, count, round_).sample(range(count), count)[place]
            met[count] += 1
            others = [choice for choice in one["choices"] if choice != one["answer"]]
            random.shuffle(others)
            own["choices"] = [*others[:right], one["answer"], *others[right:]]
        arranged.append(_phrased({**own, "suffix": suffix}))
    return arranged


def _phrased(one: Record) -> Record:
    choices = one["choices"] if one["type"] == "choice" else []
    response = chr(ord("A") + choices.index(one["answer"])) if choices else one["answer"]
    return {**one, "response": response, "prompt": "\n".join([one["question"], *lettered(choices), one["suffix"]])}


def _reviewed(instructions: Iterable[Record], correct: Correct | None, lost: list[Record]) -> list[Record]:
    """Apply the decisions of people; what they reject, or change to what no instruction can be, is added to `lost`."""
    kept = []
    for one in instructions:
        new, reason = (one if correct is None else correct(one)), "rejected in review"
        if new is not None and new != one:
            try:
                new = Check().finish(new, ())
                new = _phrased(new) if "suffix" in new else new
            except (Dropped, ValueError) as error:
                new, reason = None, f"as changed in review: {error}"
        if new is None:
            lost.append(_lost(one, "review", reason))
        else:
            kept.append(new)
    return kept


def conversations(instructions: Iterable[Record], turns: int = 1) -> Iterator[list[Record]]:
    """Group instructions about the same image in the same language, up to so many turns; a ``dialogue`` stays whole."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for one in instructions:
        of = (one.get("source"), one["dialogue"]) if "dialogue" in one else (one.get("domain"), one.get("language"))
        groups.setdefault((*of, *map(str, one["images"])), []).append(one)
    for group in groups.values():
        count = len(group) if "dialogue" in group[0] else turns
        for start in range(0, len(group), count):
            yield group[start : start + count]


def write(
    output: Path,
    config: Config,
    collected: Mapping[str, Any] | None,
    jobs: Sequence[tuple[Job, dict[str, Any]]],
    correct: Correct | None = None,
) -> dict[str, Any]:
    """Write the instructions of jobs, what was dropped, and the report, which is returned.

    Raises:
        ValueError: if no instruction is left.
    """
    output = output.absolute()
    made = [one for job, _ in jobs if not job.names[-1].startswith("caption") for one in Records(job.folder)]
    lost = [{**one, "job": job.folder.name} for job, _ in jobs for one in Records(job.folder, DROPPED)]
    kept = even(distinct(_reviewed(made, correct, lost), lost), lost, config.seed)
    kept = whole(_reviewed(arrange(kept, config.seed), correct, lost), lost)
    root = os.path.commonpath([os.path.dirname(path) for one in kept for path in one["images"]]) if kept else str(output)
    report = _report(kept, lost, config, collected, [report for _, report in jobs], root)
    for name in (META, REPORT, PAGE):  # of other files, and after a kill of none
        (output / name).unlink(missing_ok=True)
    meta = _write_files(output, kept, config.turns, root)
    write_json_lines(output / DROPPED, lost)
    write_text(output / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_text(output / PAGE, page(report, kept))
    if not kept:
        said = ", ".join(f"{count}: {reason}" for reason, count in report["drops"].items())
        raise ValueError(f"No instruction is left: {said}. See {output / PAGE}.")
    write_text(output / META, json.dumps(meta, ensure_ascii=False, indent=1) + "\n", durable=True)
    return report


def _write_files(output: Path, kept: Sequence[Record], turns: int, root: str) -> dict[str, Any]:
    groups = [*conversations(kept, turns)]
    lines: dict[str, list[dict[str, Any]]] = {}
    shared, trl = [], []
    for first, *rest in groups:
        group, images = [first, *rest], [first["images"][0]]
        id = f"{first['id']}+{len(rest)}" if rest else first["id"]
        said = [text for one in group for text in (one["prompt"], one["response"])]
        told = [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate([f"<image>\n{said[0]}", *said[1:]])]
        about = {name: first[name] for name in ("domain", "language", "licence", "origin", "source") if first.get(name)}
        line = {"id": id, "image": os.path.relpath(images[0], root), "conversations": told}
        line["metadata"] = {**about, "types": [one["type"] for one in group]}
        lines.setdefault(file_name(str(first.get("domain") or "none")), []).append(line)
        shared.append({"conversations": told, "images": images})
        parts: list[list[dict[str, str]]] = [[{"type": "text", "text": text}] for text in said]
        parts[0].insert(0, {"type": "image"})
        messages = [{"role": ("user", "assistant")[at % 2], "content": content} for at, content in enumerate(parts)]
        trl.append({"id": id, "images": images, "messages": messages})
    for old in (output / LINES).glob("*.jsonl"):  # of an earlier run, with other domains
        old.unlink()
    near = os.path.relpath(root, output) if Path(root).is_relative_to(output) else root
    meta = {}
    for name, own in sorted(lines.items()):
        write_json_lines(output / LINES / f"{name}.jsonl", own)
        entry = {"root": near, "annotation": f"{LINES}/{name}.jsonl", "data_augment": False, "repeat_time": 1, "length": len(own)}
        meta[f"mminstruct_{name}"] = entry
    info = {"file_name": SHAREGPT, "formatting": "sharegpt", "columns": {"messages": "conversations", "images": "images"}}
    write_json_lines(output / INSTRUCTIONS, kept)
    write_json_lines(output / TRL, trl)
    # Alone, later rounds may lack what they speak of.
    later = {one["id"] for group in groups if "dialogue" in group[0] for one in group[1:]}
    write_json_lines(output / QUESTIONS, (_question(one) for one in kept if one["id"] not in later))
    all_lines = [one for own in lines.values() for one in own]
    for file, value in ((LLAVA, all_lines), (SHAREGPT, shared), ("dataset_info.json", {"mminstruct": info})):
        write_text(output / file, json.dumps(value, ensure_ascii=False, indent=1) + "\n")
    return meta


def _question(one: Record) -> dict[str, Any]:
    known = one["type"] in KINDS
    fields = {"answer": one["answer"] if known else None, "choices": one.get("choices"), "kind": KINDS.get(one["type"])}
    named = {"source": one.get("domain"), "metadata": {"type": one["type"], "language": one.get("language", "en")}}
    asked = {"id": one["id"], "image": one["images"][0], "question": one["question"]}
    return asked | {name: value for name, value in (fields | named).items() if value}


def _report(
    kept: Sequence[Record], lost: Sequence[Record], config: Config, collected: Any, jobs: Sequence[dict[str, Any]], root: str
) -> dict[str, Any]:
    spent = Counter[str]()
    for one in (*([collected] if collected else []), *jobs):
        spent.update(one["spent"])
    number = max(len(kept), 1)
    cost: dict[str, Any] = {f"{name} tokens": round(spent[f"{name}_tokens"] / number, 1) for name in ("prompt", "completion")}
    if "cost" in spent:
        spent["cost"] = round(spent["cost"], 9)  # type: ignore[assignment]  # whatever the order in which it was added up
        cost["cost"] = round(spent["cost"] / number, 9)
        price = config.manual_price
        cost |= {"manual price": price, "of the manual price": round(cost["cost"] / price, 9)} if price else {}
        cost |= {"without the price of": ", ".join(free)} if (free := _unpriced(config)) else {}
    unused = sum(job.get("unused", 0) for job in jobs)  # responses to what is gone or has changed
    rounds = Counter(Counter((one["source"], one["dialogue"]) for one in kept if "dialogue" in one).values())
    domains: dict[str, dict[str, int]] = {}
    for one in kept:
        domains.setdefault(one.get("domain") or "none", dict.fromkeys(TYPES, 0))[one["type"]] += 1
    drops = Counter(f"{one['step']}: {one['reason'].partition(':')[0].partition(' (')[0][:80]}" for one in lost)
    return {
        "instructions": len(kept),
        "dropped": len(lost),
        **({"unused": unused} if unused else {}),
        "images": len({one["images"][0] for one in kept}),
        "domains": dict(sorted(domains.items())),
        "types": {**Counter(one["type"] for one in kept)},
        **({"dialogues": {f"of {count}": number for count, number in sorted(rounds.items())}} if rounds else {}),
        "languages": {**Counter(one.get("language", "en") for one in kept)},
        "judgements": {**Counter(one["answer"] for one in kept if one["type"] == "judgement")},
        "letters": dict(sorted(Counter(one["response"] for one in kept if one["type"] == "choice").items())),
        "mean length": {type: _mean_lengths(own) for type in TYPES if (own := [one for one in kept if one["type"] == type])},
        "drops": dict(drops.most_common()),
        "collected": dict(collected) if collected else None,
        "per instruction": cost,
        "paper: of the manual price": round(PAPER_RATIO, 3),
        "spent": {**spent},
        "image_root": root,
        "jobs": [*jobs],
    }


def _unpriced(config: Config) -> list[str]:
    asked = {name: getattr(config, name) for name in ("collect", "caption", "generate", "blind", "judge")}
    return [name for name, one in asked.items() if one is not None and one.model is not None and one.model.prices is None]


def _mean_lengths(own: Sequence[Record]) -> dict[str, float]:
    lengths = {part: [length(one[part], one.get("language", "en")) for one in own] for part in ("question", "answer")}
    return {part: round(sum(counts) / len(own), 1) for part, counts in lengths.items()}


def page(report: Mapping[str, Any], kept: Sequence[Record]) -> str:
    """Write the report as a self-contained HTML page, with an example of each domain and type."""
    heads = "".join(f"<th>{name}</th>" for name in (*TYPES, "all", "images"))
    rows = ""
    for name, own in report["domains"].items():
        images = len({one["images"][0] for one in kept if (one.get("domain") or "none") == name})
        cells = "".join(f"<td>{count}</td>" for count in (*(own[type] for type in TYPES), sum(own.values()), images))
        rows += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    first: dict[tuple[str, str], list[Record]] = {}
    for group in conversations(kept):
        first.setdefault((group[0].get("domain") or "none", group[0]["type"] if len(group) == 1 else "dialogue"), group)
    parts = [("Domains and types", f"<table><tr><th></th>{heads}</tr>{rows}</table>")]
    for name, title in TITLES.items():
        if own := report.get(name):
            parts.append((title, table({key: value for key, value in own.items() if key not in ("domains", "spent")})))
    parts[1] = (parts[1][0], f"{parts[1][1]}<p>In the paper: a sixth ({PAPER_RATIO:.3f}).</p>")
    shown = "".join(_example(kind, group) for (_, kind), group in sorted(first.items(), key=lambda one: one[0]))
    title = f"{report['instructions']:,} instructions about {report['images']:,} images; {report['dropped']:,} dropped"
    title += f"; unused responses, to what is gone or has changed: {report['unused']:,}" if "unused" in report else ""
    style = f"{STYLE}.g{{display:flex;flex-wrap:wrap;gap:0 2em}}.e{{display:flex;gap:1em;margin:.8em 0}}.e div{{flex:1}}"
    style += "pre{margin:.2em 0}"
    sections = "".join(f"<section><h2>{escape(name)}</h2>{html}</section>" for name, html in parts)
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><h1>{escape(title)}</h1><div class='g'>{sections}</div><h2>Examples</h2>{shown}</body></html>\n"
    )


def _example(kind: str, group: Sequence[Record]) -> str:
    one = group[0]
    image = open_image(one["images"][0]).copy()
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    image.save(file := BytesIO(), format="JPEG")
    data = base64.b64encode(file.getvalue()).decode()
    texts = [text for one in group for text in (one["prompt"], f"→ {one['response']}")]
    said = "".join(f"<pre>{escape(text)}</pre>" for text in texts)
    about = " · ".join(filter(None, (one.get("domain"), kind, one.get("language"), one.get("licence"))))
    return f"<div class='e'><img alt='' src='data:image/jpeg;base64,{data}'><div><b>{escape(about)}</b>{said}</div></div>"
