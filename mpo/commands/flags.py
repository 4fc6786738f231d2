"""The flags of all commands. Each is described once, so that it has one spelling, one type and one help text everywhere."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any


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
LIMIT: dict[str, Any] = {"type": limit(int), "metavar": "N"}
FLAG: dict[str, Any] = {"action": "store_true"}
SWITCH: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
NUMBER: dict[str, Any] = {"type": COUNT, "metavar": "N"}
FLAGS: dict[str, dict[str, Any]] = {
    "--accuracy": {
        "type": number(float, 0, 1),
        "nargs": 2,
        "metavar": ("LOW", "HIGH"),
        "help": "smallest and largest fraction of right responses of a question that gets pairs",
    },
    "--answer-format": {"choices": ("line", "boxed", "any"), "help": "format of a final answer (default: that of the prompt)"},
    "--attempts": {**NUMBER, "help": "number of times that a caption is asked for"},
    "--base": {"metavar": "MODEL", "help": "base model of an adapter (default: as in its config)"},
    "--blind": {"metavar": "MODEL", "help": "language model, or URL of a server, that is asked each question without its image"},
    "--check": {**SWITCH, "help": "read the result again and compare it with the source"},
    "--classifier": {"metavar": "MODEL", "help": "vision-language model, or URL of a server, that names the domains of images"},
    "--clip": {"metavar": "MODEL", "help": "CLIP-like model that finds images by text (folder or name on the Hub)"},
    "--device": {"metavar": "DEVICE", "help": "device to run on, such as cpu or cuda:1 (default: the first GPU, if there is one)"},
    "--domain": {
        "action": "append",
        "metavar": "DOMAIN",
        "help": "what quality means (general, code, math, knowledge, writing), also as SOURCE=DOMAIN; may be repeated",
    },
    "--domains": {"type": path, "action": "append", "metavar": "FILE", "help": "YAML file of a further domain; may be repeated"},
    "--drop-bad": {**FLAG, "help": "drop records that cannot be read or asked, such as without their image, instead of stopping"},
    "--dry-run": {**FLAG, "help": "show the changes, or the harness's commands, without making or running them"},
    "--dtype": {"choices": ("auto", "bfloat16", "float16", "float32"), "help": "dtype of the weights; auto: as in the checkpoint"},
    "--eval-by": {"choices": ("both", "image", "question"), "help": "keep the parts disjoint in questions, in images, or in both"},
    "--eval-path": {"metavar": "PATH", "help": "evaluation data set, in the same format; checked for leakage"},
    "--eval-size": {
        "type": ABOVE_0,
        "metavar": "N",
        "help": "size of the evaluation part: a fraction below 1 or a number of pairs",
    },
    "--exact": {**FLAG, "help": "remove exact duplicates only"},
    "--export": {"type": path, "metavar": "OUT", "help": "write the corrected records to a new file of the same type, and end"},
    "--field": {
        "action": "append",
        "metavar": "OURS=THEIRS",
        "help": "name of a field of the set, such as question=q; may be repeated",
    },
    "--form": {"choices": ("auto", "tags", "json"), "help": "form of the responses; auto: JSON where the server keeps to a schema"},
    "--format": {"metavar": "FORMAT", "help": "format of the records, such as trl or mmpr (default: detected)"},
    "--from-log": {
        "type": path,
        "action": "append",
        "metavar": "LOG",
        "help": "log of another review of FILE, or of a copy, whose decisions are added; may be repeated",
    },
    "--harness": {"choices": ("lmms-eval",), "help": "run tasks of this harness instead, in an environment of its own"},
    "--heuristics": {**SWITCH, "help": "check the form of texts"},
    "--host": {"metavar": "ADDRESS", "help": "address to serve at; any other lets other machines in, unencrypted"},
    "--html": {"type": path, "metavar": "FILE", "help": "HTML page to write"},
    "--id": {"action": "append", "metavar": "ID", "help": "show the records with this id; may be given several times"},
    "--image": {"type": path, "action": "append", "metavar": "FILE", "help": "image to show before the question; may be repeated"},
    "--image-bits": {
        "type": int,
        "choices": range(4),
        "metavar": "N",
        "help": "maximum number of differing hash bits for two images to be compared, 0 to 3",
    },
    "--image-domain": {
        "metavar": "DOMAIN",
        "help": "domain of images; of mminstruct collect also folder (its name), prompt (--classifier) or query (--clip)",
    },
    "--image-root": {"metavar": "DIR", "help": "folder that image paths are relative to (default: the file's folder)"},
    "--images": {
        "choices": ("path", "copy", "bytes"),
        "help": "storage of images: by path, as copies next to TARGET, or as bytes inside it (default: path for JSONL, else bytes)",
    },
    "--include-path": {"metavar": "DIR", "help": "folder with tasks of your own for the harness"},
    "--json": {**FLAG, "help": "print the result as one JSON document"},
    "--judge": {"metavar": "MODEL", "help": "language model, or URL of a server, that compares answers with captions"},
    "--kind": {"metavar": "KIND", "help": "kind of answer of all questions, such as number (default: their own)"},
    "--language": {"choices": ("en", "zh"), "action": "append", "help": "language to write in; may be repeated (default: en)"},
    "--licence": {"metavar": "TEXT", "help": "licence of what has none of its own"},
    "--like": {"type": path, "metavar": "DIR", "help": "official checkpoint to copy config, tokenizer and code from"},
    "--limit": {**NUMBER, "help": "maximum number of records"},
    "--max-frames": {**NUMBER, "help": "maximum number of frames of a video (data.frames.max)"},
    "--max-line": {**LIMIT, "help": "maximum number of characters of a line; off: any"},
    "--max-lines": {
        "type": limit(float, 1),
        "metavar": "FRACTION",
        "help": "maximum part of a text in lines that are a fourth copy or a later one; off: any",
    },
    "--max-loop": {**LIMIT, "help": "maximum number of words that are repeated in a loop at the end of a text; off: any"},
    "--max-length": {**NUMBER, "help": "maximum number of tokens of prompt and completion (trainer.max_length)"},
    "--max-new-tokens": {**NUMBER, "help": "maximum length of the response, in tokens"},
    "--max-ngrams": {**LIMIT, "help": "maximum number of words in a row without a new 5-gram; off: any"},
    "--max-run": {**LIMIT, "help": "maximum number of equal groups of characters in a row, four times as many of signs; off: any"},
    "--max-pairs": {**NUMBER, "help": "maximum number of pairs of a question"},
    "--max-tiles": {**NUMBER, "help": "maximum number of tiles of all images of a prompt (model.max_tiles)"},
    "--max-zeros": {**LIMIT, "help": "maximum number of zeros in a row; off: any"},
    "--min-side": {**NUMBER, "help": "shortest side of an image that is large enough, in pixels"},
    "--mode": {"choices": ("direct", "cot", "both"), "help": "ask for the answer alone, for a chain of thought, or for both"},
    "--metadata": {"action": "append", "metavar": "FIELD", "help": "field that is only metadata; may be repeated (data.metadata)"},
    "--min-frames": {**NUMBER, "help": "minimum number of frames of a video (data.frames.min)"},
    "--min-quality": {"type": number(float, 0, 10), "metavar": "SCORE", "help": "lowest score for quality that is kept"},
    "--min-repetition": {"type": number(float, 0, 10), "metavar": "SCORE", "help": "lowest score for repetition that is kept"},
    "--model": {
        "metavar": "MODEL",
        "help": "model whose processor counts tokens and tiles, not its weights; data filter: model, or URL of a server, to ask",
    },
    "--model-name": {"metavar": "NAME", "help": "model to use on a server with several (default: its first one)"},
    "--n": {**NUMBER, "help": "responses per question"},
    "--num-proc": {**NUMBER, "help": "number of processes (default: one per CPU core)"},
    "--old": {**FLAG, "help": "remove what earlier versions of mpo wrote and this one cannot read, too"},
    "--origin": {"metavar": "TEXT", "help": "where images come from that do not say it themselves"},
    "--output": {"type": path, "metavar": "PATH", "help": "file or folder to write"},
    "--output-format": {"help": "format to write"},
    "--output-image-root": {
        "metavar": "DIR",
        "help": "folder that image paths in the written JSONL are relative to (default: their deepest common folder)",
    },
    "--point": {
        "action": "append",
        "type": number(float, 0, 1),
        "nargs": 2,
        "metavar": ("X", "Y"),
        "help": "point of the tile to look from, fractions of its width and height; may be repeated",
    },
    "--points": {**NUMBER, "help": "look from a grid of N x N points"},
    "--port": {"type": number(int, 0, 65535), "metavar": "PORT", "help": "port to serve at"},
    "--prices": {
        "type": number(float, 0),
        "nargs": 2,
        "metavar": ("PROMPT", "COMPLETION"),
        "help": "prices of a million tokens, for the cost",
    },
    "--prompt": {"metavar": "TEXT", "help": "prompt around {question} and {choices}; of mpo mmpr: its name, or a Jinja template"},
    "--quality": {**SWITCH, "help": "let the model judge quality"},
    "--query": {"action": "append", "metavar": "TEXT", "help": "text that finds images; may be repeated (default: of the domains)"},
    "--questions": {"type": path, "metavar": "FILE", "help": "file of questions: JSONL, JSON or Parquet"},
    "--quick": {**FLAG, "help": "run a smaller demo of about a minute; its accuracy is low"},
    "--ratio": {"type": number(float, 0, 0.99), "metavar": "FRACTION", "help": "fraction of a response that is kept"},
    "--removed": {"type": path, "metavar": "FILE", "help": "file to list the removed pairs in (default: TARGET.removed.jsonl)"},
    "--repetition": {**SWITCH, "help": "let the model judge repetition"},
    "--restart": {**FLAG, "help": "delete an earlier demo in the output folder and run all stages"},
    "--retrieve": {**NUMBER, "help": "maximum number of images of a query"},
    "--retry-dropped": {**FLAG, "help": "try the records again that were dropped"},
    "--review": {
        "type": path,
        "metavar": "LOG",
        "help": "apply the decisions of this log of mpo review: records that were corrected or rejected",
    },
    "--reviewer": {"action": "append", "metavar": "NAME", "help": "who reviews; repeated: several, each with a link of their own"},
    "--rewrite": {**FLAG, "help": "put the ground truth in the place of a right answer that contains it; the pair says so"},
    "--rounds": {**NUMBER, "help": "how often each type is asked for"},
    "--run-dir": {"type": path, "metavar": "DIR", "help": "folder that runs are written to (run_dir)"},
    "--reference": {"metavar": "MODEL", "help": "model that the models were trained from, for --scorer=reward"},
    "--scorer": {
        "action": "append",
        "metavar": "SCORER",
        "help": "for best of N: logprob or reward (against --reference) of the measured model, or another (reward=MODEL); "
        "prm=MODEL; or MODULE:FUNCTION or FILE.py:FUNCTION of your own; may be repeated",
    },
    "--seed": {"type": SEED, "metavar": "N", "help": "random seed"},
    "--shard-gb": {"type": ABOVE_0, "metavar": "GB", "help": "maximum size of a weight shard"},
    "--shuffle": {**FLAG, "help": "shuffle the records instead of keeping their order"},
    "--split": {"metavar": "NAME", "help": "split of a folder or a data set on the Hub"},
    "--step": {**SWITCH, "help": "run one training step of a tiny model"},
    "--prefix": {"metavar": "TEXT", "help": "start of the response, which the model goes on from"},
    "--system": {"metavar": "TEXT", "help": "system prompt"},
    "--video": {"type": path, "action": "append", "metavar": "FILE", "help": "video to show before the question; may be repeated"},
    "--tasks": {"metavar": "TASK,TASK", "help": "names of tasks of the harness"},
    "--temperature": {"type": number(float, 0), "metavar": "T", "help": "sampling temperature; 0: greedy"},
    "--tile": {"type": SEED, "metavar": "N", "help": "tile of the image, from 0 (default: the last, which shows all of the image)"},
    "--tile-limit": {
        "action": "append",
        "type": COUNT,
        "metavar": "N",
        "help": "maximum number of tiles of all images of a prompt; repeated: a measurement with each",
    },
    "--tower": {"type": path, "metavar": "DIR", "help": "CLIP vision tower of an official LLaVA that lacks its weights"},
    "--train": {
        "action": "append",
        "metavar": "PATH",
        "help": "pairs, conversations or questions of training, to search for those of the benchmarks; may be repeated",
    },
    "--threshold": {"type": number(float, 0, 1), "metavar": "FRACTION", "help": "minimum overlap of the texts of near duplicates"},
    "--tolerance": {"type": number(float, 0), "metavar": "FRACTION", "help": "tolerance of all answers (default: of their kind)"},
    "--top-k": {"type": SEED, "metavar": "K", "help": "sample from the K most likely tokens; 0: from all"},
    "--top-p": {
        "type": number(float, 0, 1, open_low=True),
        "metavar": "P",
        "help": "sample from the smallest set of most likely tokens with this total probability",
    },
    "--turns": {**NUMBER, "help": "instructions of a conversation"},
    "--type": {
        "choices": ("judgement", "choice", "long", "short", "dialogue"),
        "action": "append",
        "help": "type of instructions, or dialogue: several rounds; may be repeated (default: the four types)",
    },
    "--vision-feature-cache": {
        "type": path,
        "metavar": "DIR",
        "help": "keep the vision features of models in this process in a folder, which training shares (its vision_feature_cache)",
    },
    "--with-image": {**FLAG, "help": "go on with the image, for comparison"},
    "--workers": {**NUMBER, "help": "number of processes that share the work"},
    "--unscored": {"choices": ("keep", "drop"), "help": "what becomes of records for which the model gives no score"},
    "--verbose": {**FLAG, "help": "add the reports of PyTorch's collect_env and of transformers env"},
}
"""Every flag, with the arguments of `add_argument` but for its default."""


def add(parser: argparse.ArgumentParser, *names: str, default: Any = None, otherwise: str | None = None, **own: Any) -> None:
    """Add flags of `FLAGS` to a command.

    Args:
        otherwise: the default in words, for the help text, where `default` does not say it.
        own: what only this command can say, such as ``choices`` of an output format.
    """
    for name in names:
        flag = {**FLAGS[name], **own}
        said = otherwise or (None if default is None or isinstance(default, bool) else "%(default)s")
        if said:
            flag["help"] = f"{flag['help']} (default: {said})"
        if flag.get("action") != "store_true":
            flag["default"] = default
        parser.add_argument(name, **flag)
