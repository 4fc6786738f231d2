"""Check the environment and print a report to paste into an issue.

The report covers packages (against the supported and tested versions), system, GPUs, the attention kernel for packed
rows, bitsandbytes, disks and the Hugging Face Hub, and runs one training step of a tiny InternVL. It contains no
colours and no tokens, and shows home folder and user name as ~. Lines marked ! are problems; the commands that fix
them are listed at the end. Lines marked * are notes. The exit status is 1 if there are problems.
"""

import argparse
import json
from pathlib import Path

from mpo.commands.flags import add
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo doctor                          run all checks
mpo doctor --run-dir /data/runs     check the disk that runs will be written to
mpo doctor --no-step --json         skip the training step, print JSON
MPO_TRACEBACK=1 mpo doctor          print the tracebacks of failed checks
"""


def configure(parser: argparse.ArgumentParser) -> None:
    add(parser, "--run-dir", default=Path("."))
    add(parser, "--step", default=True)


def run(args: argparse.Namespace) -> Report:
    from mpo.preflight.doctor.checks import CHECKS, STEP
    from mpo.preflight.doctor.examine import examine
    from mpo.preflight.doctor.page import as_json, section_text, summary

    sections = []
    for section in examine([title for title in CHECKS if args.step or title != STEP], args.run_dir):
        sections.append(section)
        if not args.json:
            print(section_text(section), end="\n\n", flush=True)
    data = json.loads(as_json(sections))
    return Report(summary(sections), data, int(data["problems"] > 0))
