"""What the actions of `mpo mmpr` share: a step as a job in a folder, over questions or over what another one has written."""

from __future__ import annotations

import argparse
from typing import Any

from mpo.commands.flags import add
from mpo.commands.outcome import Report

SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model: a folder, a model id on the Hub, or http(s)://HOST:PORT/v1")


def add_input(parser: argparse.ArgumentParser, made_by: str) -> None:
    parser.add_argument("input", metavar="INPUT", help=f"folder of {made_by}, or the file of its output")


def add_job(parser: argparse.ArgumentParser, *, samples: bool) -> None:
    add(parser, "--output", "--retry-dropped", "--drop-bad")
    if samples:
        add(parser, "--workers", "--device", "--model-name", "--max-tiles")
        add(parser, "--temperature", "--top-p", default=1.0)
        add(parser, "--top-k", default=0)
        add(parser, "--max-new-tokens", default=1024)
        add(parser, "--seed", default=0)


def sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in SAMPLING}


def open_model(args: argparse.Namespace) -> Any:
    """Open MODEL."""
    from mpo.pipelines.mmpr import config, make

    if not config.is_server(args.model) and args.workers:
        raise ValueError(f"--workers={args.workers} needs a server, which they share; each would load {args.model}. Leave it out.")
    given = {name: getattr(args, name) for name in ("device", "model_name", "max_tiles")}
    return make.open_model(config.Model(model=args.model, **given))


def run_step(args: argparse.Namespace, step: Any, records: Any = None, *, pairs: bool = False) -> Report:
    """Run a step over records; if it makes pairs, write them as MMPR files."""
    from mpo.pipelines.job import Job
    from mpo.pipelines.mmpr.make import Records, write
    from mpo.pipelines.report import summarize

    if args.output is None:
        raise ValueError("The results need a folder. Give --output DIR.")
    job = Job([step], Records(args.input) if records is None else records, args.output, drop_bad=args.drop_bad)
    report = job.run(workers=getattr(args, "workers", None) or 1, retry_dropped=args.retry_dropped)
    text = f"{summarize(report)}\n{args.output}/report.html"
    if pairs:
        write(job, report)
        text += f"\n{args.output}/mmpr/meta.json"
    return Report(text, report)
