"""Pair right with wrong responses, and write MMPR files with their meta.json."""

import argparse
from dataclasses import replace

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_job, reviewed, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr pair verified --output pairs --accuracy 0.2 0.8\n"


def configure(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    add(parser, "--max-pairs", default=15)
    add(parser, "--accuracy", default=(0.0, 1.0), otherwise="0 1")
    add(parser, "--rewrite")
    add(parser, "--seed", default=0)
    add(parser, "--review")


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mmpr.make import Records
    from mpo.pipelines.mmpr.pair import Pair

    step = Pair(max_pairs=args.max_pairs, accuracy=args.accuracy, rewrite=args.rewrite, seed=args.seed)
    corrected = reviewed(Records(args.input, as_shown=True), args)
    report = run_step(args, step, corrected, pairs=True)
    return replace(report, text=f"{report.text}\n{corrected}") if corrected else report
