"""Go on from half of each response without its image, and write MMPR files of both with their meta.json (Dropout-NTP).

No answer needs to be known. The model is the one that gave the responses, of which each question has one.
"""

from __future__ import annotations

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_input, add_job, add_model, open_model, run_step, sampling
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr continue http://localhost:8000/v1 told --output pairs --ratio 0.5\n"


def configure(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_input(parser, "mpo mmpr sample, with --n 1")
    add(parser, "--ratio", default=0.5)
    add(parser, "--with-image")
    add_job(parser, samples=True)


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mmpr.continuation import Continue

    return run_step(args, Continue(open_model(args), ratio=args.ratio, with_image=args.with_image, **sampling(args)), pairs=True)
