"""Write instructions with a language model, from the captions alone, check them, and write them for training.

OUTPUT/mminstruct has meta.json (mpo sft, InternVL), llava.json, sharegpt.json, trl.jsonl, and questions.jsonl for mpo mmpr.
"""

import argparse

from mpo.commands.flags import add
from mpo.commands.mminstruct.expand import written
from mpo.commands.mmpr.steps import add_job, asked_model
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mminstruct generate http://localhost:8001/v1 seeded --output made
mpo mminstruct generate http://localhost:8001/v1 seeded --output made --blind http://localhost:8001/v1 --turns 4
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add_job(parser, model=True)
    add(parser, "--form", default="auto")
    add(parser, "--blind", "--judge", "--domains")
    add(parser, "--turns", default=1)


def run(args: argparse.Namespace) -> Report:
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
