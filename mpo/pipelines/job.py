"""A job: steps over a data set, in a folder that the same command goes on with after any interruption."""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mpo.data.ids import id_hash, refuse_repeated
from mpo.data.paths import regular_file
from mpo.generation.generator import Request, whole_number
from mpo.io import FULL, atomic_write, read_json_object, write_text
from mpo.pipelines.flow import BadStep, Record, finished, log, requests_of, step_names
from mpo.pipelines.ledger import Ledger, content_hash, digestible, json_line, request_hash, requests_in
from mpo.pipelines.part import DROPPED, LEDGERS, OUTPUT, PROGRESS, SHARDS, Part, base_ledger, locked, total
from mpo.pipelines.report import Progress, make_report, page
from mpo.pipelines.step import FILES, Dropped, Step, settings_of, to_record

VERSION = 4
SETTINGS, REPORT, PAGE, IMAGES, MARKS = "job.json", "report.json", "report.html", "images", ".job.marks"
MAX_FAILURES = 20
SHARDS_PER_WORKER = 4
SHOWN_LINES, SHOWN_BYTES = 5, 4000
OF_ANSWER = ("ground_truths", "tolerance", "unit", "kind")
"""What is known of the answer to a question: where it is corrected, what models said to the question stays, and they are asked
again only where its prompt has changed with it."""


class Job:
    """Steps over a data set in a folder.

    The folder holds ``job.json`` (the settings), ``ledger.jsonl`` (every response that was paid for), ``output.jsonl``,
    ``dropped.jsonl`` (each record without an output, with the reason), ``progress.json``, and at the end ``report.json`` and
    ``report.html``. Every record ends in the output or in ``dropped.jsonl``. Output, dropped records and reports are the same
    bytes however often the job was interrupted, and over however many shards and workers it runs; nothing that was paid for is
    asked again, but for the requests on their way at an interruption.

    A job is its steps, their classes and sampling, the records, and the contents of the images that the first step that asks shows,
    wherever these files lie. Records may come, go, change and be in another order: unless they only come after the old ones, the
    output is made again from the ledger, as it is where it was edited, and only requests without a response there are asked.
    Responses to records that are no more stay in the ledger, and the report counts them (``unused``). From the first change on,
    records that ask the same share their responses, whatever their ids: those of lines without an id change with their place.

    Args:
        steps: the steps, in order.
        records: dicts or dataclasses with an ``id``, in something that can be iterated over again: a list, or
            `mpo.data.load_questions`.
        folder: the folder, new or of the same job.
        shards: number of parts that workers take; None for that of the folder, or one (four per worker in `run`). A folder of one
            part is divided when workers go on with it.
        concurrency: the largest number of requests at the same time to each generator, per process; None for its own.
        max_failures: the job stops if so many of its first records fail and none succeeds.
        drop_bad: drop records that cannot be asked about, such as for an image that is gone, instead of refusing the data set.

    Raises:
        ValueError: for records that can be read only once, and without any steps.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        records: Iterable[Any],
        folder: str | Path,
        *,
        shards: int | None = None,
        concurrency: int | None = None,
        max_failures: int = MAX_FAILURES,
        drop_bad: bool = False,
    ) -> None:
        if isinstance(records, Iterator):
            raise ValueError(
                "The records can be read only once, and a job reads them several times. Give a list, or load_questions."
            )
        self.names = step_names(steps)
        self.steps, self.records, self.folder = list(steps), records, Path(folder).absolute()
        self.drop_bad, self.max_failures = drop_bad, whole_number("max_failures", max_failures)
        self.shards = whole_number("shards", shards, optional=True)
        self.concurrency = whole_number("concurrency", concurrency, optional=True)
        self.count = self.divided = 0
        self._base: list[Ledger | None] = []
        self._asks = any(step.generator is not None for step in self.steps)

    def run(self, *, workers: int = 1, retry_dropped: bool = False, progress: bool = True) -> dict[str, Any]:
        """Run the job, or go on with it.

        Args:
            workers: number of processes on this machine, which take shards.
            retry_dropped: try the records again that were dropped.
            progress: show how far it is.

        Returns:
            the report (`report.json`), and what was ``spent`` in all runs: requests (those that find out about a server included),
            tokens and, if prices are known, the cost; ``unknown`` and ``lost`` are as in `mpo.generation.generator.Usage`. Requests
            that were on their way when a process was killed, `concurrency` at most each time, are in none of them.

        Raises:
            ValueError: for another job's folder, naming both values of each setting; for records none of which was there before,
                if models are asked; for bad records; if everything fails.
            InUse: if another process works in the folder.
            ConnectionError: for a server that cannot be used.
            OSError: for a full disk; the same command goes on.
            KeyboardInterrupt: after Ctrl-C, when the responses on their way have come; the same command goes on.
        """
        whole_number("workers", workers)
        try:
            with locked(self.folder, "job"):
                self.prepare(workers)
                if retry_dropped:
                    for part in self.parts():
                        if part.progress()["counts"].get("dropped"):
                            part.forget()
                    self._drop_reports()
                if workers > 1:
                    from mpo.pipelines.scale import run_local

                    run_local(self, workers, progress=progress)
                else:
                    self._run_parts(progress)
                return self.finish()
        except KeyboardInterrupt:
            log.warning("Interrupted. All responses received are in %s; run the same command to continue.", self.folder)
            raise
        except OSError as error:
            if error.errno not in FULL:
                raise
            reason = f"{error.strerror}. All responses received are kept. Free some space, and run the same command to continue"
            raise OSError(error.errno, reason, error.filename or str(self.folder)) from error

    def _run_parts(self, progress: bool) -> None:
        finished = [part.progress() for part in self.parts()]
        bar = Progress(self.count, sum(one["records"] for one in finished), show=progress)
        try:
            for number in range(len(finished)):

                def show(now: dict[str, Any], number: int = number) -> None:
                    finished[number] = now
                    bar.update(*total(finished))

                self.run_part(number, show)
        finally:
            bar.close()

    def prepare(self, workers: int = 1) -> None:
        """Check the settings and all records before anything is paid for, and write `job.json`. Errors are those of `run`."""
        path, self._base = self.folder / SETTINGS, []
        before = read_json_object(path) if path.exists() else None
        known = before["steps"] if before else {}
        steps = {name: settings_of(step, known.get(name)) for name, step in zip(self.names, self.steps, strict=True)}
        own = {"version": VERSION, "order": self.names, "steps": steps}
        several = SHARDS_PER_WORKER * workers
        if before is not None:
            there = before.get("shards")
            self._refuse_others(before, {**own, "shards": there if self.shards is None else self.shards})
            if workers > 1 and self.shards == 1:
                raise ValueError(f"shards=1 is one part, which {workers} workers cannot share. Leave shards out.")
            self.shards = several if workers > 1 and there == 1 else there  # which find the responses of the one part
        else:
            self.shards = (several if workers > 1 else 1) if self.shards is None else self.shards
            left = [one for one in self.folder.iterdir() if not one.name.startswith(".job.")]
            if left:
                raise ValueError(f"{self.folder} holds {left[0].name} and no {SETTINGS}, so it is not a job. Give another folder.")
        marks, records, moved = self._check_records(before, steps)
        self.count = self.divided = len(marks)
        if before is not None and there == self.shards:
            self.divided = self.count if moved else before.get("divided", before["records"]["number"])  # or the last takes the new
        own |= {"shards": self.shards, "records": records, "divided": self.divided}
        if before is not None:
            own |= {"changed": True} if moved or before.get("changed") else {}
            if there != self.shards:
                (self.folder / PROGRESS).unlink(missing_ok=True)
            for part in self.parts():
                if moved:
                    part.forget(share=True)
                elif part.finished:
                    part.check()
            self._drop_reports()
        write_text(path, json.dumps(own, indent=1) + "\n", durable=True)
        with atomic_write(self.folder / MARKS, "wb", durable=True) as written:
            written.write(marks.tobytes())

    def _drop_reports(self) -> None:
        """Remove the reports of an output that is made again or goes on: after a kill, no report is of another output."""
        if not all(part.finished for part in self.parts()):
            for name in (REPORT, PAGE):
                (self.folder / name).unlink(missing_ok=True)

    def changed(self) -> bool:
        """Whether the records are others than those of the folder, or in other places; no model is needed. Errors as in `run`."""
        if not (self.folder / SETTINGS).is_file():
            return True
        before = read_json_object(self.folder / SETTINGS)
        return bool(self._check_records(before, before["steps"])[1] != before["records"])

    def _refuse_others(self, before: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        there, here = _flat(before), _flat(own)
        wrong = [name for name in here if there.get(name) != here[name]]
        wrong += [name for name in there if name.startswith("steps.") and name not in here]
        if "order" in wrong:  # not every setting of a step that is only here or there
            both = tuple(f"steps.{name}." for name in self.names if name in before["order"])
            wrong = [name for name in wrong if not name.startswith("steps.") or name.startswith(both)]
        if wrong:
            listed = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} now" for name in wrong[:SHOWN_LINES])
            listed += f"; and {len(wrong) - SHOWN_LINES} more" if len(wrong) > SHOWN_LINES else ""
            raise ValueError(f"{self.folder} belongs to another job: {listed}. Give the same settings, or another folder.")

    def _check_records(self, before: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any], bool]:
        """Look at all records and their files, and compare them with those in the `job.json` before.

        Returns `_marks` of each record, shape (number, 2), what `job.json` says about the records, and whether the output is made
        again, because those before are others now, or in other places.
        """
        size = before["records"]["number"] if before else 0
        file = self.folder / MARKS
        known = np.fromfile(file, np.uint64) if file.is_file() else np.empty(0, np.uint64)
        known = known[: len(known) // 2 * 2].reshape(-1, 2)
        if before is None or _contents(known) != before["records"]["contents"]:  # gone or edited: all files are read
            known = known[:0]
        ids, marks, digest = array("Q"), array("Q"), hashlib.blake2b(digest_size=16)
        bad: list[str] = []
        first = digest.hexdigest()
        for place, record in enumerate(self._read()):
            ids.append(id_hash(record["id"]))
            digest.update(line := json_line(record, digestible))
            first = digest.hexdigest() if place + 1 == size else first
            try:
                marks.extend(self._marks(record, line, known[place : place + 1]))
            except BadStep:
                raise
            except ValueError as error:
                bad.append(f"{record['id']!r}: {error}" if len(bad) < SHOWN_LINES else "")
                marks.extend((0, 0))
        refuse_repeated(ids, ((f"record {place}", record["id"]) for place, record in enumerate(self._read())))
        if not marks:
            raise ValueError("The data set has no records.")
        if bad and not self.drop_bad:
            listed = "\n  ".join(filter(None, bad))
            raise ValueError(
                f"{len(bad)} of {len(ids)} records give no request:\n  {listed}\nFix them, or drop them (drop_bad=True, "
                "or --drop-bad)."
            )
        found = np.frombuffer(marks, np.uint64).reshape(-1, 2).copy()
        same = first == (before or {}).get("records", {}).get("digest")
        if same and len(known):
            found[:size, 0] = np.where(found[:size, 0] == 0, known[:, 0], found[:size, 0])  # gone now, and still answered
        own = {"number": len(found), "digest": digest.hexdigest(), "contents": _contents(found)}
        moved = before is not None and not (same and _contents(found[:size]) == before["records"]["contents"])
        lost = np.count_nonzero(~np.isin(known[:, 0], found[:, 0]))
        if moved and lost == len(known) and self._asks and not self._answered(settings):
            name = next(iter(self._read()))["id"]
            raise ValueError(
                f"{self.folder} belongs to other records: none of its {size} is among these {len(found)} ({name!r}, ...), so that "
                "all of them would be asked again. Give the file of those records, changed as you like, or another folder."
            )
        if moved and lost:
            log.warning("%s: %d of %d records are gone or have changed since the last run.", self.folder, lost, size)
        return found, own, moved

    def _marks(self, record: Record, line: bytes, known: Any) -> tuple[int, int]:
        """A hash of a record with what its images and videos contain, wherever they are, without its id and `OF_ANSWER`.

        And one of all of it with their sizes and times: where this one is `known`, they are not read again.
        """
        shown = self._check(record)
        lists = (record.get(name) for name in FILES)  # of any kind, where records are kept as they are
        mine = [file for found in lists if isinstance(found, list) for file in found if isinstance(file, str)]
        mine = [*filter(os.path.exists, mine)]
        look = id_hash(f"{line!r} {[content_hash(file, read=False) for file in (*shown, *mine)]}")  # shown may be pixels
        if len(known) and int(known[0, 1]) == look and known[0, 0]:
            return int(known[0, 0]), look
        has_files = any(name in record for name in FILES) or bool(shown)  # their contents, wherever they are
        files = {"": [content_hash(file) for file in shown]} if has_files else {}
        left_out = {"id", *OF_ANSWER, *(FILES if files else ())}
        rest = {name: value for name, value in record.items() if name not in left_out}
        return id_hash(json_line({**rest, **files}, digestible).decode()) or 1, look

    def _answered(self, settings: Mapping[str, Any]) -> bool:
        kept = requests_in([*self.folder.glob(LEDGERS), *self.folder.glob(f"{SHARDS}/*/{LEDGERS}")])
        asked_with = next(one for one in _asked_with(settings).values() if one["generator"] is not None)
        for record in self._read() if kept else ():
            with suppress(ValueError):  # of a file that is gone
                if any(request_hash(request, asked_with) in kept for request in self._first_requests(record)):
                    return True
        return not kept

    def _first_requests(self, record: Record) -> list[Request]:
        current = [record]
        for step in self.steps if self._asks else ():
            try:
                if step.generator is not None:
                    return [request for one in current for request in requests_of(step, one)]
                current = [output for one in current for output in finished(step, one, ())]
            except Dropped:
                break
        return []

    def _check(self, record: Record) -> list[Any]:
        files = [file for request in self._first_requests(record) for file in (*request.images, *request.videos)]
        for file in files:
            if isinstance(file, str | os.PathLike) and not os.path.isdir(file):
                regular_file(file, str(file), "image")
        return files

    def _read(self) -> Iterator[Record]:
        return (to_record(given, place) for place, given in enumerate(self.records))

    def parts(self) -> list[Part]:
        """The parts of a job that is prepared."""
        if not self.count:  # in another process
            before = read_json_object(self.folder / SETTINGS)
            self.count, self.shards, self.divided = before["records"]["number"], before["shards"], before.get("divided", 0)
        images, shards = self.folder / IMAGES, self.shards or 1
        if shards == 1:
            return [Part(self.folder, self.count, images)]
        bounds = self._bounds()
        folders = [self.folder / SHARDS / f"{number:05d}" for number in range(shards)]
        return [
            Part(folder, end - start, images, last=folder is folders[-1])
            for folder, start, end in zip(folders, bounds, bounds[1:], strict=False)
        ]

    def _bounds(self) -> list[int]:
        shards = self.shards or 1
        return [*((self.divided or self.count) * number // shards for number in range(shards)), self.count]

    def run_part(self, number: int, show: Any = lambda progress: None) -> None:
        """Run one part. Raises as `run`, and InUse if another process works on it."""
        parts = self.parts()
        start, job = self._bounds()[number], read_json_object(self.folder / SETTINGS)
        shared = job.get("changed", False)
        if len(parts) > 1 and not self._base:
            self._base = [base_ledger(self.folder, shared=shared)]  # read once, for all parts
        parts[number].run(
            self.steps,
            islice(self._read(), start, start + parts[number].size),
            asked_with=_asked_with(job["steps"]),
            base=self._base[0] if self._base else None,
            shared=shared,
            concurrency=self.concurrency,
            max_failures=self.max_failures,
            proven=lambda: any(part.progress()["records"] for part in parts),
            show=show,
        )

    def finish(self) -> dict[str, Any]:
        """Put the parts together, and write the reports. Raises RuntimeError if a part is not finished."""
        parts = self.parts()
        progress = [part.progress() for part in parts]
        counts, spent = total(progress)
        if not counts["records"] == counts["output"] + counts["dropped"] == self.count:
            raise RuntimeError(
                f"Of {self.count} records, {counts['output']} are in the output and {counts['dropped']} are dropped."
            )
        if len(parts) > 1:
            for name in (OUTPUT, DROPPED):
                with atomic_write(self.folder / name, "wb", durable=True) as whole:
                    for part in filter(lambda part: part.size, parts):
                        with open(part.folder / name, "rb") as file:
                            shutil.copyfileobj(file, whole)
        used = np.unique(np.concatenate([np.frombuffer(part.used(), np.uint64) for part in parts if part.size]))
        unused = sum(one["kept"] for one in progress if one["records"]) - len(used)
        report = make_report(counts, self.names) | ({"unused": unused} if unused > 0 else {})
        settings = read_json_object(self.folder / SETTINGS)
        for name in ("shards", "divided", "changed"):
            settings.pop(name, None)
        write_text(self.folder / PAGE, page(report, settings, *(self._first(name) for name in (OUTPUT, DROPPED))))
        write_text(self.folder / REPORT, json.dumps(report, indent=1) + "\n", durable=True)
        return {**report, "spent": {name: round(value, 9) for name, value in spent.items()}}  # a sum in any order

    def _first(self, name: str) -> list[bytes]:
        with open(self.folder / name, "rb") as file:
            return [line[:SHOWN_BYTES] for line in islice(file, SHOWN_LINES)]


def _asked_with(steps: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {what: one.get(what) for what in ("generator", "sampling")} for name, one in steps.items()}


def _contents(marks: Any) -> str:
    return hashlib.blake2b(marks[:, 0].tobytes(), digest_size=16).hexdigest()


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    return {inner: one for key in value for inner, one in _flat(value[key], f"{name}.{key}" if name else str(key)).items()}
