"""Instructions from a configuration: collect, caption, seed, generate, check and expand, in a folder that goes on after a kill."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mpo.generation.generator import Generator, is_server
from mpo.io import json_line, read_json_lines, write_json_lines, write_text
from mpo.pipelines.job import Job
from mpo.pipelines.mminstruct.caption import Caption, InLanguages, check_sees
from mpo.pipelines.mminstruct.check import Agree, Blind, Check
from mpo.pipelines.mminstruct.collect import Classify, Images, Look, check_unique, duplicates
from mpo.pipelines.mminstruct.config import Collecting, Config, Generating
from mpo.pipelines.mminstruct.config import Images as Given
from mpo.pipelines.mminstruct.domains import load_domains
from mpo.pipelines.mminstruct.expand import Expansion
from mpo.pipelines.mminstruct.generate import RESPONSE_FORMAT, Generate, Seed
from mpo.pipelines.mminstruct.output import WRITTEN, write
from mpo.pipelines.mmpr.config import Model, file_name
from mpo.pipelines.mmpr.make import Correct, Records, open_model
from mpo.pipelines.part import DROPPED, LEDGER, OUTPUT, locked
from mpo.pipelines.report import count_reason
from mpo.pipelines.step import Record, Step

REPORT = "report.json"


def collect(
    sources: Sequence[Any], folder: Path, *, min_side: int = 64, near: bool = True, classify: Classify | None = None, **how: Any
) -> dict[str, Any]:
    """Collect images in a folder: ``output.jsonl``, and ``dropped.jsonl`` with the reason of each that is not in it.

    Args:
        sources: folders and data sets, or what is `mpo.pipelines.mminstruct.retrieve.Retrieved` of them.
        folder: the folder, new or of the same collection, which goes on.
        min_side: as in `Look`.
        near: whether near copies are duplicates too.
        classify: the step that names the domains of images without one.
        how: arguments of `mpo.pipelines.job.Job.run`.

    Returns:
        the report: numbers of ``images``, those ``kept`` and ``dropped`` by ``reasons``, the number by ``domains``, and what was
        ``spent``.

    Raises:
        ValueError: as `Job.run`, and if no image is left, with the reasons.
    """
    own: list[Images] = [getattr(one, "source", one) for one in sources]
    check_unique(own)
    for source in own:
        if folder.resolve().is_relative_to(Path(source.path).resolve()):
            raise ValueError(f"{folder} lies in the folder of images {source.path}. Give an output folder outside.")
        source.order = folder / "look" / f"{file_name(str(source.name))}.jsonl"
    reports, dropped = [], list[Record]()

    def run(step: Step, records: Iterable[Record], name: str) -> list[Record]:  # a job each: more sources may come
        job = Job([step], records, folder / step.verb / file_name(name))
        reports.append(job.run(**how))
        dropped.extend(Records(job.folder, DROPPED))
        return [*Records(job.folder)]

    seen = [one for records, of in zip(sources, own, strict=True) for one in run(Look(min_side=min_side), records, str(of.name))]
    before = {one["id"] for one in read_json_lines(folder / OUTPUT)} if (folder / OUTPUT).is_file() else set[str]()
    twice = duplicates(seen, near=near, before=before)
    kept = [one for one in seen if one["id"] not in twice]
    same = [one for one in seen if one["id"] in twice]
    dropped += [
        {"id": one["id"], "step": "duplicates", "reason": twice[one["id"]], "kind": "duplicate", "record": one} for one in same
    ]
    for name in dict.fromkeys(one["source"] for one in kept if "domain" not in one) if classify else ():
        named, others = ([one for one in kept if (one["source"] == name) == of] for of in (True, False))
        kept = others + run(classify, named, name)  # type: ignore[arg-type]
    (folder / REPORT).unlink(missing_ok=True)  # of other files, and after a kill of none
    write_json_lines(folder / OUTPUT, kept)
    write_json_lines(folder / DROPPED, dropped)
    report = _collected(kept, dropped, reports)
    write_text(folder / REPORT, json_line(report))
    if not kept:
        said = ", ".join(f"{count}: {reason}" for reason, count in report["reasons"].items())
        raise ValueError(f"No image is left of {report['images']}: {said}. See {folder / DROPPED}.")
    return report


def _collected(kept: Sequence[Record], dropped: Sequence[Record], reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    reasons, spent = Counter[str](), Counter[str]()
    for one in dropped:
        count_reason(reasons, "", one["reason"])
    for report in reports:
        spent.update(report["spent"])
    numbers = {"images": len(kept) + len(dropped), "kept": len(kept), "dropped": len(dropped)}
    return numbers | {
        "reasons": {name.rpartition("/reason/")[2]: count for name, count in reasons.most_common()},
        "domains": {**Counter(one.get("domain") or "none" for one in kept)},
        "licences": {**Counter(one.get("licence") or "not said" for one in kept)},
        "spent": {**spent},
    }


def caption_steps(generator: Generator, attempts: int, *, seed: int = 0, **settings: Any) -> list[Step]:
    """The steps that ask for captions (`Caption`), and again, with other seeds, for those that cannot be used."""
    return [Caption(generator, last=left == 1, seed=seed + attempts - left, **settings) for left in range(attempts, 0, -1)]


def writer(own: Generating, opened: Callable[[Model], Any]) -> tuple[Generator, str]:
    """Open the model that writes instructions, with the form of its responses: JSON where a server is known to keep to a schema."""
    generator, form = opened(own.model), own.form
    if form == "auto":
        generator.identity()  # connects
        kinds = {endpoint.kind.name for endpoint in getattr(generator, "endpoints", ())}
        form = "json" if kinds and kinds <= {"vllm", "sglang"} else "tags"
    if form == "json" and is_server(own.model.model):
        extra = {**(own.model.extra or {}), "response_format": RESPONSE_FORMAT}
        generator = opened(own.model.model_copy(update={"extra": extra}))
    return generator, form


def make(
    config: Config,
    output: Path,
    *,
    workers: int = 1,
    drop_bad: bool = False,
    retry_dropped: bool = False,
    correct: Correct | None = None,
) -> dict[str, Any]:
    """Make instructions as a configuration says, or go on with it.

    What models have said is in the ledgers of ``output/jobs``, and is not asked for again; other settings are refused.

    Args:
        config: the configuration.
        output: the folder.
        workers: number of processes (extra ``scale``), with servers alone.
        drop_bad: drop images that are gone, and lines of sets that cannot be used, instead of stopping.
        retry_dropped: try again what was dropped.
        correct: applied to the instructions of the jobs and to those of ``instructions.jsonl``, such as `mpo.review.Corrected.one`.

    Returns:
        the report.

    Raises:
        ValueError: as `mpo.pipelines.job.Job.run`; for a model that does not see; and if nothing is left, with the reasons.
        ConnectionError: for a server that cannot be used.
    """
    if not (output / ".mminstruct.lock").exists() and (found := [name for name in WRITTEN if (output / name).exists()]):
        raise ValueError(f"{output} holds {found[0]}, which mpo mminstruct has not written. Give another folder.")
    asked = [config.collect.model, *(one.model for one in (config.caption, config.generate, config.blind, config.judge) if one)]
    if workers > 1 and (local := [one.model for one in asked if one is not None and not is_server(one.model)]):
        raise ValueError(f"workers={workers} needs servers, which they share; each would load {local[0]}. Leave it out.")
    how: dict[str, Any] = {"workers": workers, "retry_dropped": retry_dropped}
    domains = load_domains(config.domains)
    sets = [Expansion(**dict(one), domains=domains, drop_bad=drop_bad) for one in config.expand]
    generators: dict[str, Any] = {}

    def opened(model: Model) -> Any:
        key = model.model_dump_json()
        return generators.get(key) or generators.setdefault(key, open_model(model))

    with locked(output, "mminstruct"):
        folder, jobs, collected = output / "jobs", list[tuple[Job, dict[str, Any]]](), None
        if config.images and config.caption and config.generate:
            collected = collect_as(config.collect, config.images, config.domains, folder / "collect", how)
            if lost := collected["domains"].get("none"):
                raise ValueError(f"{lost} images have no domain. Give images a domain: a name, folder, prompt or query.")
            jobs += _instruct(config, folder, opened, drop_bad, how)
        for one in sets:
            jobs.append(_run([Check()], one, folder / f"expand-{file_name(str(one.name))}", drop_bad, {**how, "workers": 1}))
            _refuse_nothing(jobs[-1:], "instruction")
        return write(output, config, collected, jobs, correct)


def _instruct(config: Config, folder: Path, opened: Any, drop_bad: bool, how: dict[str, Any]) -> list[tuple[Job, dict[str, Any]]]:
    """Caption the collected images and write instructions about them.

    Two jobs for each source and language, so that sources, images and languages may be added.
    """
    assert config.caption is not None and config.generate is not None
    told_by, own = config.caption, config.generate
    seeing, settings = opened(told_by.model), {"shortest": told_by.shortest, "max_side": told_by.max_side, **told_by.sampling()}
    if not (folder / "sees").exists():
        check_sees(seeing)
        (folder / "sees").touch()
    images = [*Records(folder / "collect")]
    told = []
    for name in dict.fromkeys(one["source"] for one in images):
        _take_over(folder, name, config.languages)
        own_images = [one for one in images if one["source"] == name]
        for language in config.languages:
            place = folder / f"caption-{file_name(name)}-{language}"
            steps = caption_steps(seeing, told_by.attempts, domains=config.domains, **settings)
            told.append(_run(steps, InLanguages(own_images, [language]), place, drop_bad, how))
    _refuse_nothing(told, "caption")
    generator, form = writer(own, opened)
    seed = Seed(types=config.types, rounds=own.rounds, per=own.seeds, domains=config.domains, seed=config.seed)
    steps = [seed, Generate(generator, counts=own.counts, form=form, domains=config.domains, **own.sampling()), Check()]
    steps += [Blind(opened(config.blind.model or own.model), n=config.blind.n, seed=config.blind.seed)] if config.blind else []
    steps += [Agree(opened(config.judge.model or own.model), seed=config.judge.seed)] if config.judge else []
    made = []
    for job, report in told:
        if report["output"]:
            place = folder / job.folder.name.replace("caption-", "generate-", 1)
            made.append(_run(steps, Records(job.folder), place, drop_bad, how))
    _refuse_nothing(made, "instruction")
    return [*told, *made]


def _take_over(folder: Path, name: str, languages: Sequence[str]) -> None:
    """Go on with the jobs of an older version, which had one for all languages of a source, if it had one language.

    Raises:
        ValueError: if it had several, since all of them would be asked for again.
    """
    old = [place for kind in ("caption", "generate") if (place := folder / f"{kind}-{file_name(name)}").is_dir()]
    record = re.compile(rf'"record": "{re.escape(json_line(name).strip()[1:-1])}/(?:[^"\\]|\\.)*:(\w+)"')
    ledgers = [ledger.read_text(encoding="utf-8", errors="replace") for place in old for ledger in place.rglob(LEDGER)]
    found = {language for text in ledgers for language in record.findall(text)}
    if len(found) > 1 or found - {*languages}:
        raise ValueError(
            f"{old[0]} is of an older version, of the languages {' and '.join(sorted(found))} at once, which this one has apart. "
            "Finish it with the version that began it, or give another folder to ask for all of it again."
        )
    for place in old if found else ():
        place.rename(place.with_name(f"{place.name}-{min(found)}"))


def collect_as(own: Collecting, given: Sequence[Given], extra: Sequence[Any], folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Collect images as a configuration says; arguments of `how` and the report as in `collect`."""
    domains, sources = load_domains(extra), list[Any]()
    for one in given:
        domain = None if one.domain in ("prompt", "query") else one.domain
        source: Any = Images(one.path, one.name, domain, one.licence, one.origin, domains, one.limit)
        if one.retrieve:
            from mpo.pipelines.mminstruct.retrieve import Retrieved

            by = {"most": one.retrieve, "queries": one.queries, "by_query": one.domain == "query"}
            source = Retrieved(source, folder / "index", str(own.clip), **by)  # type: ignore[arg-type]
        sources.append(source)
    classify = None if own.model is None else Classify(open_model(own.model), domains=extra)
    return collect(sources, folder, min_side=own.min_side, near=own.near, classify=classify, **how)


def _run(steps: list[Step], records: Any, folder: Path, drop_bad: bool, how: dict[str, Any]) -> tuple[Job, dict[str, Any]]:
    job = Job(steps, records, folder, drop_bad=drop_bad)
    return job, {"job": folder.name, **job.run(**how)}


def _refuse_nothing(done: Sequence[tuple[Job, dict[str, Any]]], what: str) -> None:
    if not any(report["output"] for _, report in done):
        reasons = Counter[str]()
        for step in (step for _, report in done for step in report["steps"]):
            reasons.update(step.get("reasons", {}))
        said = ", ".join(f"{count}: {reason}" for reason, count in reasons.most_common(5))
        raise ValueError(f"No {what} can be used: {said}. The responses are in {done[0][0].folder / DROPPED}.")
