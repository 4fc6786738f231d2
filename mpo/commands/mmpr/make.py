"""Make MMPR files from a configuration: sample, verify and pair, or continue where no answer is known.

--output becomes a folder with meta.json, for mpo train data=mmpr, and report.html. Other rules of verify and pair ask
nothing again; other settings of the sampling need another folder. CONFIG is YAML:

  sources: [{path: questions.jsonl}]
  models: [{model: "http://localhost:8000/v1"}]
  sample: {prompt: en, n: 8, until: {right: 2, wrong: 2, limit: 32}}
  pair: {accuracy: [0.2, 0.8]}
"""

import argparse

from mpo.commands.flags import add, path
from mpo.commands.mmpr.steps import reviewed
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr make mmpr.yaml --output mmpr\n"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=path, help="YAML file of what to make")
    add(parser, "--output", "--workers", "--retry-dropped", "--drop-bad", "--review")


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mmpr.config import read_config
    from mpo.pipelines.mmpr.make import make

    if args.output is None:
        raise ValueError("The results need a folder. Give --output DIR.")
    corrected = reviewed((), args)
    how = {"drop_bad": args.drop_bad, "retry_dropped": args.retry_dropped, "correct": corrected and corrected.one}
    report = make(read_config(args.config), args.output, workers=args.workers or 1, **how)
    lines = [f"{report['questions']:,} questions, {report['pairs']:,} pairs"]
    if corrected:
        corrected.finish()
        lines.append(str(corrected))
    lines += [f"  {name}: {value}" for name, value in {**report["sources"][0], "spent": report["spent"]}.items()]
    return Report("\n".join([*lines, f"{args.output}/report.html", f"{args.output}/meta.json"]), report)
