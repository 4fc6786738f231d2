"""`mpo doctor`: what this machine has, and what keeps a run from starting on it."""

import argparse
from pathlib import Path

EXPLANATION = """\
Looks at packages (against the versions that mpo supports and was tested with), machine, GPUs, the attention kernel
of packed rows, bitsandbytes, disk and hub, and takes one real training step of a tiny InternVL. The page is made to
be pasted into an issue: no colours, no tokens, home folder and user name as ~. Lines with ! are problems, whose fixes
stand at the end; those with * are worth knowing. Exit status 1 when there are problems.
"""

EXAMPLES = """\
examples
  mpo doctor                       everything
  mpo doctor --dir /data/runs      runs will go there
  mpo doctor --no-step --json      no training step; for programs
  MPO_TRACEBACK=1 mpo doctor       with the tracebacks of what failed
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    parser.add_argument("--dir", type=Path, default=Path("."), metavar="DIR", help="where runs go (default: this folder)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--no-step", action="store_true", help="without the training step")


def run(args: argparse.Namespace) -> int:
    from mpo.doctor.checks import CHECKS, STEP
    from mpo.doctor.examine import examine
    from mpo.doctor.page import as_json, section_text, summary

    sections = []
    for section in examine([title for title in CHECKS if not (args.no_step and title == STEP)], args.dir):
        sections.append(section)
        if not args.json:
            print(section_text(section), end="\n\n", flush=True)
    print(as_json(sections) if args.json else summary(sections))
    return int(any(finding.status == "problem" for section in sections for finding in section.findings))
