"""Pair right with wrong responses, and write MMPR files with their meta.json."""

from dataclasses import replace

from mpo.commands.flags import Args, Words, flags
from mpo.commands.mmpr.steps import INPUT, JOB, reviewed, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr pair verified --output pairs --accuracy 0.2 0.8\n"
ARGUMENTS = {**INPUT, **JOB, **flags("--rewrite", "--review", max_pairs=15, accuracy=Words("0 1", (0.0, 1.0)), seed=0)}


def run(args: Args) -> Report:
    from mpo.pipelines.mmpr.make import Records
    from mpo.pipelines.mmpr.pair import Pair

    step = Pair(max_pairs=args.max_pairs, accuracy=args.accuracy, rewrite=args.rewrite, seed=args.seed)
    corrected = reviewed(Records(args.input, as_shown=True), args)
    report = run_step(args, step, corrected, pairs=True)
    return replace(report, text=f"{report.text}\n{corrected}") if corrected else report
