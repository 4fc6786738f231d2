"""Read a public set as instructions of the four types, check them, and write them for training.

SET is geoqa_plus, tabmwp, dvqa, figureqa or mminstruct (qa_en.jsonl, caption_cn.jsonl, caption_en.jsonl) in its published
layout, or fields, for any JSONL, JSON or Parquet file whose fields are named by --field.
"""

from typing import Any

from mpo.commands.flags import Args, arg, flags, path
from mpo.commands.mmpr.steps import JOB, ran
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo mminstruct expand figureqa train1 --output figures --image-domain numerical_calculation --licence CDLA-Sharing-1.0
mpo mminstruct expand fields cells.jsonl --output cells --field question=q --field answer=a --field image=file
"""
ARGUMENTS = {
    "set": arg("geoqa_plus, tabmwp, dvqa, figureqa, mminstruct or fields", "SET"),
    "path": arg("its file of questions, or the folder that has it", "PATH", type=path),
    **flags("--field", "--image-domain", "--domains", "--licence", "--image-root", "--limit", turns=1),
    **JOB,
}


def run(args: Args) -> Report:
    from mpo.pipelines.mminstruct.check import Check
    from mpo.pipelines.mminstruct.domains import load_domains
    from mpo.pipelines.mminstruct.expand import Expansion

    wrong = [one for one in args.field or [] if "=" not in one]
    if wrong:
        raise ValueError(f"--field={wrong[0]} is not of the form OURS=THEIRS. Write it such as question=q.")
    own = {name: getattr(args, name) for name in ("image_root", "licence", "limit", "drop_bad")}
    own["domain"] = args.image_domain
    own["fields"] = dict(one.split("=", 1) for one in args.field or [])
    return written(args, [Check()], Expansion(args.set, args.path, domains=load_domains(args.domains or []), **own))


def written(args: Args, steps: list[Any], records: Any) -> Report:
    """Run steps over records, and write the instructions for training."""
    from mpo.pipelines.mminstruct.config import Config
    from mpo.pipelines.mminstruct.output import write
    from mpo.pipelines.report import summarize

    job, report = ran(args, steps, records)
    made = write(args.output / "mminstruct", Config(turns=args.turns), None, [(job, report)])
    return Report(f"{summarize(report)}\n{made['instructions']:,} instructions\n{args.output}/mminstruct/meta.json", made)
