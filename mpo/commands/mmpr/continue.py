"""Continue the first half of each response without its image, and write MMPR files of both (Dropout-NTP).

No answer needs to be known. The model is the one that gave the responses, of which each question has one (--n 1).
"""

from mpo.commands.flags import Args, flags
from mpo.commands.mmpr.steps import ASKED, INPUT, JOB, asked_model, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr continue http://localhost:8000/v1 told --output pairs --ratio 0.5\n"
ARGUMENTS = {**ASKED, **INPUT, **JOB, **flags("--with-image", ratio=0.5)}


def run(args: Args) -> Report:
    from mpo.pipelines.mmpr.continuation import Continue

    model, sampling = asked_model(args)
    return run_step(args, Continue(model, ratio=args.ratio, with_image=args.with_image, **sampling), pairs=True)
