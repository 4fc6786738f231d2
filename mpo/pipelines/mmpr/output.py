"""Write pairs as MMPR does: an annotation file per source and kind of pair, ``meta.json``, and a report with a page."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from html import escape
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mpo.data.images import open_image
from mpo.data.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo.figure import small_url
from mpo.io import atomic_write, json_line, read_json_object, write_text
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.mmpr.config import file_name
from mpo.pipelines.report import count_reason, page

META, REPORT, PAGE, DROPPED, LINES = "meta.json", "report.json", "report.html", "dropped.jsonl", "annotations"
WRITTEN = (META, REPORT, PAGE, DROPPED, LINES, "jobs", "trl", "swift", "run")
NAMES = ".annotations"
"""Lists the files of pairs that may be there, one a line, while they are written and META is not there."""
PLACEHOLDER = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}|<IMG_CONTEXT>")
"""What a model may write and no reader of the data takes in a response: it stands for an image."""
LARGE, OF_LARGE, LONGEST = 500_000, 3, 1_200_000
"""A file of more lines than `LARGE` has `OF_LARGE` pairs of a question at most; one of more than `LONGEST` is split."""
SHOWN, SIDE = 8, 320
"""Pairs on the page, and the size of their images, in pixels."""
COUNTED = ("questions", "with pairs", "without pairs", "responses", "pairs made", "pairs")
"""Counts that every row of the report has, also where they are 0."""
ENDINGS = {"wrong_answer": "pairs_vqa_correctness_rules", "wrong_format": "pairs_vqa_format_rules"}


class Output:
    """The folder of a data set in MMPR's form, and in the formats ``trl`` and ``swift`` (ms-swift); `close` completes its files."""

    def __init__(self, folder: Path, formats: Sequence[str] = ()) -> None:
        self.folder, self.formats = folder.absolute(), formats
        (self.folder / LINES).mkdir(parents=True, exist_ok=True)
        self.sources: dict[str, Counter[str]] = {}
        self._files: dict[str, _File] = {}
        self._seen: set[str] = set()
        self._dropped: list[dict[str, Any]] = []
        self._shown: list[dict[str, Any]] = []

    def paired(self, record: Mapping[str, Any], pairs: list[dict[str, Any]], name: str = "pairs", tiles: int | None = None) -> None:
        """Add a question and its pairs, with absolute paths of images, and the name and the tile limit of its source."""
        source, counts = self._count(record, name, "with pairs")
        groups: dict[str, list[dict[str, Any]]] = {}
        for pair in pairs:
            counts["pairs made"] += 1
            key = content_hash(
                json.dumps([pair.get(name) for name in ("images", "videos", "question", "chosen", "rejected")]).encode()
            )
            strays = any(PLACEHOLDER.search(pair[side]) for side in ("chosen", "rejected"))
            if strays or key in self._seen:
                counts[f"pairs left out/{'placeholder' if strays else 'duplicate'}"] += 1
                continue
            self._seen.add(key)
            negative = pair["rejected_meta"]["negative"]
            groups.setdefault(f"{source}_{ENDINGS.get(negative, f'prefix_pair_{negative}')}", []).append(pair)
        for name, own in groups.items():
            if name in self._files and self._files[name].tiles != tiles:  # of another source of the configuration
                name = f"{name}_{tiles or 'any'}_tiles"
            if name not in self._files:
                self._files[name] = _File(self.folder / LINES / f".{name}", source, tiles)
            self._files[name].add(own)

    def dropped(self, record: Mapping[str, Any], step: str, reason: str, name: str = "pairs") -> None:
        """Add a question without pairs."""
        source, counts = self._count(record, name, "without pairs")
        count_reason(counts, "without pairs", reason)
        self._dropped.append({"id": record["id"], "source": source, "step": step, "reason": reason})

    def _count(self, record: Mapping[str, Any], name: str, place: str) -> tuple[str, Counter[str]]:
        source = file_name(record.get("source") or name)
        counts = self.sources.setdefault(source, Counter(dict.fromkeys(COUNTED, 0)))
        counts.update(["questions", place])
        for one in record.get("responses", ()):
            counts.update(["responses", f"responses/{one.get('verdict') or 'not judged'}"])
        return source, counts

    def close(self, settings: Mapping[str, Any], jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Write everything, and return the report, of the reports of the jobs, each with its name as ``job``.

        Raises ValueError if there are no pairs, with the reasons; the report is written, and there is no ``meta.json``.
        """
        before = {*read_json_object(self.folder / META)} if (self.folder / META).is_file() else set[str]()
        before |= {*(self.folder / NAMES).read_text().splitlines()} if (self.folder / NAMES).is_file() else set()
        planned = {_part(name, number) for name, file in self._files.items() for number in range(-(-file.lines // LONGEST))}
        write_text(self.folder / NAMES, "\n".join(sorted(before | planned)), durable=True)
        for name in (META, REPORT, PAGE):  # of other files, and after a kill of none
            (self.folder / name).unlink(missing_ok=True)
        meta = {part: entry for name, file in sorted(self._files.items()) for part, entry in self._write(name, file)}
        for form in (LINES, "trl", "swift"):  # nothing stays of pairs that are no more
            for part in before if form not in (LINES, *self.formats) else before - {*meta}:
                (self.folder / form / f"{part}.jsonl").unlink(missing_ok=True)
        with atomic_write(self.folder / DROPPED) as written:
            written.writelines(map(json_line, self._dropped))
        total, spent = Counter(dict.fromkeys(COUNTED, 0)), Counter[str]()
        for counts in self.sources.values():
            total.update(counts)
        for job in jobs:
            spent.update(job["spent"])
        rows = [{"source": name, **_arranged(counts)} for name, counts in (("all", total), *sorted(self.sources.items()))]
        report = {"questions": total["questions"], "pairs": total["pairs"], "spent": {**spent}, "sources": rows, "jobs": list(jobs)}
        unused = sum(job.get("unused", 0) for job in jobs)  # responses to questions that are gone or have changed
        report |= {"unused": unused} if unused else {}
        shown = {"records": total["questions"], "output": total["with pairs"], "dropped": total["without pairs"]}
        tables = [
            rows[0] | {name: report[name] for name in ("spent", "unused") if name in report},
            *rows[1:],
            *({"job": job["job"], **step} for job in jobs for step in job["steps"]),
        ]
        html = page({**shown, "steps": tables}, settings, (), ())
        write_text(self.folder / PAGE, html.replace("</body>", f"<h2>Pairs</h2>{''.join(map(_article, self._shown))}</body>"))
        write_text(self.folder / REPORT, json.dumps(report, indent=1) + "\n")
        if not meta:
            (self.folder / NAMES).unlink()
            reasons = ", ".join(f"{count}: {reason}" for reason, count in rows[0].get("without pairs: reason", {}).items())
            raise ValueError(
                f"No pairs of {total['questions']} questions: {reasons}. See {self.folder / PAGE}. Other rules, such as "
                "another format, judge the same responses again, and nothing is asked again."
            )
        write_text(self.folder / META, json.dumps(meta, indent=1) + "\n", durable=True)
        (self.folder / NAMES).unlink()
        return report

    def _write(self, name: str, file: _File) -> Iterator[tuple[str, dict[str, Any]]]:
        root = os.path.commonpath(file.roots) if file.roots else str(self.folder)
        near = os.path.relpath(root, self.folder) if Path(root).is_relative_to(self.folder) else root
        counts, number = self.sources[file.source], 0
        pairs = file.read(counts)
        while (following := next(pairs, None)) is not None:
            part, length = _part(name, number), 0
            with ExitStack() as stack:
                lines = stack.enter_context(atomic_write(self.folder / LINES / f"{part}.jsonl", durable=True))
                others = [(form, stack.enter_context(atomic_write(self.folder / form / f"{part}.jsonl"))) for form in self.formats]
                for pair in chain([following], islice(pairs, LONGEST - 1)):
                    lines.write(json_line(mmpr_line(pair, root)))
                    for form, other in others:
                        other.write(json_line((trl_line if form == "trl" else swift_line)(pair)))
                    counts.update({"pairs": 1, f"pairs/{pair['rejected_meta']['negative']}": 1})
                    counts.update({f"{side} characters": len(pair[side]) for side in ("chosen", "rejected")})
                    if len(self._shown) < SHOWN and pair["id"].endswith("/0"):
                        self._shown.append(pair)
                    length += 1
            entry = {"root": near, "annotation": f"{LINES}/{part}.jsonl", "data_augment": False, "repeat_time": 1, "length": length}
            yield part, entry | ({} if file.tiles is None else {"max_dynamic_patch": file.tiles})
            number += 1


def _part(name: str, number: int) -> str:
    return f"{name}_{number:03d}" if number else name


class _File:
    """The pairs of a file, before it is known how many there are and where their images lie: a line for each question."""

    def __init__(self, path: Path, source: str, tiles: int | None) -> None:
        self.path, self.source, self.tiles = path, source, tiles
        self.lines, self.roots = 0, set[str]()
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115

    def add(self, pairs: list[dict[str, Any]]) -> None:
        self._file.write(json_line(pairs))
        self.lines += len(pairs)
        self.roots |= {os.path.dirname(path) for pair in pairs for path in (*pair.get("images", ()), *pair.get("videos", ()))}

    def read(self, counts: Counter[str]) -> Iterator[dict[str, Any]]:
        self._file.close()
        with open(self.path, encoding="utf-8") as lines:
            for line in lines:
                pairs = json.loads(line)
                if self.lines > LARGE and len(pairs) > OF_LARGE:
                    counts["pairs left out/large file"] += len(pairs) - OF_LARGE
                    pairs = random.Random(pairs[0]["id"]).sample(pairs, OF_LARGE)
                yield from pairs
        self.path.unlink()


def mmpr_line(pair: Mapping[str, Any], root: str) -> dict[str, Any]:
    """A line of MMPR: paths are relative to `root`, a single one is no list, and images in front have no placeholders."""
    shown = {"image": pair.get("images"), "video": pair.get("videos")}
    paths = {name: [os.path.relpath(path, root) for path in files] for name, files in shown.items() if files}
    rest = {name: value for name, value in pair.items() if name not in ("images", "videos", "source", "input_id")}
    bare = re.sub("^(<image>\n)+|^(<video>\n)+", "", pair["question"])
    rest |= {} if re.search("<(image|video)>", bare) else {"question": bare}
    return {"id": rest.pop("id"), **{name: files if len(files) > 1 else files[0] for name, files in paths.items()}, **rest}


def trl_line(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A line with TRL's columns, in which images are parts of the prompt."""
    parts = [
        {"type": part[1:6]} if part in ("<image>\n", "<video>\n") else {"type": "text", "text": part}
        for part in re.split("(<image>\n|<video>\n)", pair["question"])
        if part
    ]
    shown = {name: pair[name] for name in ("images", "videos") if name in pair}
    prompt = [*_system(pair, lambda text: [{"type": "text", "text": text}]), {"role": "user", "content": parts}]
    sides = {side: [{"role": "assistant", "content": [{"type": "text", "text": pair[side]}]}] for side in ("chosen", "rejected")}
    return {"id": pair["id"], **shown, "prompt": prompt, **sides}


def swift_line(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A line with ms-swift's columns, in which ``<image>`` is a placeholder."""
    turns = [{"role": "user", "content": pair["question"]}, {"role": "assistant", "content": pair["chosen"]}]
    shown = {name: pair[name] for name in ("images", "videos") if name in pair}
    return {"messages": [*_system(pair, str), *turns], "rejected_response": pair["rejected"], **shown}


def _system(pair: Mapping[str, Any], content: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": content(pair["system"])}] if "system" in pair else []


def _arranged(counts: Counter[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    judged = sum(counts[f"responses/{verdict}"] for verdict in ("correct", "wrong_answer", "wrong_format"))
    for name, value in sorted(counts.items()):
        outer, _, inner = name.partition("/")
        kind, of_kind, last = inner.rpartition("/")
        if inner:
            row.setdefault(f"{outer}: {kind.partition('/')[0]}" if of_kind else f"{outer} by kind", {})[last] = value
        else:
            row[name] = round(value / counts["pairs"], 1) if name.endswith("characters") else value
    return row | ({"accuracy": round(counts["responses/correct"] / judged, 4)} if judged else {})


def _article(pair: Mapping[str, Any]) -> str:
    shown = "".join(f"<img alt='' src='{small_url(open_image(path), SIDE)}'>" for path in pair.get("images", ()))
    texts = ((name, str(pair.get(name, ""))) for name in ("question", "answer_gt", "chosen", "rejected"))
    return f"<h3>{escape(pair['id'])}</h3>{shown}" + "".join(
        f"<b>{name}</b><pre>{escape(text)}</pre>" for name, text in texts if text
    )
