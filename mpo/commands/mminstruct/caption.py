"""Describe the images of `mpo mminstruct collect` with a vision-language model.

Captions that are too short, repeat themselves, refuse, or are in another language are asked for again, then dropped.
"""

from mpo.commands.flags import Args, flags
from mpo.commands.mmpr.steps import ASKED, INPUT, JOB, asked_model, run_step
from mpo.commands.outcome import Report

EXAMPLES = "mpo mminstruct caption http://localhost:8000/v1 images --output told --language en --language zh\n"
ARGUMENTS = {**ASKED, **INPUT, **JOB, **flags("--language", "--domains", attempts=2)}


def run(args: Args) -> Report:
    from mpo.pipelines.job import SETTINGS
    from mpo.pipelines.mminstruct.caption import InLanguages, check_sees
    from mpo.pipelines.mminstruct.make import caption_steps
    from mpo.pipelines.mmpr.make import Records

    model, sampling = asked_model(args)
    records = InLanguages(Records(args.input), args.language or ["en"])
    if not (args.output / SETTINGS).exists():
        check_sees(model)
    return run_step(args, caption_steps(model, args.attempts, domains=args.domains or [], **sampling), records)
