"""Everything that can be checked before training, over a whole source."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mpo.data.files import open_files
from mpo.data.formats import check_format
from mpo.data.meta import is_meta, read_meta
from mpo.data.mixing import check_sources, is_mixture, read_mixture, refuse_beside_mixture
from mpo.data_tools.examine import Examined, Examiner, Part, Wanted
from mpo.data_tools.findings import Finding, Tally, findings_table

PIECES_A_WORKER = 8


@dataclass(frozen=True)
class Report:
    """What was found in ``pairs`` pairs of ``lines`` lines. Every finding is a line of the file ``output``."""

    path: str
    lines: int
    pairs: int
    tally: Tally
    output: Path

    @property
    def may_start(self) -> bool:
        """Whether there are pairs, and nothing keeps training from starting."""
        return self.pairs > 0 and not self.tally.problems

    def text(self) -> str:
        """A table for the terminal."""
        listed = sum(self.tally.counts.values())
        where = f" All {listed:,} findings: {self.output}" if listed else ""
        if self.may_start:
            verdict = f"Training may start.{where}"
        elif not self.pairs:
            verdict = f"Training may not start: there is no pair.{where}"
        else:
            verdict = f"Training may not start: {self.tally.problems:,} problems (!).{where}"
        return f"{self.path}: {self.pairs:,} pairs in {self.lines:,} lines\n{findings_table(self.tally)}\n{verdict}"


def validate(
    path: str | Path,
    *,
    format: str | None = None,
    image_root: str | Path | None = None,
    split: str = "train",
    processor: Any = None,
    max_length: int | None = None,
    context: int | None = None,
    evaluation: str | Path | None = None,
    output: str | Path = "bad_records.jsonl",
    workers: int = 1,
) -> Report:
    """Read every record of a source and check it.

    Args:
        path: as of `mpo.data.sources.load_pairs`, as are the next three; or a file of a mixture (`mpo.data.mixing.read_mixture`),
            all of whose sources are read once.
        format: of the records.
        image_root: what picture paths are relative to.
        split: of a data set with several.
        processor: of the model to train, for lengths in tokens and tiles.
        max_length: most tokens of prompt and answer, with a processor.
        context: most tokens that the model takes, with a processor.
        evaluation: another source, whose questions and pictures should not be in this one.
        output: file of the findings; one that is there is replaced.
        workers: processes.

    Raises:
        ValueError: for a source that cannot be opened, and limits without a processor.
    """
    check_format(format)
    if processor is None and (max_length is not None or context is not None):
        raise ValueError("Lengths are counted in a model's tokens: --max-length needs --model.")
    wanted = Wanted(processor, max_length, context)
    parts = _parts(path, format, image_root, split, workers)
    others = None
    if evaluation is not None:
        others = _keys_of(_parts(evaluation, format, image_root, split, workers), workers, f"Reading {evaluation}")
    output = Path(output).expanduser()
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f"{output.name}.{os.getpid()}.partial")
    lines = 0
    examined: list[Examined] = []
    try:
        with aside.open("w", encoding="utf-8") as file:
            tally = Tally(file)
            for piece in _each(parts, wanted, workers, f"Checking {path}"):
                lines += piece.lines
                tally.add(piece.findings)
                piece.findings.clear()
                examined.append(piece)
            tally.add(_over_all(examined, others))
            tally.file = None
        aside.replace(output)
    finally:
        aside.unlink(missing_ok=True)
    return Report(str(path), lines, sum(len(piece.where) for piece in examined), tally, output)


def _parts(path: str | Path, format: str | None, image_root: str | Path | None, split: str, workers: int) -> list[Part]:
    """A source, or all sources of a mixture, in parts."""
    given: list[dict[str, Any]] = [{"path": path, "format": format, "image_root": image_root, "split": split}]
    if is_meta(path):
        given = [source.load for source in check_sources([spec.as_source() for spec in read_meta(path, base=image_root)])]
    elif is_mixture(path):
        refuse_beside_mixture(path, format=format, image_root=image_root)
        given = [source.load for source in check_sources(read_mixture(path)["sources"])]
    parts = []
    for one in given:
        own = str(Path(one["path"]).expanduser())
        pieces = open_files(own, one.get("split") or "train", least_pieces=workers * PIECES_A_WORKER if workers > 1 else 1)
        parts += [Part(piece, _root(own, one.get("image_root")), one.get("format"), one.get("frames")) for piece in pieces]
    return parts


def _root(path: str, image_root: str | Path | None) -> str:
    if image_root is not None:
        return str(Path(image_root).expanduser())
    return path if os.path.isdir(path) else os.path.dirname(path) or "."


def _keys_of(parts: Sequence[Part], workers: int, title: str) -> tuple[np.ndarray, np.ndarray]:
    found = list(_each(parts, Wanted(only_keys=True), workers, title))
    return np.concatenate([piece.prompt for piece in found]), np.concatenate([piece.pictures for piece in found])


def _over_all(examined: Sequence[Examined], others: tuple[np.ndarray, np.ndarray] | None) -> Iterator[Finding]:
    """What is only seen across records: duplicates, and what the evaluation has too."""
    where = [place for piece in examined for place in piece.where]
    if not where:
        return
    pair = np.concatenate([piece.pair for piece in examined])
    _, first, inverse = np.unique(pair, return_index=True, return_inverse=True)
    for index in np.flatnonzero(first[inverse] != np.arange(len(pair))):
        yield Finding("duplicate", where[index], f"the same question, pictures and answers as {where[first[inverse[index]]]}")
    if others is None:
        return
    leaked = np.isin(np.concatenate([piece.prompt for piece in examined]), others[0])
    for index in np.flatnonzero(leaked):
        yield Finding("in eval too", where[index], "the same question with the same pictures is evaluated on")
    starts = np.cumsum([0, *(len(piece.where) for piece in examined)])
    owner = np.concatenate([piece.owner + start for piece, start in zip(examined, starts[:-1], strict=True)])
    shown = np.isin(np.concatenate([piece.pictures for piece in examined]), others[1])
    for index in np.unique(owner[shown]):
        if not leaked[index]:
            yield Finding(
                "picture in eval too", where[index], "one of its pictures or videos is evaluated on, with another question"
            )


_EXAMINER: Examiner | None = None


def _each(parts: Sequence[Part], wanted: Wanted, workers: int, title: str) -> Iterator[Examined]:
    """Every part examined, in order."""
    total = sum(part.piece.size for part in parts)
    workers = min(workers, len(parts))
    with tqdm(total=total, desc=title, unit="", unit_scale=True, disable=None) as bar:
        if workers <= 1:
            examiner = Examiner(wanted)
            for part in parts:
                yield examiner(part)
                bar.update(part.piece.size)
            return
        # Every process counts for itself; the threads of tokenizers would only get in the way of the others.
        before = os.environ.get("TOKENIZERS_PARALLELISM")
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            with ProcessPoolExecutor(workers, initializer=_start, initargs=(wanted,)) as pool:
                for part, examined in zip(parts, pool.map(_examine, parts), strict=True):
                    yield examined
                    bar.update(part.piece.size)
        finally:
            os.environ.pop("TOKENIZERS_PARALLELISM")
            if before is not None:
                os.environ["TOKENIZERS_PARALLELISM"] = before


def _start(wanted: Wanted) -> None:
    global _EXAMINER
    _EXAMINER = Examiner(wanted)


def _examine(part: Part) -> Examined:
    assert _EXAMINER is not None
    return _EXAMINER(part)
