"""Make instructions from a configuration: collect, caption, seed, generate, check and expand.

--output becomes a folder with meta.json (mpo sft, InternVL), llava.json, sharegpt.json, trl.jsonl, questions.jsonl (mpo mmpr)
and report.html. CONFIG is YAML:

  images: [{path: photos, domain: folder, licence: CC-BY-4.0}]
  languages: [en, zh]
  caption: {model: {model: "http://localhost:8000/v1", prices: [10, 30]}}
  generate: {model: {model: "http://localhost:8001/v1", prices: [0.5, 1.5]}, rounds: 2}
  blind: {n: 3}  # what is answered without the image, and what the caption contradicts (judge), is dropped; null: not
  expand: [{set: figureqa, path: train1, limit: 1000}]
  manual_price: 0.3
"""

import argparse

from mpo.commands.flags import add, path
from mpo.commands.mmpr.steps import reviewed
from mpo.commands.outcome import Report

EXAMPLES = "mpo mminstruct make mminstruct.yaml --output made\n"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", type=path, help="YAML file of what to make")
    add(parser, "--output", "--workers", "--retry-dropped", "--drop-bad", "--review")


def run(args: argparse.Namespace) -> Report:
    from mpo.pipelines.mminstruct.config import read_config
    from mpo.pipelines.mminstruct.make import make

    if args.output is None:
        raise ValueError("The results need a folder. Give --output DIR.")
    corrected = reviewed((), args)
    how = {"drop_bad": args.drop_bad, "retry_dropped": args.retry_dropped, "correct": corrected and corrected.one}
    report = make(read_config(args.config), args.output, workers=args.workers or 1, **how)
    lines = [f"{report['instructions']:,} instructions about {report['images']:,} images, {report['dropped']:,} dropped"]
    if corrected:
        corrected.finish()
        lines.append(str(corrected))
    shown = ("types", "languages", "judgements", "letters", "drops", "per instruction", "spent", "image_root")
    lines += [f"  {name}: {report[name]}" for name in shown if report[name]]
    return Report("\n".join([*lines, f"{args.output}/report.html", f"{args.output}/meta.json"]), report)
