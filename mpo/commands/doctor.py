"""Check the environment and print a report to paste into an issue.

The report covers packages (against the supported and tested versions), memory, GPUs, the attention kernel for packed
rows, bitsandbytes, disks and the Hugging Face Hub, and runs one training step of a tiny InternVL. It contains no
colours and no tokens, and shows home folder and user name as ~. Lines marked ! are problems; the commands that fix
them are listed at the end. Lines marked * are notes. The exit status is 1 if there are problems.
"""

from pathlib import Path

from mpo.commands.flags import Args, flags
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo doctor                          run all checks
mpo doctor --run-dir /data/runs     check the disk that runs will be written to
mpo doctor --no-step --json         skip the training step, print JSON
mpo doctor --verbose                add versions of CUDA, drivers and all packages, for an issue
MPO_TRACEBACK=1 mpo doctor          print the tracebacks of failed checks
"""
ARGUMENTS = flags("--verbose", run_dir=Path("."), step=True)


def run(args: Args) -> Report:
    from mpo.preflight.doctor import CHECKS, STEP, as_json, environment, examine, section_text, summary

    sections = []
    for section in examine([title for title in CHECKS if args.step or title != STEP], args.run_dir):
        sections.append(section)
        if not args.json:
            print(section_text(section), end="\n\n", flush=True)
    reports = environment() if args.verbose else {}
    if not args.json:
        for name, report in reports.items():
            print(f"{name}\n{report}\n")
    data = as_json(sections, reports)
    return Report(summary(sections), data, int(bool(data["problems"])))
