"""Continue the first half of each response without its image, and write MMPR files of both (Dropout-NTP).

No answer needs to be known. The model is the one that gave the responses, of which each question has one (--n 1).
"""

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_job, asked_model, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr continue http://localhost:8000/v1 told --output pairs --ratio 0.5\n"


def configure(parser: argparse.ArgumentParser) -> None:
    add_job(parser, model=True)
    add(parser, "--ratio", default=0.5)
    add(parser, "--with-image")


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mmpr.continuation import Continue

    model, sampling = asked_model(args)
    return run_step(args, Continue(model, ratio=args.ratio, with_image=args.with_image, **sampling), pairs=True)
