"""Make MMPR files from a configuration: sample, verify and pair, or continue where no answer is known.

--output becomes a folder with meta.json, for mpo train data=mmpr, and report.html. The same command goes on after an
interruption. Other rules of verify and pair take seconds; other settings of the sampling need another folder.
"""

from __future__ import annotations

import argparse

from mpo.commands.flags import add, path
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mmpr make mmpr.yaml --output mmpr

mmpr.yaml:
  sources: [{path: questions.jsonl}]
  models: [{model: "http://localhost:8000/v1"}]
  sample: {prompt: en, n: 8, temperature: 1.0, until: {right: 2, wrong: 2, limit: 32}}
  pair: {max_pairs: 15, accuracy: [0.2, 0.8]}
  continue: {ratio: 0.5}
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=path, help="YAML file")
    add(parser, "--output", "--workers", "--retry-dropped", "--drop-bad")


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mmpr.config import read_config
    from mpo.pipelines.mmpr.make import make

    if args.output is None:
        raise ValueError("The results need a folder. Give --output DIR.")
    config = read_config(args.config)
    how = {"drop_bad": args.drop_bad, "retry_dropped": args.retry_dropped}
    report = make(config, args.output, workers=args.workers or 1, **how)
    spent = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in report["spent"].items())
    lines = [f"  {name}: {value}" for name, value in report["sources"][0].items()]
    return Report(
        "\n".join(
            [
                f"{report['questions']:,} questions, {report['pairs']:,} pairs",
                *lines,
                f"spent: {spent}",
                str(args.output / "report.html"),
                str(args.output / "meta.json"),
            ]
        ),
        report,
    )
