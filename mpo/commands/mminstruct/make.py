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

from typing import Any

from mpo.commands.flags import Args
from mpo.commands.mmpr.steps import MAKE, run_make
from mpo.commands.outcome import Report

EXAMPLES = "mpo mminstruct make mminstruct.yaml --output made\n"
ARGUMENTS = MAKE


def run(args: Args) -> Report:
    from mpo.pipelines.mminstruct.config import read_config
    from mpo.pipelines.mminstruct.make import make

    return run_make(args, make, read_config(args.config), _describe)


def _describe(report: dict[str, Any]) -> list[str]:
    first = f"{report['instructions']:,} instructions about {report['images']:,} images, {report['dropped']:,} dropped"
    shown = (
        *("types", "dialogues", "languages", "judgements", "letters", "drops", "per instruction"),
        *("spent", "unused", "image_root"),
    )
    return [first, *(f"  {name}: {report[name]}" for name in shown if report.get(name))]
