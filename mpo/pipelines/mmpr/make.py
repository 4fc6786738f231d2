"""MMPR from a configuration: sample, verify, pair, or continue where no answer is known, in a folder that goes on after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from mpo.data import load_questions
from mpo.data.ids import id_hash
from mpo.data.questions import BAD
from mpo.generation.generator import Generator, is_server
from mpo.io import bad_record, parse_json, read_json_object, write_text
from mpo.pipelines.flow import log
from mpo.pipelines.job import SETTINGS, Job
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.mmpr.config import Config, Model, Sampling, Source, Verifying
from mpo.pipelines.mmpr.continuation import Continue
from mpo.pipelines.mmpr.output import META, REPORT, WRITTEN, Output
from mpo.pipelines.mmpr.pair import Pair
from mpo.pipelines.mmpr.sample import Sample
from mpo.pipelines.mmpr.verify import Verify, unanswerable, verified
from mpo.pipelines.part import DROPPED, OUTPUT, locked
from mpo.pipelines.step import Dropped, Record, Step
from mpo.schema import Question

TRAINED = "trained"
"""In the folder of a round whose model is trained: what of the configuration made it."""


class Records:
    """The records that a job has written, by its folder (the file `name` in it) or the file; read anew each time.

    Paths become absolute. With `as_shown`, images and videos that are not those that the model was shown (`Sample`) are refused.
    """

    def __init__(self, path: str | Path, name: str = OUTPUT, *, as_shown: bool = False) -> None:
        self._looked: set[int] | None = set() if as_shown else None
        self.path = (Path(path) / name if Path(path).is_dir() else Path(path)).absolute()
        if not self.path.is_file():
            raise ValueError(f"There is no file {self.path}. Give the --output folder of the step before, or its {OUTPUT}.")

    def __iter__(self) -> Iterator[Record]:
        with open(self.path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                with bad_record(f"{self.path}:{number}"):
                    record = parse_json(line, "the line")
                    inner = record.get("record", record)
                    if not isinstance(inner, dict) or not isinstance(inner.get("id"), str):
                        raise ValueError("it has no id, so no step has written it. Give the --output folder of the step before.")
                    for name in {"images", "videos"} & set(inner):
                        inner[name] = [str(self.path.parent / one) for one in inner[name]]
                    if not all(isinstance(one["text"], str) for one in inner.get("responses", ())):
                        raise ValueError("a response is not text. Give the output of mpo mmpr sample.")
                    if self._looked is not None:
                        self._look(inner, self._looked)
                yield record

    def _look(self, record: Record, looked: set[int]) -> None:
        files = [file for name in ("images", "videos") for file in record.get(name) or ()]
        for file, shown in zip(files, record.get("shown", ()), strict=False):  # not where it was sampled by an earlier version
            if not shown or not Path(file).exists():  # on a machine without the images, responses can still be judged
                continue
            now = id_hash(f"{file} {shown} {content_hash(file, read=False)}")
            if now not in looked and content_hash(file) != shown:
                raise ValueError(
                    f"{record['id']!r} has responses to another image than {file}, which has been replaced. Run mpo mmpr sample "
                    "again, which asks about it alone, and what follows it."
                )
            looked.add(now)


class Route:
    """The questions of a source that take one route, or all (None). Those that cannot become bad ones, which a job names."""

    def __init__(
        self, questions: Iterable[Question], route: str | None = None, *, is_open: bool | None = None, needs_image: bool = False
    ) -> None:
        self.questions, self.route, self.is_open, self.needs_image = questions, route, is_open, needs_image

    def __iter__(self) -> Iterator[Question]:
        for question in self.questions:
            known, bad = bool(question.ground_truths), BAD in question.metadata
            here = {None: (known or bad) != self.is_open, "both": not (bad and self.is_open)}
            if self.is_open is not None and not here.get(self.route, (self.route == "open") == self.is_open):
                continue
            reason = unanswerable(question) if known and not self.is_open else ""
            lacks = "image" if self.needs_image and not question.images else ""
            lacks = "ground truth" if self.is_open is False and not known else lacks
            if lacks:
                reason = f"it has no {lacks}, which the {'open' if self.is_open else 'correctness'} route needs. Leave it out."
            if reason and not bad:
                question = replace(question, messages=[], metadata={BAD: reason})
            yield question


def open_model(model: Model, max_tiles: int | None = None) -> Generator:
    """Open a model of a configuration; `max_tiles` takes the place of its own. Raises ValueError for what cannot be used."""
    given: dict[str, Any] = {
        name: value for name, value in model if value is not None and name not in ("model", "name", "model_name")
    }
    given |= {} if max_tiles is None else {"max_tiles": max_tiles}
    try:
        if is_server(model.model):
            from mpo.generation.server import ServerGenerator

            return ServerGenerator(model.model, model.model_name, **given)
        from mpo.generation.open import open_local

        given |= {"model_name": model.model_name} if model.model_name else {}
        return open_local(model.model, **given)
    except TypeError as error:
        where = "a server" if is_server(model.model) else "a local model"
        raise ValueError(f"{model.model}: {str(error).partition(' ')[2]}, for {where}. Leave it out.") from None


Correct = Callable[[Record], Record | None]
"""Maps a record to what a person made of it; None: it was rejected."""


def make(
    config: Config,
    output: Path,
    *,
    workers: int = 1,
    drop_bad: bool = False,
    retry_dropped: bool = False,
    correct: Correct | None = None,
) -> dict[str, Any]:
    """Make MMPR files of a configuration's questions, or go on with it.

    What models have said is in the ledgers of ``output/jobs``, and is not asked for again, also under other rules of ``verify`` and
    ``pair``; other settings of the sampling are refused. With ``rounds``, each is a folder ``round_N`` with the run that it trains,
    whose model the next one samples from.

    Args:
        config: the configuration.
        output: the folder.
        workers: number of processes, with servers alone.
        drop_bad: drop questions that cannot be asked, instead of stopping.
        retry_dropped: try again those that were dropped.
        correct: applied to the sampled records and to the pairs, such as `mpo.review.Corrected.one`.

    Returns:
        the report; that of the last round.

    Raises:
        ValueError: as `mpo.pipelines.job.Job.run`; and if there are no pairs, with the reasons.
        ConnectionError: for a server that cannot be used, and a training run that fails.
    """
    if workers > 1 and not all(is_server(model.model) for model in config.models):
        raise ValueError(f"workers={workers} needs a server, which they share; each would load the model. Leave it out.")
    report: dict[str, Any] = {}
    for number in range(1, config.rounds + 1):
        folder = output / f"round_{number}" if config.rounds > 1 else output
        if not (folder / ".mmpr.lock").exists() and (found := [name for name in WRITTEN if (folder / name).exists()]):
            raise ValueError(f"{folder} holds {found[0]}, which mpo mmpr has not written. Give another folder.")
        with locked(folder, "mmpr"):
            if (folder / TRAINED).exists():
                report = read_json_object(folder / REPORT)
                _name_changes(config, folder)
            else:
                report = _round(config, folder, {"workers": workers, "retry_dropped": retry_dropped}, drop_bad, correct or dict)
                if config.rounds > 1:
                    _train(config, folder.absolute())
        newest = {"model": str(folder / "run"), "name": f"round_{number}", "base": None}
        config = config.model_copy(update={"models": [config.models[0].model_copy(update=newest), *config.models[1:]]})
    return report


def _train(config: Config, folder: Path) -> None:
    run = folder / "run"
    words = [f"data.meta={folder / META}", f"model.name_or_path={config.models[0].model}", f"run_dir={run}", "resume=auto"]
    done = subprocess.run([sys.executable, "-m", "mpo", "train", "data=mmpr", *words, *config.train])
    if done.returncode:
        raise ChildProcessError(f"mpo train in {run} failed with status {done.returncode}. Run the same command to continue.")
    write_text(folder / TRAINED, json.dumps(_made_with(config)))


def _made_with(config: Config) -> dict[str, Any]:
    """What of a configuration decides the pairs of a round and its training, but for the questions."""
    return config.model_dump(mode="json", by_alias=True, exclude={"models", "rounds", "sources", "formats"})


def _name_changes(config: Config, folder: Path) -> None:
    jobs = _jobs(config, folder, lambda *_: object(), drop_bad=True)  # its model is not asked
    before = json.loads((folder / TRAINED).read_text() or "{}")  # empty in folders of earlier versions
    changed = [name for name, value in _made_with(config).items() if before and before.get(name) != value]
    there = {path.parent.name for path in (folder / "jobs").glob(f"*/{SETTINGS}")}
    if {job.folder.name for job, *_ in jobs} != there or any(job.changed() for job, *_ in jobs):
        changed.insert(0, "questions")
    if changed:
        log.warning(
            "%s has trained its model, and stays as it is: its %s have changed since (or moved), which only rounds that are not "
            "trained yet follow. For a model of the new ones, give another folder.",
            *(folder, ", ".join(changed)),
        )


def _jobs(
    config: Config, folder: Path, opened: Callable[[int, int | None], Any], drop_bad: bool
) -> list[tuple[Job, Route, Source]]:
    kept, planned = config.continue_, list[tuple[str, list[Step], Route, Source]]()
    for source in config.sources:
        questions = load_questions(source.path, image_root=source.image_root, limit=source.limit, keep_bad=True)
        own = config.sample.model_copy(update={name: getattr(source.sample, name) for name in source.sample.model_fields_set})
        if next(iter(questions), None) is None:
            raise ValueError(f"{source.path} has no questions. Leave the source out.")
        models = [(model.name, opened(number, source.max_tiles)) for number, model in enumerate(config.models)]
        route = Route(questions, source.route, is_open=False)
        before = folder / "jobs" / f"{source.name}-sample" / SETTINGS
        rules = read_json_object(before)["steps"].get("verify", {}) if before.is_file() else dict(config.verify)
        planned.append((before.parent.name, sampling_steps(own, models, rules), route, source))
        for number, (name, generator) in enumerate(models):
            one: dict[str, Any] = {"name": name, **own.model_dump(exclude={"prompt", "n", "seed", "until"})}
            first = own.seed + 2 * number
            steps: list[Step] = [
                Sample(generator, prompt=kept.prompt, seed=first, **one),
                Continue(generator, ratio=kept.ratio, with_image=kept.with_image, seed=first + 1, **one),
            ]
            route = Route(questions, source.route, is_open=True, needs_image=not kept.with_image)
            planned.append((f"{source.name}-continue{number or ''}", steps, route, source))
    return [
        (Job(steps, route, folder / "jobs" / name, drop_bad=drop_bad), route, source)
        for name, steps, route, source in planned
        if next(iter(route), None) is not None
    ]


def _round(config: Config, folder: Path, how: dict[str, Any], drop_bad: bool, correct: Correct) -> dict[str, Any]:
    opened = cache(lambda number, max_tiles: open_model(config.models[number], max_tiles))
    output, reports, verify, pair = Output(folder, config.formats), [], Verify(**dict(config.verify)), Pair(**dict(config.pair))
    kept, jobs = config.continue_, _jobs(config, folder, opened, drop_bad)
    news = [job for job, route, _ in jobs if route.is_open and kept.ratio and not (job.folder / REPORT).exists()]
    for job, *_ in jobs if news else ():
        with locked(job.folder, "job"):
            job.prepare(how["workers"])
    for job in news:  # a server that closes prefixes is named before anything is paid for
        getattr(job.steps[-1].generator, "check_prefix", lambda images: None)(images=kept.with_image)
    for job, route, source in jobs:
        name = job.folder.name
        reports.append({"job": name, **job.run(**how)})
        reviewed = _reviewed(Records(job.folder), correct, output, str(source.name))
        made = ((record, "") for record in reviewed)
        for record, reason in made if route.is_open else verified(reviewed, verify, job.folder / "verdicts.jsonl"):
            try:
                pairs = [] if reason else [record] if route.is_open else pair.finish(record, ())
            except (Dropped, ValueError) as error:
                reason = str(error)
            if reason:
                output.dropped(record, "pair", reason, str(source.name))
                continue
            ids = f"{record['id']}/{name.rpartition('-')[2]}" if route.is_open else record["id"]
            asked = {"responses": [{}], **record}  # a pair of the open route is of one response, which nobody has judged
            named = [correct({**one, "id": f"{ids}/{at}"}) for at, one in enumerate(pairs)]
            output.paired(asked, [one for one in named if one is not None], str(source.name), source.max_tiles)
        for lost in Records(job.folder, DROPPED):
            output.dropped(lost["record"], lost["step"], lost["reason"], str(source.name))
    return output.close(config.model_dump(exclude_defaults=True, by_alias=True), reports)


def _reviewed(records: Iterable[Record], correct: Correct, output: Output, source: str) -> Iterator[Record]:
    for record in records:
        kept = correct(record)
        if kept is None:
            output.dropped(record, "pair", "rejected in review", source)
        else:
            yield kept


def sampling_steps(own: Sampling, models: list[tuple[str | None, Generator]], rules: Mapping[str, Any]) -> list[Step]:
    """The steps that sample a source's questions: from each model (with its name), and again where a question is one-sided.

    The `rules` by which it is are those of the first run, so that other ones ask nothing.
    """
    if own.until and "limit" in own.until.model_fields_set and own.until.limit < own.n:
        raise ValueError(f"until.limit={own.until.limit} is below n={own.n}, the responses that every question gets. Raise it.")
    settings = own.model_dump(exclude={"n", "seed", "until"})
    steps: list[Step] = []
    limit = max(own.n, own.until.limit) if own.until else own.n
    for first in range(0, limit, own.n):
        until = (own.until.right, own.until.wrong) if own.until and first else None
        steps += [Verify(**{name: rules.get(name) for name in Verifying.model_fields})] if first else []
        number_asked = min(own.n, limit - first)
        for number, (name, generator) in enumerate(models):
            seed = own.seed + first + number * limit  # the same model at two addresses says other things
            steps.append(Sample(generator, name=name, seed=seed, n=number_asked, until=until, **settings))
    return steps


def write(job: Job, report: dict[str, Any]) -> None:
    """Write the pairs of a job whose last step makes them as MMPR files in ``mmpr`` in its folder."""
    output = Output(job.folder / "mmpr")
    groups: dict[str, list[Record]] = {}
    for record in Records(job.folder):
        groups.setdefault(record["input_id"], []).append(record)
    for pairs in groups.values():
        output.paired(pairs[0], pairs)
    for lost in Records(job.folder, DROPPED):
        output.dropped(lost["record"], lost["step"], lost["reason"])
    output.close({}, [{"job": job.names[-1], **report}])
