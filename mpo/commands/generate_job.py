"""The part of `mpo generate` that asks a file of questions, as a job in a folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpo.commands.flags import Args, flags, refuse
from mpo.commands.outcome import Report

SINGLE = ("question", "image", "video", "prefix")
"""Flags for one question; a job has none of them."""
JOB = ("output", "n", "workers", "prompt", "image_root", "limit", "retry_dropped", "drop_bad")
"""Flags for a job; one question has none of them."""
JOB_ARGUMENTS = flags("--questions", *(f"--{name.replace('_', '-')}" for name in JOB))


def refuse_job_flags(args: Args) -> None:
    """Refuse a job's flags beside one question."""
    if args.question is None:
        raise ValueError("Expected a QUESTION, or a file of questions (--questions FILE --output DIR).")
    refuse(args, JOB, "needs a file of questions (--questions)")


def run_job(args: Args, generator: Callable[[], Any], *, local: bool, settings: dict[str, Any]) -> Report:
    from mpo.data import load_questions
    from mpo.pipelines.job import Job
    from mpo.pipelines.report import summarize
    from mpo.pipelines.sample import QUESTION, Sample

    refuse(args, SINGLE, "is for one question, and --questions asks those of a file")
    if args.output is None:
        raise ValueError("--questions needs the folder of the job. Give --output DIR.")
    workers = args.workers or 1
    if local and workers > 1:
        raise ValueError(f"--workers={workers} needs a server, which they share; each would load {args.model}. Leave it out.")
    questions = load_questions(args.questions, image_root=args.image_root, limit=args.limit, keep_bad=True)
    step = Sample(generator(), n=args.n or 1, prompt=args.prompt or QUESTION, system=args.system, **settings)
    job = Job([step], questions, args.output, drop_bad=args.drop_bad)
    report = job.run(workers=workers, retry_dropped=args.retry_dropped)
    spent = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in report["spent"].items())
    return Report(f"{summarize(report)}\n{f'spent: {spent}' if spent else ''}\n{args.output}/report.html", report)
