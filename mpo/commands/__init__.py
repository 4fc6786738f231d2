"""The `mpo` command. One file per command; each parses its arguments and calls the rest of the package."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version

from mpo.commands.errors import user_errors

COMMANDS = {
    "cache": "Inspect, verify and prune cached reference log-probs",
    "convert": "Convert a checkpoint between the official format and transformers'",
    "data": "Validate, inspect, convert, mix, split and deduplicate preference data",
    "demo": "Run the demo: train a small InternVL with MPO on its own responses (five to ten minutes, no GPU)",
    "doctor": "Check the environment and print a report",
    "export": "Export a trained model or adapter to transformers' or the official format",
    "train": "Train a model with a recipe",
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
    selected = next((word for word in arguments if not word.startswith("-")), None)
    for name, help in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help}.")
        if name == selected:
            module = import_module(f"mpo.commands.{name}")
            module.configure(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    return user_errors(lambda: int(options.run(options)))
