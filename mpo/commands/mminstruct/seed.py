"""Choose random seed questions for each image with a caption: of its domain, for each type and round."""

import argparse

from mpo.commands.flags import add
from mpo.commands.mmpr.steps import add_job, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mminstruct seed told --output seeded --rounds 2 --type judgement --type short --domains kitchen.yaml\n"


def configure(parser: argparse.ArgumentParser) -> None:
    add_job(parser)
    add(parser, "--type", "--domains")
    add(parser, "--rounds", default=1)
    add(parser, "--seed", default=0)


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mminstruct.domains import TYPES
    from mpo.pipelines.mminstruct.generate import Seed

    own = {"types": args.type or TYPES, "rounds": args.rounds, "domains": args.domains or []}
    return run_step(args, [Seed(seed=args.seed, **own)])
