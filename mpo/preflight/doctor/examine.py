"""Run the checks in a separate process. A crash or a timeout ends only the check that caused it and becomes a finding."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mpo.preflight.doctor.checks import check
from mpo.preflight.doctor.finding import TRACEBACK, Finding, Section

SECONDS = 180
"""Timeout of one check in seconds."""

RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "MV2_",
    "ACCELERATE_",
    "FSDP_",
    "TORCHELASTIC_",
)
"""Prefixes of variables that describe the ranks of a job. With them, the training step would wait for the other ranks."""

PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from mpo.preflight.doctor.examine import serve; serve(sys.argv[1:])"
"""Without the current folder in sys.path, where a file may have the name of a package; the `mpo` script does the same."""


def examine(titles: Sequence[str], runs: Path, seconds: float = SECONDS) -> Iterator[Section]:
    """Run checks one after another and yield each section when its check ends.

    Args:
        titles: keys of `mpo.preflight.doctor.checks.CHECKS`.
        runs: folder of runs.
        seconds: timeout of each check.
    """
    left = list(titles)
    while left:
        with tempfile.TemporaryFile("w+", errors="replace") as noise:
            command = [sys.executable, "-c", PROGRAM, os.path.abspath(runs), str(seconds), *left]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True, env=without_ranks(os.environ)) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    section = json.loads(line)
                    left.remove(section["title"])
                    yield Section(section["title"], tuple(Finding(**finding) for finding in section["findings"]))
            noise.seek(0)
            output = noise.read()
        if os.environ.get("MPO_TRACEBACK"):
            print(output, file=sys.stderr)
        if left:
            value = f"took longer than {seconds:g} s" if "Timeout (" in output else f"Python {_ending(child.returncode)}"
            title = left.pop(0)
            yield Section(title, (Finding("this check", value, "problem", TRACEBACK),))


def serve(arguments: Sequence[str]) -> None:
    """Run checks and write each section to stdout as a line of JSON; all other output goes to stderr.

    Args:
        arguments: folder of runs, timeout of each check in seconds, titles.
    """
    runs, seconds, *titles = arguments
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    for title in titles:
        faulthandler.dump_traceback_later(float(seconds), exit=True)
        print(json.dumps(asdict(check(title, Path(runs)))), file=channel, flush=True)
        faulthandler.cancel_dump_traceback_later()


def without_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of a job with several ranks."""
    return {name: value for name, value in environ.items() if not name.startswith(RANKS)}


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
