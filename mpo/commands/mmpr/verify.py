"""Verify sampled responses by the known answers, without sampling again."""

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_job, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr verify sampled --output verified --answer-format any\n"


def configure(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    add(parser, "--answer-format", "--kind", "--tolerance")


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mmpr.verify import Verify

    return run_step(args, Verify(format=args.answer_format, kind=args.kind, tolerance=args.tolerance))
