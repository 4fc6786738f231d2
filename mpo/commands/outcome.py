"""How a command ends: its report on stdout as text or JSON, an error as one message on stderr, and its exit status."""

import argparse
import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

from mpo.visible import visible

IN_WORKER = re.compile(r"\ACaught (\w+) in DataLoader worker process \d+\.\nOriginal Traceback .*\n(?:[\w.]+\.)?\1: ", re.DOTALL)
"""What torch puts before the message of an error in a worker of a data loader: its traceback."""
_NO_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)


@dataclass(frozen=True)
class Report:
    """What a command reports."""

    text: str  # the report as text; empty if it was printed as it came
    data: Mapping[str, Any] = field(default_factory=dict)  # the report as JSON (`--json`)
    status: int = 0  # exit status, 1 if a problem was found


class Failed(Exception):
    """A command that could not do its work, although its arguments are valid: exit status 1."""


def reported(options: argparse.Namespace) -> int:
    """Run a command, print its report, and return its exit status. With `--json` nothing else is on stdout."""
    with stdout_to_stderr() if options.json else nullcontext():
        report: Report = options.run(options)
    if options.json:
        print_json(report.data)
    elif report.text:
        print(visible(report.text))
    sys.stdout.flush()
    return report.status


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON document, with paths and the numbers of numpy."""

    def plain(value: Any) -> Any:
        return value.item() if hasattr(value, "item") else os.fspath(value)

    print(json.dumps(data, indent=2, default=plain, allow_nan=False))


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what libraries and child processes print to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def leave_interrupts_to_parent() -> None:
    """Let processes that are forked from here ignore Ctrl-C, which reaches them too: this one ends them, without tracebacks."""

    def ignored_in_child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        masked(signal.SIG_UNBLOCK)

    def masked(how: int) -> None:  # or an interrupt during the fork would reach the child before it is ignored there
        signal.pthread_sigmask(how, {signal.SIGINT})

    os.register_at_fork(
        before=lambda: masked(signal.SIG_BLOCK),
        after_in_parent=lambda: masked(signal.SIG_UNBLOCK),
        after_in_child=ignored_in_child,
    )


def user_errors(work: Callable[[], int], who: str = "") -> int:
    """Run `work`. Print a user's error as one message instead of a traceback (MPO_TRACEBACK=1 shows the traceback).

    Returns:
        the status of `work`; 2 for an invalid argument or input; 1 for another failure: of a disk, a server, a loss that is not
        finite; 130 after Ctrl-C.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\nmpo: {who}interrupted", file=sys.stderr)
        return 130
    except (ValueError, Failed, FloatingPointError, OSError) as error:
        if os.environ.get("MPO_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 1
        message = IN_WORKER.sub("", str(error)).rstrip()
        if isinstance(error, OSError) and error.strerror is not None:
            message = f"{error.strerror}." if error.filename is None else f"{error.filename}: {error.strerror}."
            if isinstance(error, FileNotFoundError):
                message += " Check that the file exists and that its path is correct."
            elif isinstance(error, FileExistsError):
                message += " Give another path, or move what has this name."
            elif error.filename is None:
                message += " MPO_TRACEBACK=1 shows where it happens."
        print(visible(f"mpo: error: {who}{message}"), file=sys.stderr)
        return 2 if isinstance(error, (ValueError, *_NO_FILE)) else 1


def _nobody_reads() -> bool:
    """Whether the reader of stdout is gone, as of `mpo data show ... | head`; what is left to print is then dropped."""
    poll = select.poll()
    poll.register(1, 0)
    gone = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone
