"""`mpo doctor`: check packages, machine, GPUs, disks and the Hub, and run one training step.

A check yields findings. `CHECKS` lists the checks; `examine` runs them in a separate process, where a crash or a timeout ends only
the check that caused it and becomes a finding; `section_text`, `summary` and `as_json` format the report. What PyTorch's
``collect_env`` and ``transformers env`` report is not repeated here: `environment` attaches it.
"""

import faulthandler
import getpass
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal

TRACEBACK = "MPO_TRACEBACK=1 mpo doctor"
"""Shows the traceback; the fix of problems without a specific one."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str  # subject of the check
    value: str  # result of the check
    status: Literal["ok", "note", "problem"] = "ok"  # a problem must be fixed before a run
    fix: str = ""  # command that fixes the problem


@dataclass(frozen=True)
class Section:
    """The findings of one check."""

    title: str
    findings: tuple[Finding, ...]


def attempted(name: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check. If the check raises an error, yield a note and print the traceback to stderr."""
    try:
        yield from check()
    except Exception as error:
        traceback.print_exc()
        yield Finding(name, f"could not be checked: {one_line(first_cause(error))}", "note", TRACEBACK)


def one_line(error: BaseException) -> str:
    r"""Format an error as one line of at most 160 characters.

    >>> one_line(ValueError("no space,\n  nowhere"))
    'ValueError: no space, nowhere'
    """
    text = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    return text if len(text) <= 160 else text[:157] + "..."


def first_cause(error: BaseException) -> BaseException:
    """Return the original error of a chain: lazy imports wrap it once or twice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


STEP = "Training step"
CHECKS: dict[str, tuple[str, ...]] = {
    "Packages": ("packages:required", "packages:private_names"),
    "Optional packages": ("packages:optional", "trial:four_bits"),
    "Machine": ("machine:machine",),
    "GPUs": ("machine:gpus",),
    "Attention of packed rows": ("machine:attention",),
    "Disk": ("machine:disk",),
    "Hugging Face Hub": ("machine:hub",),
    STEP: ("trial:training_step",),
}
"""Title and functions of each check. Functions are imported when they run, because their own imports may be broken."""


def check(title: str, runs: Path) -> Section:
    """Run a check: a key of `CHECKS`. `runs` is the folder of runs."""

    def run(name: str) -> Iterable[Finding]:
        function: Callable[..., Iterable[Finding]] = resolve_name(f"mpo.preflight.{name}")
        return function(runs) if name == "machine:disk" else function()

    found = chain.from_iterable(attempted("this check", partial(run, name)) for name in CHECKS[title])
    return Section(title, tuple(replace(one, value=masked(one.value), fix=masked(one.fix)) for one in found))


SECONDS = 180
"""Timeout of one check in seconds."""
RANKS = re.compile("(LOCAL_)?(RANK|WORLD_SIZE)|(MASTER|PMIX?|OMPI|MV2|ACCELERATE|FSDP|TORCHELASTIC)_")
"""Start of variables that describe the ranks of a job. With them, the training step would wait for the other ranks."""
PROGRAM = "import sys; sys.path[:] = filter(None, sys.path); from mpo.preflight.doctor import serve; serve(sys.argv[1:])"
"""Without the current folder in sys.path, where a file may have the name of a package; the `mpo` script does the same."""


def examine(titles: Sequence[str], runs: Path, seconds: float = SECONDS) -> Iterator[Section]:
    """Run checks, keys of `CHECKS`, one after another, each with a timeout, and yield each section when its check ends."""
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
            yield Section(left.pop(0), (Finding("this check", value, "problem", TRACEBACK),))


def serve(arguments: Sequence[str]) -> None:
    """Run checks and write each section to stdout as a line of JSON; all other output goes to stderr."""
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
    return {name: value for name, value in environ.items() if not RANKS.match(name)}


def _ending(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


ENVIRONMENT = {
    "python -m torch.utils.collect_env": ("-m", "torch.utils.collect_env"),
    "transformers env": ("-c", "from transformers.cli.system import env; env()"),
}


def environment(seconds: float = SECONDS) -> dict[str, str]:
    """Return the reports of PyTorch and transformers about the environment, without private data; `seconds`: timeout of each."""
    found = {}
    for name, arguments in ENVIRONMENT.items():
        command = [sys.executable, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=without_ranks(os.environ))
            errors = (done.stderr.strip() or _ending(done.returncode)).splitlines()
            text = f"failed: {errors[-1]}" if done.returncode else done.stdout
        except subprocess.TimeoutExpired:
            text = f"took longer than {seconds:g} s"
        found[name] = masked(text.strip())
    return found


SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY", re.IGNORECASE)
"""Names of environment variables that contain secrets, if of 8 characters or more: shorter values occur in ordinary text."""


def masked(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """Replace the home folder and the user name by ~ and secrets by ***, and remove colours.

    >>> masked("https://ann:pw@proxy:80 said no to hf_abcdefghijklmnopqrstuvwxyz", {})
    'https://***@proxy:80 said no to ***'
    """
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    secrets = {value for name, value in environ.items() if SECRET.search(name) and len(value) >= 8}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = re.sub(r"(?<=://)[^/@\s]+(?=@)|\bhf_[A-Za-z0-9]{16,}", "***", text)
    private = []
    with suppress(RuntimeError):  # a user without a home folder
        homes = {str(Path.home()), os.path.realpath(Path.home())} - {os.sep}
        private = [re.escape(home) for home in sorted(homes, key=len, reverse=True)]
    with suppress(OSError, KeyError, ImportError):  # a user id without a name, in a container
        private.append(rf"(?<=[/\\]){re.escape(getpass.getuser())}")
    for pattern in private:
        text = re.sub(rf"{pattern}(?![\w.-])", "~", text)
    return text


SYMBOLS = {"ok": " ", "note": "*", "problem": "!"}
WIDEST = 120
"""Maximum length of a line with a finding and its fix, in characters."""
WIDTH = 17
"""Width of the column of names. It is fixed, because each section is printed when its check ends."""


def section_text(section: Section) -> str:
    r"""Format a section without the fixes of its problems, which `summary` lists.

    >>> print(section_text(Section("Machine", (Finding("CPU cores", "2"), Finding("disk", "full", "problem", "rm -r old")))))
    Machine
        CPU cores          2
      ! disk               full
    """
    lines = [section.title]
    for found in section.findings:
        line = f"  {SYMBOLS[found.status]} {found.name:<{WIDTH}}  {found.value}"
        if found.fix and found.status != "problem":
            line += " " if len(line) + len(found.fix) + 4 <= WIDEST else "\n" + " " * (WIDTH + 6)
            line += f"-> {found.fix}"
        lines.append(line)
    return "\n".join(lines)


def summary(sections: Sequence[Section]) -> str:
    """Count the problems and notes, and list the commands that fix the problems."""
    found = [finding for section in sections for finding in section.findings]
    problems, notes = ([finding for finding in found if finding.status == status] for status in ("problem", "note"))
    known = f"{_count(len(notes), 'note')} (*)"
    if not problems:
        tried = any(section.title == STEP and all(one.status == "ok" for one in section.findings) for section in sections)
        return f"No problems, {known}. " + ("The training step succeeded." if tried else "Training was not tested.")
    fixes: dict[str, list[str]] = {}
    for finding in problems:
        fixes.setdefault(finding.fix, []).append(finding.name)
    who = {fix: names[0] + f" and {len(names) - 1} more" * (len(names) > 1) for fix, names in fixes.items()}
    width = max(WIDTH, *map(len, who.values()))
    lines = [f"    {names:<{width}}  {fix}" for fix, names in who.items()]
    return "\n".join([f"{_count(len(problems), 'problem')} (!), {known}. Fix before a run:", *lines])


def as_json(sections: Iterable[Section], reports: Mapping[str, str] | None = None) -> dict[str, object]:
    """Return the findings, and the reports of `environment`, as JSON's values."""
    listed = [asdict(section) for section in sections]
    problems = sum(finding["status"] == "problem" for section in listed for finding in section["findings"])
    return {"problems": problems, "sections": listed, **({"environment": reports} if reports else {})}


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
