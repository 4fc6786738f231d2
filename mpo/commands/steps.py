"""What the actions of `mpo mmpr` share: a step as a job in a folder, over questions or over what another one has written."""

from collections.abc import Callable, Sequence
from typing import Any

from mpo.commands.flags import MODEL, REQUIRED, Args, arg, flags, path
from mpo.commands.models import open_model, refuse_unfit
from mpo.commands.outcome import Report

SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 1024, "seed": 0}
ASKED = {**MODEL, **flags("--workers", "--device", "--model-name", "--max-tiles", **SAMPLING)}
"""The model that an action asks, and how."""
INPUT = {"input": arg("folder of the action before, or its output.jsonl", "INPUT")}
JOB = flags("--retry-dropped", "--drop-bad", output=REQUIRED)
MAKE = {"config": arg("YAML file of what to make", "CONFIG", type=path), **JOB, **flags("--workers", "--review")}
"""The arguments of an action that does all steps of a configuration."""


def asked_model(args: Args) -> tuple[Any, dict[str, Any]]:
    """Open MODEL, and return it with the settings of its sampling."""
    refuse_unfit(args, args.model)
    return open_model(args, args.model, args.max_tiles), {name: getattr(args, name) for name in SAMPLING}


def reviewed(records: Any, args: Args) -> Any:
    """The records with the decisions of --review; None without it."""
    if args.review is None:
        return None
    from mpo.review import apply

    return apply(records, args.review)


def run_make(args: Args, make: Callable[..., Any], config: Any, describe: Callable[[Any], list[str]]) -> Report:
    """Do all steps of a configuration; `describe` gives the lines of the report."""
    corrected = reviewed((), args)
    how = {"drop_bad": args.drop_bad, "retry_dropped": args.retry_dropped, "correct": corrected and corrected.one}
    report = make(config, args.output, workers=args.workers or 1, **how)
    first, *others = describe(report)
    if corrected:
        corrected.finish()
        others.insert(0, str(corrected))
    return Report("\n".join([first, *others, f"{args.output}/report.html", f"{args.output}/meta.json"]), report)


def ran(args: Args, steps: Sequence[Any], records: Any) -> tuple[Any, dict[str, Any]]:
    """Run steps over records as a job in --output; returns it with its report."""
    from mpo.pipelines.job import Job

    job = Job(steps, records, args.output, drop_bad=args.drop_bad)
    return job, job.run(workers=getattr(args, "workers", None) or 1, retry_dropped=args.retry_dropped)


def run_step(args: Args, step: Any, records: Any = None, *, pairs: bool = False) -> Report:
    """Run a step, or several, over records, by default those of INPUT; pairs are also written as MMPR files."""
    from mpo.pipelines.mmpr.make import Records, write
    from mpo.pipelines.report import summarize

    records = Records(args.input, as_shown=True) if records is None else records
    job, report = ran(args, step if isinstance(step, list) else [step], records)
    if pairs:
        write(job, report)
    return Report(f"{summarize(report)}\n{args.output}/{'mmpr/meta.json' if pairs else 'output.jsonl'}", report)
