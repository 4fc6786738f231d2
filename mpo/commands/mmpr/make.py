"""Make MMPR files from a configuration: sample, verify and pair, or continue where no answer is known.

--output becomes a folder with meta.json, for mpo train data=mmpr, and report.html. Other rules of verify and pair ask
nothing again. Questions may come, go and change: only what is new is asked. Other settings of the sampling need another
folder. CONFIG is YAML:

  sources: [{path: questions.jsonl}]
  models: [{model: "http://localhost:8000/v1"}]
  sample: {prompt: en, n: 8, until: {right: 2, wrong: 2, limit: 32}}
  pair: {accuracy: [0.2, 0.8]}
"""

from typing import Any

from mpo.commands.flags import Args
from mpo.commands.mmpr.steps import MAKE, run_make
from mpo.commands.outcome import Report

EXAMPLES = "mpo mmpr make mmpr.yaml --output mmpr\n"
ARGUMENTS = MAKE


def run(args: Args) -> Report:
    from mpo.pipelines.mmpr.config import read_config
    from mpo.pipelines.mmpr.make import make

    return run_make(args, make, read_config(args.config), _describe)


def _describe(report: dict[str, Any]) -> list[str]:
    first = f"{report['questions']:,} questions, {report['pairs']:,} pairs"
    shown = {**report["sources"][0], **{name: report[name] for name in ("spent", "unused") if name in report}}
    return [first, *(f"  {name}: {value}" for name, value in shown.items())]
