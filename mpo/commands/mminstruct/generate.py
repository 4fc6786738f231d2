"""Write instructions with a language model, from the captions alone, check them, and write them for training.

OUTPUT/mminstruct has meta.json (mpo sft, InternVL), llava.json, sharegpt.json, trl.jsonl, and questions.jsonl for mpo mmpr.
"""

from mpo.commands.flags import Args, flags
from mpo.commands.mminstruct.expand import written
from mpo.commands.mmpr.steps import ASKED, INPUT, JOB, asked_model
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mminstruct generate http://localhost:8001/v1 seeded --output made
mpo mminstruct generate http://localhost:8001/v1 seeded --output made --blind http://localhost:8001/v1 --turns 4
"""
ARGUMENTS = {**ASKED, **INPUT, **JOB, **flags("--blind", "--judge", "--domains", form="auto", turns=1)}


def run(args: Args) -> Report:
    from mpo.pipelines.mminstruct.check import Agree, Blind, Check
    from mpo.pipelines.mminstruct.config import Generating, Model
    from mpo.pipelines.mminstruct.generate import Generate
    from mpo.pipelines.mminstruct.make import writer
    from mpo.pipelines.mmpr.make import Records, open_model

    plain, sampling = asked_model(args)
    given = {name: getattr(args, name) for name in ("device", "model_name", "max_tiles")}
    own = Generating(model=Model(model=args.model, **given), form=args.form)
    model, form = writer(own, lambda one: plain if one.extra is None else open_model(one))
    steps = [Generate(model, form=form, domains=args.domains or [], **sampling), Check()]
    steps += [Blind(open_model(Model(model=args.blind)))] if args.blind else []
    steps += [Agree(open_model(Model(model=args.judge)))] if args.judge else []
    return written(args, steps, Records(args.input))
