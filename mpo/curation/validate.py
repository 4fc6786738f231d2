"""Check a whole source before training."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any
from unittest import mock

import numpy as np
from tqdm.auto import tqdm

from mpo.curation.dedupe import repeated
from mpo.curation.examine import NOTES, PROBLEMS, Examined, Examiner, Finding, Part
from mpo.data.files import open_files
from mpo.data.formats import check_format
from mpo.data.load import kind_of_source
from mpo.data.mixture_file import check_sources, checked_names, has_sources, read_mixture
from mpo.data.records import KINDS, Reading
from mpo.data.sources import folder_of
from mpo.data.video import checked_frames
from mpo.io import atomic_write, json_line

SHARDS_PER_WORKER = 8
WIDEST = 300
"""Maximum characters of an example's reason in the table."""


@dataclass
class Report:
    """The findings in ``pairs`` pairs of ``lines`` lines. Every finding is a line of the file ``output``.

    ``counts`` has the number of findings of each kind, ``examples`` the first one; ``unused`` has the fields that are metadata
    because their format does not use them, each with the number of its lines; ``refused`` those that may be something the model
    should see, each with the number of lines refused for it.
    """

    path: str
    output: Path
    unit: str = "pairs"
    lines: int = 0
    pairs: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Finding] = field(default_factory=dict)
    unused: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, findings: Iterable[Finding], file: IO[str]) -> None:
        """Count findings and write them to the file."""
        for one in findings:
            self.counts[one.kind] += 1
            self.examples.setdefault(one.kind, one)
            line = {"where": one.where, "reason": one.reason, "finding": one.kind, "problem": one.kind in PROBLEMS}
            file.write(json_line(line))

    @property
    def problems(self) -> int:
        """Number of findings that prevent training."""
        return sum(self.counts[kind] for kind in PROBLEMS)

    @property
    def may_start(self) -> bool:
        """Whether there are pairs and no findings that prevent training."""
        return self.pairs > 0 and not self.problems

    def text(self) -> str:
        """Format the report as a table for a terminal."""
        listed = self.counts.total()
        where = f" {'All ' * (listed > 1)}{_counted(listed, 'finding')}: {self.output}" if listed else ""
        why = f"there are no {self.unit}" if not self.pairs else f"{_counted(self.problems, 'problem')} (!)"
        verdict = "Training may start." if self.may_start else f"Training may not start: {why}."
        lines = [f"{self.path}: {self.pairs:,} {self.unit} in {self.lines:,} lines", self._table()]
        for what, fields in (("only metadata", self.unused), ("refused", self.refused)):
            if fields:
                lines.append(f"Fields that are {what}: " + ", ".join(f"{name} ({fields[name]:,})" for name in sorted(fields)))
        return "\n".join([*lines, f"{verdict}{where}"])

    def _table(self) -> str:
        kinds = [kind for kind in (*PROBLEMS, *NOTES) if kind in self.counts]
        if not kinds:
            return "  nothing found"
        name, count = max(map(len, kinds)), max(len(f"{self.counts[kind]:,}") for kind in kinds)
        lines = []
        for kind in kinds:
            example = self.examples[kind]
            reason = example.reason if len(example.reason) <= WIDEST else example.reason[: WIDEST - 3] + "..."
            flag = "!" if kind in PROBLEMS else " "
            lines.append(f"  {flag} {kind:<{name}}  {self.counts[kind]:>{count},}  {example.where}: {' '.join(reason.split())}")
        return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def validate(
    path: str | Path,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    split: str = "train",
    frames: Mapping[str, Any] | None = None,
    metadata: Sequence[str] | None = None,
    processor: Any = None,
    max_length: int | None = None,
    context: int | None = None,
    evaluation: str | Path | None = None,
    output: str | Path = "bad_records.jsonl",
    workers: int = 1,
) -> Report:
    """Check every record of a source.

    Args:
        path, format, image_root, split, frames, metadata: as in `load_preferences`; of a mixture, each source is read once.
        processor: processor of the model to train, for lengths in tokens and tiles.
        max_length: maximum tokens of prompt and completion; needs a processor.
        context: maximum tokens of the model; needs a processor.
        evaluation: another source, whose questions and images should not be in this one. Its invalid lines are reported too; its
            images are not decoded.
        output: file of the findings; an existing file is replaced.

    Raises:
        ValueError: for a source that cannot be opened, and for limits without a processor.
    """
    kind = kind_of_source(path, split, format=format)
    check_format(format, KINDS[kind].formats)
    if processor is None and (max_length is not None or context is not None):
        raise ValueError("--max-length needs --model, since lengths are counted in the model's tokens. Add --model.")
    examiner = partial(Examiner, processor, max_length, context, conversations=kind == "conversation")
    checked_frames(frames)
    own = {"kind": kind, "frames": frames, "metadata": checked_names(metadata)}
    settings = {"format": format, "image_root": image_root, "split": split, **own}
    parts = _parts({**settings, "path": path}, workers)
    evaluated: list[Examined] = []
    if evaluation is not None:
        others = _parts({**settings, "path": evaluation}, workers)
        evaluated = list(_each(others, partial(Examiner, only_keys=True), workers, f"Reading {evaluation}"))
    report = Report(str(path), Path(output).expanduser(), f"{kind}s")
    examined: list[Examined] = []
    with atomic_write(report.output) as file:
        for shard in _each(parts, examiner, workers, f"Checking {path}"):
            report.lines += shard.lines
            report.pairs += len(shard.where)
            report.unused += shard.unused
            report.refused += shard.refused
            report.add(shard.findings, file)
            shard.findings.clear()
            examined.append(shard)
        for shard in evaluated:
            report.add(shard.findings, file)
        if evaluation is not None and not any(shard.where for shard in evaluated):
            report.add([Finding("no pair", str(evaluation), "the evaluation file has no pairs")], file)
        report.add(_over_all(examined, evaluated), file)
    return report


def _parts(source: Mapping[str, Any], workers: int) -> list[Part]:
    """Return the shards of a source, or of all sources of a mixture; arguments as in `load_preferences`."""
    path, image_root = os.path.expanduser(source["path"]), source.get("image_root")
    if has_sources(path):
        shared = {name: source.get(name) for name in ("format", "frames", "tiles", "metadata", "kind")}
        inner = check_sources(read_mixture(path, base=image_root)["sources"])
        return [part for one in inner for part in _parts({**shared, **one.load}, workers)]
    shards = open_files(path, source.get("split") or "train", min_shards=workers * SHARDS_PER_WORKER if workers > 1 else 1)
    root = os.path.expanduser(image_root) if image_root else folder_of(path)
    kind = "chosen" if source.get("from_preferences") else source.get("kind") or "pair"
    reading = Reading(root, source.get("format"), metadata=tuple(source.get("metadata") or ()), kind=kind)
    return [Part(shard, reading, source.get("frames"), source.get("tiles")) for shard in shards]


def _over_all(examined: Sequence[Examined], evaluated: Sequence[Examined]) -> Iterator[Finding]:
    where = [place for shard in examined for place in shard.where]
    if not where:
        return
    for place, same_as in repeated(np.concatenate([shard.pair for shard in examined])):
        yield Finding("duplicate", where[place], f"the same question, images and completions as {where[same_as]}")
    if not evaluated:
        return
    leaked = np.isin(np.concatenate([shard.prompt for shard in examined]), np.concatenate([shard.prompt for shard in evaluated]))
    for index in np.flatnonzero(leaked):
        yield Finding("in eval too", where[index], "the evaluation file has the same question with the same images")
    starts = np.cumsum([0, *(len(shard.where) for shard in examined)])
    owner = np.concatenate([shard.owner + start for shard, start in zip(examined, starts[:-1], strict=True)])
    shown = np.isin(np.concatenate([shard.images for shard in examined]), np.concatenate([shard.images for shard in evaluated]))
    for index in np.unique(owner[shown]):
        if not leaked[index]:
            reason = "the evaluation file has one of its images or videos, with another question"
            yield Finding("image in eval too", where[index], reason)


_EXAMINER: Examiner | None = None


def _each(parts: Sequence[Part], make: Callable[[], Examiner], workers: int, title: str) -> Iterator[Examined]:
    total = sum(part.shard.size for part in parts)
    workers = min(workers, len(parts))
    with tqdm(total=total, desc=title, unit="", unit_scale=True, disable=None) as bar, ExitStack() as stack:
        found: Iterator[Examined]
        if workers <= 1:
            found = map(make(), parts)
        else:
            # Each process tokenises on its own; the tokenizers' threads would only compete with the other processes.
            stack.enter_context(mock.patch.dict(os.environ, TOKENIZERS_PARALLELISM="false"))
            pool = stack.enter_context(ProcessPoolExecutor(workers, initializer=_init_worker, initargs=(make,)))
            found = pool.map(_examine, parts)
        for part, examined in zip(parts, found, strict=True):
            yield examined
            bar.update(part.shard.size)


def _init_worker(make: Callable[[], Examiner]) -> None:
    global _EXAMINER
    _EXAMINER = make()


def _examine(part: Part) -> Examined:
    assert _EXAMINER is not None
    return _EXAMINER(part)
