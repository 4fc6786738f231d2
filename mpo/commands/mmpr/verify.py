"""Judge sampled responses by the known answers, without sampling again."""

from __future__ import annotations

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_input, add_job, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr verify sampled --output verified --answer-format any\n"


def configure(parser: argparse.ArgumentParser) -> None:
    add_input(parser, "mpo mmpr sample")
    add(parser, "--answer-format", "--kind", "--tolerance")
    add_job(parser, samples=False)


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mmpr.verify import Verify

    return run_step(args, Verify(format=args.answer_format, kind=args.kind, tolerance=args.tolerance))
