"""The models that a command asks, in this process or on a server, and steps that ask them: each a job in a folder."""

from collections.abc import Callable, Sequence
from typing import Any

from mpo.commands.flags import MODEL, REQUIRED, Args, arg, flags, path, refuse
from mpo.commands.outcome import Report

LOCAL = {"base", "device", "dtype", "vision_feature_cache"}
"""Flags for a model in this process."""
AT_SERVER = {"model_name", "prices"}


def refuse_unfit(args: Args, *models: str) -> None:
    """Refuse flags that none of the models, by names or addresses, takes, and workers that would each load one of them."""
    from mpo.generation.generator import is_server

    local, given = [model for model in models if not is_server(model)], vars(args).keys()
    if not local:
        from mpo.generation.endpoint import shown_address

        server = shown_address(models[0])  # without a password
        refuse(args, LOCAL & given, f"is for a model in this process, and {server} is a server, which has loaded its own")
    if len(local) == len(models):
        refuse(args, AT_SERVER & given, f"needs the address of a server, and the model is {models[0]}")
    if local and (getattr(args, "workers", None) or 1) > 1:
        refuse(args, ["workers"], f"needs a server, which they share; each would load {local[0]}")


def open_model(args: Args, model: str, max_tiles: int | None = None) -> Any:
    """Open a model, by its name or address, with the flags that the command has (`refuse_unfit`); a generator."""
    from mpo.generation.generator import is_server

    given = vars(args)
    if is_server(model):
        from mpo.generation.server import ServerGenerator

        return ServerGenerator(model, given.get("model_name"), max_tiles=max_tiles, prices=given.get("prices"))
    from mpo.generation.open import open_local
    from mpo.training.features.use import with_cached_features

    how = {"base": given.get("base"), "dtype": given.get("dtype") or "auto", "device": args.device}
    return with_cached_features(open_local(model, max_tiles=max_tiles, **how), given.get("vision_feature_cache"))


# Steps

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
