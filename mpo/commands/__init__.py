"""The `mpo` command. One file per command; each only reads its configuration and calls the rooms above."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version

from mpo.visible import visible

COMMANDS = {
    "cache": "look into, check and clean up a folder of cached reference log-probs",
    "convert": "between the official form of a checkpoint and transformers'",
    "data": "check, look at, convert, mix, split and clean preference data",
    "demo": "five to ten minutes: a small InternVL learns to read images, then from its own right and wrong answers",
    "doctor": "what this machine has, and what keeps a run from starting on it, to paste into an issue",
    "export": "a trained model or adapter -> a folder to load and serve",
    "train": "train a model on pairs of answers, from a recipe",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mpo`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:  # Hydra reads its own command line
        from mpo.commands import train

        return train.run(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="mpo", description="Train vision-language models with Mixed Preference Optimization (arXiv 2411.10442)."
    )
    parser.add_argument("--version", action="version", version=f"mpo-trainer {version('mpo-trainer')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        if name == asked:
            module = import_module(f"mpo.commands.{name}")
            module.configure(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return user_errors(lambda: int(options.run(options)))


_NO_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def user_errors(work: Callable[[], int], who: str = "") -> int:
    """Run `work` and print a user's mistake as one message instead of a traceback (MPO_TRACEBACK=1 shows it).

    A file that is gone or cannot be read is such a mistake.
    """
    try:
        return work()
    except (ValueError, FloatingPointError, *_NO_FILE) as error:
        if os.environ.get("MPO_TRACEBACK") or (isinstance(error, OSError) and error.filename is None):
            raise
        message = f"{error.filename}: {error.strerror}. Put it back or fix its path." if isinstance(error, OSError) else error
        print(visible(f"mpo: error: {who}{message}"), file=sys.stderr)
        return 2
