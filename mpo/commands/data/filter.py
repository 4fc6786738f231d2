"""Remove conversations or pairs by their form, and by scores of a language model.

As for InternVL 2.5, in the folder --output, which the same command goes on with after an interruption:

  heuristics    long lines, runs of zeros or of one character, repeated lines, loops, repeated n-grams
  repetition    a score of --model from 0 to 10; below 3 dropped
  quality       a score of --model from 0 to 10; below 7 dropped; records with images are not judged

Texts are the turns of the assistant. Of a pair, both completions are checked, but for quality the chosen one alone. The folder
kept has the files of PATH without the dropped lines, the others as they are, with their image paths; dropped.jsonl has the
dropped ones with all reasons, report.json the counts by rule and by source.
"""

from typing import Any

from mpo.commands.flags import REQUIRED, Args, Words, arg, flags
from mpo.commands.models import open_model, refuse_unfit
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo data filter chat.jsonl --output filtered
mpo data filter chat.jsonl --output judged --model http://localhost:8000/v1 --prices 0.15 0.6
mpo data filter pairs.jsonl --output judged --model runs/first --no-quality --max-loop off
mpo data filter data/ --output judged --model http://localhost:8000/v1 --domain math --domain forum=writing
"""
LIMITS = {"line": "10000", "zeros": "100", "run": "64", "lines": "0.3", "loop": "35", "ngrams": "60"}
ARGUMENTS = {
    "path": arg("conversations or preferences: JSONL, JSON, Parquet, or a folder of them", "PATH"),
    **flags("--metadata", "--drop-bad", "--retry-dropped", "--workers", output=REQUIRED),
    **flags("--model", "--model-name", "--prices", "--device"),
    **flags(heuristics=True, repetition=Words("with --model"), quality=Words("with --model")),
    **flags(**{f"max_{name}": Words(value) for name, value in LIMITS.items()}),
    **flags(min_repetition=Words("3"), min_quality=Words("7"), domain=Words("general"), unscored=Words("keep")),
}


def run(args: Args) -> Report:
    from mpo.curation.filter import Source, filter_records
    from mpo.curation.judge import OTHERS, Form, Quality, Repetition

    limits = {name: value for name in LIMITS if (value := getattr(args, f"max_{name}")) is not None}
    judges = {Repetition: args.repetition, Quality: args.quality}
    judges = {judge: bool(args.model) if wanted is None else wanted for judge, wanted in judges.items()}
    for names, needed, there in (
        ([f"max_{name}" for name in limits], "--heuristics", args.heuristics),
        (["repetition", "quality", "model_name", "prices", "device"], "--model", args.model),
        (["model", "unscored"], "--repetition or --quality", any(judges.values())),
        (["min_repetition"], "--repetition", judges[Repetition]),
        (["min_quality", "domain"], "--quality", judges[Quality]),
    ):
        if not there and (given := [name for name in names if getattr(args, name) not in (None, False)]):
            raise ValueError(f"--{given[0].replace('_', '-')} needs {needed}. Give both, or none.")
    if args.model:
        refuse_unfit(args, args.model)
    source = Source(args.path, metadata=args.metadata or (), keep_bad=args.drop_bad)
    steps: list[Any] = [
        Form({name: None if value == "off" else value for name, value in limits.items()}, heuristics=args.heuristics)
    ]
    unscored, generator = args.unscored or "keep", open_model(args, args.model) if any(judges.values()) else None
    domains = dict((OTHERS, *one.rsplit("=", 1))[-2:] for one in args.domain or ())
    if len(domains) < len(args.domain or ()):
        raise ValueError(f"--domain is given twice for one source, or for all: {', '.join(args.domain)}. Keep one of them.")
    known = {one["source"] for one in source} if domains.keys() - {OTHERS} else set()
    if unknown := sorted(domains.keys() - {OTHERS, *known}):
        raise ValueError(f"--domain names the source {unknown[0]!r}; {args.path} has {', '.join(sorted(known))}. Name one of them.")
    own = {Repetition: {"threshold": args.min_repetition}, Quality: {"threshold": args.min_quality, "domains": domains}}
    for judge in [judge for judge, wanted in judges.items() if wanted]:
        steps += [judge(generator, **own[judge], on_unscored=unscored, again=again) for again in (False, True)]
    settings = {"drop_bad": args.drop_bad, "retry_dropped": args.retry_dropped, "workers": args.workers or 1}
    report = filter_records(source, steps, args.output, on_unscored=unscored, **settings)
    rows = {"all": {name: value for name, value in report.items() if isinstance(value, int)}, **report["by_source"]}
    lines = [f"{name}: {', '.join(f'{count:,} {what}' for what, count in row.items())}" for name, row in rows.items()]
    spent = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in report["spent"].items())
    return Report("\n".join([*lines, *[f"spent: {spent}"] * bool(spent), f"{args.output}/report.json"]), report)
