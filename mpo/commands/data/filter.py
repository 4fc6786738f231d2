"""Remove conversations or pairs by their form, and by scores of a language model.

As for InternVL 2.5, in the folder --output, which the same command goes on with after an interruption:

  heuristics    long lines, runs of zeros or of one character, repeated lines, loops, repeated n-grams
  repetition    a model's score from 0 to 10; below 3 dropped
  quality       a model's score from 0 to 10; below 7 dropped; records with images are not judged

Texts are the turns of the assistant. Of a pair, both completions are checked; quality judges the chosen one alone. The folder
kept has the files of PATH without the dropped lines, which are as they were, with their image paths; dropped.jsonl has the
others, with all reasons; report.json has counts by rule and by source. Without --model, heuristics alone.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

from mpo.commands.flags import add
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo data filter chat.jsonl --output filtered
mpo data filter chat.jsonl --output judged --model http://localhost:8000/v1 --prices 0.15 0.6
mpo data filter pairs.jsonl --output judged --model runs/first --no-quality --max-loop off
mpo data filter data/ --output judged --model http://localhost:8000/v1 --domain math --domain forum=writing --exempt exams
"""
LIMITS = ("line", "zeros", "run", "lines", "loop", "ngrams")
JUDGED = ("min_repetition", "min_quality", "domain", "exempt", "unscored", "model_name", "prices", "device")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="conversations or preferences: JSONL, JSON, Parquet, or a folder of them")
    add(parser, "--output", required=True)
    add(parser, "--format", "--metadata", "--drop-bad", "--retry-dropped", "--workers", "--model", "--model-name", "--prices")
    add(parser, "--device", "--exempt")
    add(parser, "--heuristics", default=True)
    add(parser, "--repetition", "--quality", otherwise="with --model")
    for name, value in (("line", "10000"), ("zeros", "64"), ("run", "64"), ("lines", "0.3"), ("loop", "32"), ("ngrams", "60")):
        add(parser, f"--max-{name}", otherwise=value)
    for name, value in (("min-repetition", "3"), ("min-quality", "7"), ("domain", "general"), ("unscored", "keep")):
        add(parser, f"--{name}", otherwise=value)


def run(args: argparse.Namespace) -> Report:
    from mpo.curation.degenerate import Limits
    from mpo.curation.filter import Source, filter_records
    from mpo.curation.judge import OTHERS, Form, Judge, Quality, Repetition
    from mpo.pipelines.step import Step

    limits = {name: getattr(args, f"max_{name}") for name in LIMITS if getattr(args, f"max_{name}") is not None}
    limits = {name: None if value == "off" else value for name, value in limits.items()}
    judges: list[tuple[type[Judge], dict[str, Any]]] = []
    if args.repetition or (args.repetition is None and args.model):
        judges.append((Repetition, {"threshold": args.min_repetition, "exempt": args.exempt or ()}))
    if args.quality or (args.quality is None and args.model):
        domains = [(OTHERS, *one.split("="))[-2:] for one in args.domain or ()]
        judges.append((Quality, {"threshold": args.min_quality, "domains": dict(domains)}))
    verbs = [judge.verb for judge, _ in judges]
    for name, there, needs in (
        *((f"max_{name}", args.heuristics, "--heuristics") for name in limits),
        *((name, judges, "--repetition or --quality, and --model") for name in JUDGED if getattr(args, name) is not None),
        *((name, args.model, "--model") for name in verbs),
        *((f"min_{verb}", verb in verbs, f"--{verb}") for verb in ("repetition", "quality") if getattr(args, f"min_{verb}") is not None),
        *([("model", judges, "--repetition or --quality")] if args.model else []),
    ):
        if not there:
            raise ValueError(f"--{name.replace('_', '-')} needs {needs}. Add it, or leave this out.")
    source = Source(args.path, format=args.format, metadata=args.metadata or (), keep_bad=args.drop_bad)
    steps: list[Step] = [Form(Limits(**limits) if args.heuristics else None)]
    unscored = args.unscored or "keep"
    generator = _generator(args) if judges else None
    steps += [judge(generator, **own, on_unscored=unscored, again=again) for judge, own in judges for again in (False, True)]
    settings = {"drop_bad": args.drop_bad, "retry_dropped": args.retry_dropped, "workers": args.workers or 1}
    report = filter_records(source, steps, args.output, on_unscored=unscored, **settings)
    lines = [f"{name}: {', '.join(f'{count:,} {what}' for what, count in counts.items())}" for name, counts in report["by_source"].items()]
    spent = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in report["spent"].items())
    return Report("\n".join([*lines, *([f"spent: {spent}"] if spent else []), f"{args.output}/report.json"]), report)


def _generator(args: argparse.Namespace) -> Any:
    if re.match("https?://", args.model, re.IGNORECASE):
        from mpo.generation.server import ServerGenerator

        if args.device is not None:
            raise ValueError("--device has no effect on a server. Leave it out.")
        return ServerGenerator(args.model, args.model_name, prices=args.prices)
    from mpo.generation.open import open_local

    if named := [name for name in ("model_name", "prices", "workers") if getattr(args, name) is not None]:
        raise ValueError(f"--{named[0].replace('_', '-')} needs the address of a server, and --model is {args.model}. Leave it out.")
    return open_local(args.model, device=args.device)
