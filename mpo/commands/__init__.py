"""Train vision-language models with Mixed Preference Optimization (arXiv 2411.10442).

The exit status is 0 on success, 1 if a problem was found or the command failed, and 2 for wrong usage or invalid input.
MPO_TRACEBACK=1 shows the traceback of an error.
"""

import argparse
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from inspect import cleandoc
from io import TextIOWrapper
from itertools import takewhile
from pkgutil import iter_modules
from typing import Any, NoReturn

from mpo.commands.flags import flags
from mpo.commands.outcome import leave_interrupts_to_parent, reported, user_errors
from mpo.io import did_you_mean
from mpo.visible import visible

EXAMPLES = """\
mpo doctor                                                        check the environment
mpo data validate pairs.jsonl                                     find problems in a data set
mpo train experiment=internvl3_8b_lora data.path=pairs.jsonl      train a model
mpo generate runs/first "What is in the image?" --image a.png     ask a trained model
mpo export runs/first InternVL3-8B-mpo                            write a model to serve
"""


class Parser(argparse.ArgumentParser):
    """Flags in full, and a hint for one that does not exist."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown here, where the flags of the action are known, and before an argument is said to be missing."""
        words = [*(sys.argv[1:] if args is None else args)]
        if self._subparsers:
            own = [*takewhile(lambda word: word.startswith("-"), words)]
        else:
            own = [word for word in takewhile("--".__ne__, words) if re.match(r"--\S+$", word)]
        self._refuse([word for word in own if word.split("=")[0] not in self._option_string_actions])
        found, unknown = super().parse_known_args(words, namespace)
        self._refuse([word for word in unknown if word.startswith("-")] and unknown)
        return found, unknown

    def _refuse(self, unknown: Sequence[str]) -> None:
        if unknown:
            flag = next(word for word in unknown if word.startswith("-"))
            near = did_you_mean(flag.split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{near}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += f".{did_you_mean(str(value), action.choices or ())}"
            raise

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        super().error(visible(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mpo`; returns the exit status."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    # peft imports bitsandbytes whatever the model is, and that warns of a kernel for 4-bit weights on a CPU.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if argv is None:
        leave_interrupts_to_parent()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["train"], ["sft"]):  # Hydra reads its own command line
        return int(import_module(f"mpo.commands.{arguments[0]}").run(arguments[1:]))
    options = command_line(arguments).parse_args(arguments)
    return user_errors(lambda: reported(options))


def command_line(arguments: Sequence[str] = ()) -> Parser:
    """The parser of all commands. Each is a module with `ARGUMENTS` and `run`, or with actions (`mpo.commands.flags.action`).

    With arguments that begin with a command's name, the others are left out: their imports are most of the time to start.
    """
    parser = Parser(prog="mpo", **_texts(sys.modules[__name__]))
    parser.add_argument("--version", action="version", version=f"mpo-trainer {version('mpo-trainer')}")
    names = [one.name for one in iter_modules(__path__)]
    named = [name for name in names if name in arguments[:1]]
    _add_commands(parser, {name: import_module(f"{__name__}.{name}") for name in named or names}, "COMMAND")
    return parser


def _add_commands(parser: Parser, found: Mapping[str, Any], kind: str) -> None:
    choices = parser.add_subparsers(title=f"{kind.lower()}s", metavar=kind, required=True)
    for name, one in found.items():
        actions = {own.__name__.rstrip("_"): own for own in vars(one).values() if own is not one and hasattr(own, "ARGUMENTS")}
        if not actions and not hasattr(one, "run"):
            continue
        texts = _texts(one, [own.EXAMPLES.splitlines()[0] for own in actions.values()])
        command = choices.add_parser(name, help=texts["description"].split("\n")[0].rstrip(".:"), **texts)
        if actions:
            _add_commands(command, actions, "ACTION")
        elif hasattr(one, "ARGUMENTS"):
            for argument, how in {**one.ARGUMENTS, **flags("--json")}.items():
                command.add_argument(argument, **how)
            command.set_defaults(run=one.run, default_of=command.get_default)


def _texts(command: Any, of_actions: Sequence[str] = ()) -> dict[str, Any]:
    examples = "\n  ".join(of_actions or getattr(command, "EXAMPLES", "").splitlines())
    return {"description": cleandoc(command.__doc__ or command.__name__), "epilog": f"examples\n  {examples}"}
