"""The flags of all commands. Each is described once, so that it has one spelling, one type and one help text everywhere.

And checks before any work is done: of flags that would do nothing, outputs that cannot be written, and files that are a user's.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple


def number(kind: type, low: float, high: float = math.inf, *, open_low: bool = False) -> Callable[[str], Any]:
    """The type of a finite number, an int or a float, between `low` (included unless `open_low`) and `high` (included)."""

    def read(text: str) -> Any:
        with suppress(ValueError, OverflowError):
            value = kind(text)
            if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
                return value
        least = f"above {low:g}" if open_low else f"of {low:g} or more"
        most = "" if math.isinf(high) else f", {high:g} at most"
        raise argparse.ArgumentTypeError(f"expected a {'whole ' * (kind is int)}number {least}{most}, got {text!r}")

    return read


def limit(kind: type, high: float = math.inf) -> Callable[[str], Any]:
    """The type of a number above 0, or ``off``."""
    return lambda text: text if text == "off" else number(kind, 0, high, open_low=True)(text)


def path(text: str) -> Path:
    """The type of a path: ``~`` is the home folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(os.path.expanduser(text))


COUNT, SEED, ABOVE_0 = number(int, 1), number(int, 0), number(float, 0, open_low=True)
FLAG: dict[str, Any] = {"action": "store_true"}
SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
Args = argparse.Namespace
REQUIRED = object()
"""In the place of a default."""


class Words(NamedTuple):
    """A default that the help text says in words; None: as if the flag did not exist."""

    words: str
    value: Any = None


def arg(help: str, metavar: str | tuple[str, ...] | None = None, **how: Any) -> dict[str, Any]:
    """What `add_argument` takes besides a name."""
    return {"help": help, **({} if metavar is None else {"metavar": metavar}), **how}


def repeated(help: str, metavar: str | tuple[str, ...], **how: Any) -> dict[str, Any]:
    """Those of one that may be given several times."""
    return arg(f"{help}; may be repeated", metavar, action="append", **how)


def count(help: str) -> dict[str, Any]:
    """Those of a number of things, 1 or more."""
    return arg(help, "N", type=COUNT)


FLAGS: dict[str, dict[str, Any]] = {
    "--accuracy": arg(
        "smallest and largest fraction of right responses of a question that gets pairs",
        ("LOW", "HIGH"),
        type=number(float, 0, 1),
        nargs=2,
    ),
    "--answer-format": arg("format of a final answer (default: that of the prompt)", choices=("line", "boxed", "any")),
    "--attempts": count("number of times that a caption is asked for"),
    "--base": arg("base model of an adapter (default: as in its config)", "MODEL"),
    "--blind": arg("language model, or URL of a server, that is asked each question without its image", "MODEL"),
    "--check": arg("read the result again and compare it with the source", **SWITCH),
    "--classifier": arg("vision-language model, or URL of a server, that names the domains of images", "MODEL"),
    "--clip": arg("CLIP-like model that finds images by text (folder or name on the Hub)", "MODEL"),
    "--device": arg("device to run on, such as cpu or cuda:1 (default: the first GPU, if there is one)", "DEVICE"),
    "--domain": repeated("what quality means (general, code, math, knowledge, writing), also as SOURCE=DOMAIN", "DOMAIN"),
    "--domains": repeated("YAML file of a further domain", "FILE", type=path),
    "--drop-bad": arg("drop records that cannot be read or asked, such as without their image, instead of stopping", **FLAG),
    "--dry-run": arg("show the changes, or the harness's commands, without making or running them", **FLAG),
    "--dtype": arg("dtype of the weights; auto: as in the checkpoint", choices=("auto", "bfloat16", "float16", "float32")),
    "--eval-by": arg("keep the parts disjoint in questions, in images, or in both", choices=("both", "image", "question")),
    "--eval-path": arg("evaluation data set, in the same format; checked for leakage", "PATH"),
    "--eval-size": arg("size of the evaluation part: a fraction below 1 or a number of pairs", "N", type=ABOVE_0),
    "--exact": arg("remove exact duplicates only", **FLAG),
    "--export": arg("write the corrected records to a new file of the same type, and end", "OUT", type=path),
    "--field": repeated("name of a field of the set, such as question=q", "OURS=THEIRS"),
    "--form": arg("form of the responses; auto: JSON where the server keeps to a schema", choices=("auto", "tags", "json")),
    "--format": arg("format of the records, such as trl or mmpr (default: detected)", "FORMAT"),
    "--from-log": repeated("log of another review of FILE, or of a copy, whose decisions are added", "LOG", type=path),
    "--harness": arg("run tasks of this harness instead, in an environment of its own", choices=("lmms-eval",)),
    "--heuristics": arg("check the form of texts", **SWITCH),
    "--host": arg("address to serve at; any other lets other machines in, unencrypted", "ADDRESS"),
    "--html": arg("HTML page to write", "FILE", type=path),
    "--id": repeated("show the records with this id", "ID"),
    "--image": repeated("image to show before the question", "FILE", type=path),
    "--image-bits": arg(
        "maximum number of differing hash bits for two images to be compared, 0 to 3", "N", type=int, choices=range(4)
    ),
    "--image-domain": arg(
        "domain of images; of mminstruct collect also folder (its name), prompt (--classifier) or query (--clip)", "DOMAIN"
    ),
    "--image-root": arg("folder that image paths are relative to (default: the file's folder)", "DIR"),
    "--images": arg(
        "storage of images: by path, as copies next to TARGET, or as bytes inside it (default: path for JSONL, else bytes)",
        choices=("path", "copy", "bytes"),
    ),
    "--include-path": arg("folder with tasks of your own for the harness", "DIR"),
    "--json": arg("print the result as one JSON document", **FLAG),
    "--judge": arg("language model, or URL of a server, that compares answers with captions", "MODEL"),
    "--kind": arg("kind of answer of all questions, such as number (default: their own)", "KIND"),
    "--language": arg("language to write in; may be repeated (default: en)", choices=("en", "zh"), action="append"),
    "--licence": arg("licence of what has none of its own", "TEXT"),
    "--like": arg("official checkpoint to copy config, tokenizer and code from", "DIR", type=path),
    "--limit": count("maximum number of records"),
    "--max-frames": count("maximum number of frames of a video (data.frames.max)"),
    "--max-line": arg("maximum number of characters of a line; off: any", "N", type=limit(int)),
    "--max-lines": arg(
        "maximum part of a text in lines that are a fourth copy or a later one; off: any", "FRACTION", type=limit(float, 1)
    ),
    "--max-loop": arg("maximum number of words that are repeated in a loop at the end of a text; off: any", "N", type=limit(int)),
    "--max-length": count("maximum number of tokens of prompt and completion (trainer.max_length)"),
    "--max-new-tokens": count("maximum length of the response, in tokens"),
    "--max-ngrams": arg("maximum number of words in a row without a new 5-gram; off: any", "N", type=limit(int)),
    "--max-run": arg(
        "maximum number of equal groups of characters in a row, four times as many of signs; off: any", "N", type=limit(int)
    ),
    "--max-pairs": count("maximum number of pairs of a question"),
    "--max-tiles": count("maximum number of tiles of all images of a prompt (model.max_tiles)"),
    "--max-zeros": arg("maximum number of zeros in a row; off: any", "N", type=limit(int)),
    "--min-side": count("shortest side of an image that is large enough, in pixels"),
    "--mode": arg(
        "ask for the answer alone, for a chain of thought, for both, or with the question as it is",
        choices=("direct", "cot", "both", "plain"),
    ),
    "--metadata": arg("field that is only metadata; may be repeated (data.metadata)", "FIELD", action="append"),
    "--min-frames": count("minimum number of frames of a video (data.frames.min)"),
    "--min-quality": arg("lowest score for quality that is kept", "SCORE", type=number(float, 0, 10)),
    "--min-repetition": arg("lowest score for repetition that is kept", "SCORE", type=number(float, 0, 10)),
    "--model": arg(
        "model whose processor counts tokens and tiles, not its weights; data filter: model, or URL of a server, to ask", "MODEL"
    ),
    "--model-name": arg("model to use on a server with several (default: its first one)", "NAME"),
    "--n": count("responses per question"),
    "--num-proc": count("number of processes (default: one per CPU core)"),
    "--old": arg("remove what earlier versions of mpo wrote and this one cannot read, too", **FLAG),
    "--origin": arg("where images come from that do not say it themselves", "TEXT"),
    "--output": arg("file or folder to write", "PATH", type=path),
    "--output-format": arg("format to write"),
    "--output-image-root": arg(
        "folder that image paths in the written JSONL are relative to (default: their deepest common folder)", "DIR"
    ),
    "--point": repeated(
        "point of the tile to look from, fractions of its width and height", ("X", "Y"), type=number(float, 0, 1), nargs=2
    ),
    "--points": count("look from a grid of N x N points"),
    "--port": arg("port to serve at", "PORT", type=number(int, 0, 65535)),
    "--prices": arg("prices of a million tokens, for the cost", ("PROMPT", "COMPLETION"), type=number(float, 0), nargs=2),
    "--prompt": arg("prompt around {question} and {choices}; of mpo mmpr: its name, or a Jinja template", "TEXT"),
    "--quality": arg("let the model judge quality", **SWITCH),
    "--query": arg("text that finds images; may be repeated (default: of the domains)", "TEXT", action="append"),
    "--questions": arg("file of questions: JSONL, JSON or Parquet", "FILE", type=path),
    "--quick": arg("run a smaller demo of about a minute; its accuracy is low", **FLAG),
    "--ratio": arg("fraction of a response that is kept", "FRACTION", type=number(float, 0, 0.99)),
    "--removed": arg("file to list the removed pairs in (default: TARGET.removed.jsonl)", "FILE", type=path),
    "--repetition": arg("let the model judge repetition", **SWITCH),
    "--restart": arg("delete an earlier demo in the output folder and run all stages", **FLAG),
    "--retrieve": count("maximum number of images of a query"),
    "--retry-dropped": arg("try the records again that were dropped", **FLAG),
    "--review": arg("apply the decisions of this log of mpo review: records that were corrected or rejected", "LOG", type=path),
    "--reviewer": arg("who reviews; repeated: several, each with a link of their own", "NAME", action="append"),
    "--rewrite": arg("put the ground truth in the place of a right answer that contains it; the pair says so", **FLAG),
    "--rounds": count("how often each type is asked for"),
    "--run-dir": arg("folder that runs are written to (run_dir)", "DIR", type=path),
    "--reference": arg("model that the models were trained from, for --scorer=reward", "MODEL"),
    "--scorer": repeated(
        "for best of N: logprob or reward (against --reference) of the measured model, or another (reward=MODEL); "
        "prm=MODEL; or MODULE:FUNCTION or FILE.py:FUNCTION of your own",
        "SCORER",
    ),
    "--seed": arg("random seed", "N", type=SEED),
    "--shard-gb": arg("maximum size of a weight shard", "GB", type=ABOVE_0),
    "--shuffle": arg("shuffle the records instead of keeping their order", **FLAG),
    "--split": arg("split of a folder or a data set on the Hub", "NAME"),
    "--step": arg("run one training step of a tiny model", **SWITCH),
    "--prefix": arg("start of the response, which the model goes on from", "TEXT"),
    "--system": arg("system prompt", "TEXT"),
    "--video": repeated("video to show before the question", "FILE", type=path),
    "--tasks": arg("names of tasks of the harness", "TASK,TASK"),
    "--temperature": arg("sampling temperature; 0: greedy", "T", type=number(float, 0)),
    "--tile": arg("tile of the image, from 0 (default: the last, which shows all of the image)", "N", type=SEED),
    "--tile-limit": arg(
        "maximum number of tiles of all images of a prompt; repeated: a measurement with each", "N", action="append", type=COUNT
    ),
    "--tower": arg("CLIP vision tower of an official LLaVA that lacks its weights", "DIR", type=path),
    "--train": repeated("pairs, conversations or questions of training, to search for those of the benchmarks", "PATH"),
    "--threshold": arg("minimum overlap of the texts of near duplicates", "FRACTION", type=number(float, 0, 1)),
    "--tolerance": arg("tolerance of all answers (default: of their kind)", "FRACTION", type=number(float, 0)),
    "--top-k": arg("sample from the K most likely tokens; 0: from all", "K", type=SEED),
    "--top-p": arg(
        "sample from the smallest set of most likely tokens with this total probability",
        "P",
        type=number(float, 0, 1, open_low=True),
    ),
    "--turns": count("instructions of a conversation"),
    "--type": arg(
        "type of instructions, or dialogue: several rounds; may be repeated (default: the four types)",
        choices=("judgement", "choice", "long", "short", "dialogue"),
        action="append",
    ),
    "--vision-feature-cache": arg(
        "keep the vision features of models in this process in a folder, which training shares (its vision_feature_cache)",
        "DIR",
        type=path,
    ),
    "--with-image": arg("go on with the image, for comparison", **FLAG),
    "--workers": count("number of processes that share the work"),
    "--unscored": arg("what becomes of records for which the model gives no score", choices=("keep", "drop")),
    "--verbose": arg("add the reports of PyTorch's collect_env and of transformers env", **FLAG),
}
"""Every flag, with the arguments of `add_argument` but for its default."""
MODEL = {"model": arg("model: a folder, a model id on the Hub, or http(s)://HOST:PORT/v1", "MODEL")}


def action(arguments: dict[str, dict[str, Any]], *examples: str) -> Callable[[Callable[[Args], Any]], Callable[[Args], Any]]:
    """Make a function an action of its module's command: its name and text are the action's, which has what a command has."""

    def made(run: Callable[[Args], Any]) -> Callable[[Args], Any]:
        vars(run).update(ARGUMENTS=arguments, EXAMPLES="\n".join(examples), run=run)
        return run

    return made


def flags(*names: str, choices: Sequence[str] | None = None, **defaults: Any) -> dict[str, dict[str, Any]]:
    """Take flags of `FLAGS` for a command, those with a default, or `REQUIRED`, as keywords (``max_tiles=12``), which come first.

    Args:
        choices: what only the command can say, such as of an output format.
    """
    found = {}
    given = {f"--{name.replace('_', '-')}": value for name, value in defaults.items()} | dict.fromkeys(names)
    for name, default in given.items():
        how = {**FLAGS[name], **({"choices": choices} if choices else {})}
        is_shown = default not in (None, REQUIRED) and not isinstance(default, bool)
        words, value = default if isinstance(default, Words) else ("%(default)s" if is_shown else "", default)
        if words:
            how["help"] = f"{how['help']} (default: {words})"
        if value is REQUIRED:
            how["required"] = True
        elif how.get("action") != "store_true":
            how["default"] = value
        found[name] = how
    return found


def refuse(args: Args, names: Iterable[str], why: str) -> None:
    """Refuse arguments, by their names in `args`, that are given although they would do nothing.

    Raises ValueError for the first that is not its default, with its value and with `why`.
    """
    for name in sorted(names):
        if (given := getattr(args, name)) != args.default_of(name):
            flag = f"--{name.replace('_', '-')}"
            value = " ".join(map(str, given)) if isinstance(given, list) else given
            said = f"{flag if flag in FLAGS else name.upper()}" + f"={value!s:.80}" * (given is not True)
            raise ValueError(f"{said} {why}. Leave it out.")


def refuse_unwritable(name: str, target: Path) -> None:
    """Refuse a file or folder, by its name on the command line, in a folder that cannot be created or written."""
    above = next(path for path in target.absolute().parents if os.path.lexists(path))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "cannot be written" if above.is_dir() else "is not a folder"
        raise ValueError(f"{name}={target} cannot be written: {above} {reason}. Give another path.")


def refuse_targets(targets: Mapping[str, Path | None]) -> None:
    """Refuse new targets, by their names on the command line, that exist, are the same, or cannot be written."""
    seen: dict[str, str] = {}
    for name, target in targets.items():
        if target is None:
            continue
        if os.path.lexists(target):
            raise ValueError(f"{name}={target} already exists. Choose a new name.")
        refuse_unwritable(name, target)
        if (other := seen.setdefault(os.path.realpath(target), name)) != name:
            raise ValueError(f"{other} and {name} are both {target}. Give each its own name.")


def refuse_replacing(name: str, target: Path | None, start: str) -> None:
    """Refuse to replace a file, by its name on the command line, that does not start as those of the command (`start`)."""
    if target is None:
        return
    if target.is_dir():
        raise ValueError(f"{name}={target} is a folder. Give the name of a file.")
    if target.is_file():
        with open(target, "rb") as file:
            found = file.read(len(start.encode()))
        if found and found != start.encode():
            raise ValueError(f"{name}={target} exists, and this command has not written it. Give another file.")
    refuse_unwritable(name, target)
