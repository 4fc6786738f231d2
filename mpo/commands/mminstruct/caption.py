"""Describe the images of `mpo mminstruct collect` with a vision-language model.

Captions that are too short, repeat themselves, refuse, or are in another language are asked for again, then dropped.
"""

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_job, asked_model, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mminstruct caption http://localhost:8000/v1 images --output told --language en --language zh\n"


def configure(parser: argparse.ArgumentParser) -> None:
    add_job(parser, model=True)
    add(parser, "--language", "--domains")
    add(parser, "--attempts", default=2)


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.job import SETTINGS
    from mpo.pipelines.mminstruct.caption import InLanguages, check_sees
    from mpo.pipelines.mminstruct.make import caption_steps
    from mpo.pipelines.mmpr.make import Records

    model, sampling = asked_model(args)
    records = InLanguages(Records(args.input), args.language or ["en"])
    if not (args.output / SETTINGS).exists():
        check_sees(model)
    return run_step(args, caption_steps(model, args.attempts, domains=args.domains or [], **sampling), records)
