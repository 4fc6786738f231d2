"""`mpo doctor`: check the environment for training."""

import argparse
from pathlib import Path

EXPLANATION = """\
Check the environment and print a report to paste into an issue.

The report covers packages (against the supported and tested versions), memory, GPUs, the attention kernel for packed
rows, bitsandbytes, disks and the Hugging Face Hub, and runs one training step of a tiny InternVL. It contains no
colours and no tokens, and shows home folder and user name as ~. Lines marked ! are problems; the commands that fix
them are listed at the end. Lines marked * are notes. The exit status is 1 if there are problems.
"""

EXAMPLES = """\
examples
  mpo doctor                       run all checks
  mpo doctor --dir /data/runs      check the disk that runs will be written to
  mpo doctor --no-step --json      skip the training step, print JSON
  mpo doctor --verbose             add versions of CUDA, drivers and all packages, for an issue
  MPO_TRACEBACK=1 mpo doctor       print the tracebacks of failed checks
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    parser.add_argument("--dir", type=Path, default=Path("."), metavar="DIR", help="folder that runs are written to (default: .)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--verbose", action="store_true", help="add the reports of PyTorch's collect_env and of transformers env")
    parser.add_argument("--no-step", action="store_true", help="skip the training step")


def run(args: argparse.Namespace) -> int:
    from mpo.preflight.doctor import CHECKS, STEP, as_json, environment, examine, section_text, summary

    sections = []
    for section in examine([title for title in CHECKS if not (args.no_step and title == STEP)], args.dir):
        sections.append(section)
        if not args.json:
            print(section_text(section), end="\n\n", flush=True)
    reports = environment() if args.verbose else {}
    if not args.json:
        for name, report in reports.items():
            print(f"{name}\n{report}\n")
    print(as_json(sections, reports) if args.json else summary(sections))
    return int(any(finding.status == "problem" for section in sections for finding in section.findings))
