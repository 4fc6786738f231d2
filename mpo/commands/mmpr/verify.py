"""Verify sampled responses by the known answers, without sampling again."""

from mpo.commands.flags import Args, flags
from mpo.commands.mmpr.steps import INPUT, JOB, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr verify sampled --output verified --answer-format any\n"
ARGUMENTS = {**INPUT, **JOB, **flags("--answer-format", "--kind", "--tolerance")}


def run(args: Args) -> Report:
    from mpo.pipelines.mmpr.verify import Verify

    return run_step(args, Verify(format=args.answer_format, kind=args.kind, tolerance=args.tolerance))
