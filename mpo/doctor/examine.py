"""Run the checks in a Python of their own: what crashes it, or hangs, is one more finding and ends only its own check."""

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

from mpo.doctor.checks import check
from mpo.doctor.finding import TRACEBACK, Finding, Section

SECONDS = 180
"""The longest that one check may take."""

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
"""Beginnings of variables that make a process one of many: alone, it would wait for the others."""

PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from mpo.doctor.examine import serve; serve(sys.argv[1:])"
"""Without the current folder, in which a file may be called like a package; as the `mpo` script has it."""


def examine(titles: Sequence[str], runs: Path, seconds: float = SECONDS) -> Iterator[Section]:
    """Run checks one after the other and give each section as soon as it is there.

    Args:
        titles: of `mpo.doctor.checks.CHECKS`.
        runs: folder of runs.
        seconds: that each may take.
    """
    left = list(titles)
    while left:
        with tempfile.TemporaryFile("w+", errors="replace") as noise:
            command = [sys.executable, "-c", PROGRAM, os.path.abspath(runs), str(seconds), *left]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise, text=True, env=alone(os.environ)) as child:
                assert child.stdout is not None
                for line in child.stdout:
                    section = json.loads(line)
                    left.remove(section["title"])
                    yield Section(section["title"], tuple(Finding(**finding) for finding in section["findings"]))
            noise.seek(0)
            said = noise.read()
        if os.environ.get("MPO_TRACEBACK"):
            print(said, file=sys.stderr)
        if left:
            value = f"took longer than {seconds:g} s" if "Timeout (" in said else f"Python {_ending(child.returncode)}"
            title = left.pop(0)
            yield Section(title, (Finding("this check", value, "problem", TRACEBACK),))


def serve(arguments: Sequence[str]) -> None:
    """Run checks and write each section as a line of JSON; what anything else prints goes to stderr.

    Args:
        arguments: folder of runs, seconds a check, titles.
    """
    runs, seconds, *titles = arguments
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    faulthandler.enable()
    for title in titles:
        faulthandler.dump_traceback_later(float(seconds), exit=True)
        print(json.dumps(asdict(check(title, Path(runs)))), file=channel, flush=True)
        faulthandler.cancel_dump_traceback_later()


def alone(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without the variables of a job of many processes."""
    return {name: value for name, value in environ.items() if not name.startswith(RANKS)}


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
