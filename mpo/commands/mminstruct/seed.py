"""Choose random seed questions for each image with a caption: of its domain, for each type and round."""

from mpo.commands.flags import Args, flags
from mpo.commands.mmpr.steps import INPUT, JOB, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mminstruct seed told --output seeded --rounds 2 --type judgement --type short --domains kitchen.yaml\n"
ARGUMENTS = {**INPUT, **JOB, **flags("--type", "--domains", rounds=1, seed=0)}


def run(args: Args) -> Report:
    from mpo.pipelines.mminstruct.domains import TYPES
    from mpo.pipelines.mminstruct.generate import Seed

    own = {"types": args.type or TYPES, "rounds": args.rounds, "domains": args.domains or []}
    return run_step(args, [Seed(seed=args.seed, **own)])
