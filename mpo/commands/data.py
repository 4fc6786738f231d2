"""`mpo data`: validate, inspect, convert, mix, split and deduplicate preference data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo.commands.data_help import (
    CONVERT,
    CONVERT_EXAMPLES,
    DEDUPE,
    DEDUPE_EXAMPLES,
    EXAMPLES,
    EXPLANATION,
    MIX,
    MIX_EXAMPLES,
    SHOW,
    SHOW_EXAMPLES,
    SPLIT,
    SPLIT_EXAMPLES,
    STATS,
    STATS_EXAMPLES,
    VALIDATE,
    VALIDATE_EXAMPLES,
)
from mpo.io import write_json_lines, write_text
from mpo.visible import visible

EVAL_BY = ("both", "image", "question")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    def add(action: Callable[[argparse.Namespace], int], help: str, about: str, examples: str) -> argparse.ArgumentParser:
        command = actions.add_parser(
            action.__name__,
            help=help,
            description=about,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(action=action)
        return command

    command = add(
        validate, "validate a data set before training; the exit status is 1 if it has problems", VALIDATE, VALIDATE_EXAMPLES
    )
    _add_input_options(command, split=True)
    _add_model_options(command)
    command.add_argument(
        "--max-length", type=int, metavar="N", help="maximum number of tokens of prompt and completion (trainer.max_length)"
    )
    command.add_argument("--min-frames", type=int, metavar="N", help="minimum number of frames of a video (data.frames.min)")
    command.add_argument("--max-frames", type=int, metavar="N", help="maximum number of frames of a video (data.frames.max)")
    command.add_argument("--eval", metavar="PATH", help="evaluation data set, in the same format; checked for leakage")
    command.add_argument(
        "--output",
        type=Path,
        default=Path("bad_records.jsonl"),
        metavar="FILE",
        help="JSONL file to write the findings to (default: %(default)s)",
    )

    command = add(stats, "print statistics: lengths, tiles, length gaps, word overlap", STATS, STATS_EXAMPLES)
    _add_input_options(command, split=True)
    _add_model_options(command)
    command.add_argument("--html", type=Path, metavar="FILE", help="also write an HTML page with plots")

    command = add(show, "print a few records as the model sees them", SHOW, SHOW_EXAMPLES)
    _add_input_options(command, split=True, workers=False)
    _add_model_options(command)
    command.add_argument("--count", type=int, default=3, metavar="N", help="number of records to show (default: %(default)s)")
    command.add_argument("--random", action="store_true", help="choose the records at random instead of taking the first ones")
    command.add_argument("--seed", type=int, default=0, help="random seed of --random (default: %(default)s)")
    command.add_argument("--id", action="append", metavar="ID", help="show the records with this id; may be given several times")
    command.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page with the images instead of printing text")

    command = add(convert, "convert a data set to TRL's or MMPR's JSONL, Parquet or save_to_disk", CONVERT, CONVERT_EXAMPLES)
    _add_input_options(command, split=True, workers=False)
    command.add_argument("target", metavar="TARGET", type=Path, help="new file or folder to write")
    _add_output_options(command)
    command.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the target again and compare it with the source (default: yes)",
    )

    command = add(mix, "write a mixture of several sources as one data set", MIX, MIX_EXAMPLES)
    command.add_argument("mixture", metavar="MIXTURE", type=Path, help="YAML or JSON file that describes the mixture, see above")
    command.add_argument(
        "target",
        metavar="TARGET",
        type=Path,
        nargs="?",
        help="new file or folder to write (default: only print the table)",
    )
    command.add_argument(
        "eval_file",
        metavar="EVAL",
        type=Path,
        nargs="?",
        help="new file or folder for the evaluation part (eval_size)",
    )
    command.add_argument("--seed", type=int, help="random seed (default: as in the mixture)")
    command.add_argument("--shuffle", action="store_true", help="shuffle the pairs instead of writing source after source")
    _add_output_options(command)

    command = add(split, "split a data set into a training and an evaluation part", SPLIT, SPLIT_EXAMPLES)
    _add_input_options(command)
    command.add_argument("train", metavar="TRAIN", type=Path, help="new file or folder for the training part")
    command.add_argument("eval_file", metavar="EVAL", type=Path, help="new file or folder for the evaluation part")
    command.add_argument(
        "--eval-size",
        dest="amount",
        type=float,
        default=0.01,
        metavar="N",
        help="size of the evaluation part: a fraction below 1 or a number of pairs (default: %(default)s)",
    )
    command.add_argument(
        "--by",
        choices=EVAL_BY,
        default="both",
        help="keep the parts disjoint in questions, in images, or in both (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, help="random seed of the split (default: %(default)s)")
    _add_output_options(command)

    command = add(dedupe, "remove exact and near duplicates", DEDUPE, DEDUPE_EXAMPLES)
    _add_input_options(command)
    command.add_argument("target", metavar="TARGET", type=Path, help="new file or folder to write")
    command.add_argument("--exact", action="store_true", help="remove exact duplicates only")
    command.add_argument(
        "--threshold",
        type=float,
        default=0.9,
        metavar="FRACTION",
        help="minimum overlap of the texts of near duplicates (default: %(default)s)",
    )
    command.add_argument(
        "--image-bits",
        type=int,
        default=3,
        metavar="N",
        help="maximum number of differing hash bits for two images to be compared, 0 to 3 (default: %(default)s)",
    )
    command.add_argument(
        "--removed", type=Path, metavar="FILE", help="file to list the removed pairs in (default: TARGET.removed.jsonl)"
    )
    _add_output_options(command)


def _add_input_options(command: argparse.ArgumentParser, *, split: bool = False, workers: bool = True) -> None:
    command.add_argument("path", metavar="PATH", help="preference data set: a file, a folder, or a data set on the Hub")
    command.add_argument("--format", metavar="F", help="format of the records (default: detected)")
    command.add_argument("--image-root", metavar="DIR", help="folder that image paths are relative to (default: the file's folder)")
    if split:
        command.add_argument("--split", default="train", help="split of a folder or a data set on the Hub (default: %(default)s)")
    if workers:
        command.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per CPU core)")


def _add_model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", metavar="NAME_OR_PATH", help="count tokens and tiles with this model's processor; weights are not loaded"
    )
    command.add_argument("--max-tiles", type=int, metavar="N", help="tile limit per prompt, with --model (model.max_tiles)")


def _add_output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--to", choices=("trl", "mmpr", "parquet", "disk"), help="output form (default: by the name of TARGET)")
    command.add_argument(
        "--images",
        choices=("path", "copy", "bytes"),
        help="storage of images: by path, as copies next to TARGET, or as bytes inside it (default: path for JSONL, else bytes)",
    )
    command.add_argument(
        "--target-root",
        metavar="DIR",
        help="folder that image paths in a JSONL file are relative to (default: their deepest common folder)",
    )


def run(args: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


# The actions


def validate(args: argparse.Namespace) -> int:
    _keep_input(args, output=args.output)
    from mpo.curation.validate import validate as check

    processor, context = _processor(args), None
    if args.model:
        context = _context(args.model)
    report = check(
        args.path,
        format=args.format,
        image_root=args.image_root,
        split=args.split,
        frames={"min": args.min_frames, "max": args.max_frames},
        processor=processor,
        max_length=args.max_length,
        context=context,
        evaluation=args.eval,
        output=args.output,
        workers=_workers(args),
    )
    _print(report.text())
    return int(not report.may_start)


def stats(args: argparse.Namespace) -> int:
    _keep_input(args, html=args.html)
    from mpo.curation.stats import compute_stats, stats_page, stats_text

    found = compute_stats(_load(args), _processor(args), num_proc=_workers(args))
    if args.html:
        write_text(args.html, stats_page(found, str(args.path)))
    _print(stats_text(found))
    return 0


def show(args: argparse.Namespace) -> int:
    import numpy as np

    from mpo.curation.show import show_page, show_text

    _keep_input(args, html=args.html)
    pairs = _load(args)
    if args.id:
        ids = pairs.select_columns(["id"])[:]["id"]
        indices = [index for index, name in enumerate(ids) if name in args.id]
        if not indices:
            raise ValueError(f"No record of {args.path} has the id {args.id[0]!r}. Check --id; the first id is {ids[0]!r}.")
    elif args.random:
        indices = np.random.default_rng(args.seed).permutation(len(pairs))[: args.count].tolist()
    else:
        indices = list(range(min(args.count, len(pairs))))
    selected, processor = pairs.select(indices), _processor(args)
    if args.html:
        write_text(args.html, show_page(selected, str(args.path), processor))
        _print(f"{args.html}: {len(selected):,} records")
    else:
        _print(show_text(selected, processor))
    return 0


def convert(args: argparse.Namespace) -> int:
    pairs = _load(args)
    written = _write(pairs, args.target, args)
    if not args.check:
        return 0
    from mpo.curation.write import first_difference, not_kept
    from mpo.data import load_preferences

    again = load_preferences(written.path, **({"image_root": written.image_root} if written.image_root else {}))
    dropped = not_kept(written)
    found = first_difference(_bare(pairs, dropped), _bare(again, dropped))
    if found is not None:
        raise ValueError(f"{written.path} differs from {args.path}: {found}. The new file was not deleted. Please report this.")
    _print(f"Read again: {len(again):,} pairs, the same as in {args.path}.")
    return 0


def mix(args: argparse.Namespace) -> int:
    import numpy as np

    from mpo.data.load import mix as make
    from mpo.data.mixture_file import read_mixture

    settings = read_mixture(args.mixture)
    if args.seed is not None:
        settings["seed"] = args.seed
    if args.target is not None and bool(settings.get("eval_size")) != (args.eval_file is not None):
        found = settings.get("eval_size")
        raise ValueError(f"{args.mixture} has eval_size={found}. Give EVAL if eval_size is set, and leave it out otherwise.")
    mixture = make(**settings)
    _print(mixture.describe())
    if args.target is not None:
        train = mixture.train
        if args.shuffle:
            train = train.select(np.random.default_rng(settings.get("seed", 0)).permutation(len(train)))
        _write(train, args.target, args)
        if mixture.eval is not None:
            _write(mixture.eval, args.eval_file, args)
    return 0


def split(args: argparse.Namespace) -> int:
    from mpo.data.eval_part import split_eval

    if args.train.exists() or args.eval_file.exists():
        raise ValueError(f"{args.train if args.train.exists() else args.eval_file} already exists. Choose a new name.")
    pairs = _load(args)
    parts = split_eval(pairs, args.amount, seed=args.seed, by=args.by, num_proc=_workers(args))
    for part, target in zip(parts, (args.train, args.eval_file), strict=True):
        _write(part, target, args)
    return 0


def dedupe(args: argparse.Namespace) -> int:
    from mpo.curation.dedupe import find_duplicates, without

    removed = args.removed or args.target.with_name(f"{args.target.name}.removed.jsonl")
    for path in (args.target, removed):
        if path.exists():
            raise ValueError(f"{path} already exists. Choose a new name.")
    pairs = _load(args)
    found = find_duplicates(
        pairs, near=not args.exact, threshold=args.threshold, image_bits=args.image_bits, num_proc=_workers(args)
    )
    _write(without(pairs, found), args.target, args)
    ids = pairs.select_columns(["id"])[:]["id"] if "id" in pairs.column_names else [str(index) for index in range(len(pairs))]
    lines = [{"id": ids[one.index], "same_as": ids[one.same_as], "reason": one.reason} for one in found]
    write_json_lines(removed, lines)
    exact = sum(one.reason.startswith("the same") for one in found)
    _print(
        f"Removed {len(found):,} of {len(pairs):,} pairs: {exact:,} exact duplicates, {len(found) - exact:,} near ones ({removed})"
    )
    for line in lines[:5]:
        _print(f"  {line['id']} duplicates {line['same_as']}: {line['reason']}")
    return 0


# Shared by the actions


def _keep_input(args: argparse.Namespace, **outputs: Path | None) -> None:
    """Refuse an output that is the input."""
    for name, path in outputs.items():
        if path is not None and path.exists() and Path(args.path).exists() and path.samefile(args.path):
            raise ValueError(f"--{name}={path} is the input, which would be overwritten. Give another file.")


def _print(text: str) -> None:
    """Print text and escape the control characters of names and texts from data."""
    print(visible(text))


def _load(args: argparse.Namespace) -> Any:
    from mpo.data import load_preferences
    from mpo.data.load import load_mixture
    from mpo.data.mixture_file import is_mixture, read_mixture, refuse_beside_mixture

    if is_mixture(args.path):
        refuse_beside_mixture(args.path, format=args.format, image_root=args.image_root)
        return load_mixture(**read_mixture(args.path))
    given = {"format": args.format, "image_root": args.image_root, "split": getattr(args, "split", None)}
    return load_preferences(
        args.path, num_proc=_workers(args), **{name: value for name, value in given.items() if value is not None}
    )


def _workers(args: argparse.Namespace) -> int:
    import os

    asked = getattr(args, "workers", None)
    if asked is not None and asked < 1:
        raise ValueError(f"--workers must be at least 1, got {asked}.")
    return asked or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else asked or os.cpu_count() or 1


def _processor(args: argparse.Namespace) -> Any:
    if not args.model:
        if args.max_tiles is not None:
            raise ValueError("--max-tiles needs --model. Add --model NAME_OR_PATH.")
        return None
    from mpo.models.loading import load_processor

    try:
        return load_processor(args.model, max_tiles=args.max_tiles)
    except OSError as error:
        raise _not_opened(args.model, error) from error


def _not_opened(model: str, error: OSError) -> ValueError:
    if Path(model).is_dir():
        return ValueError(f"--model {model} has no processor or tokenizer ({_first_line(error)}). Give the folder of a checkpoint.")
    if model.startswith(("/", ".", "~")):
        return ValueError(f"--model {model} is not a folder. Give the folder of a checkpoint, or a model id on the Hub.")
    return ValueError(
        f"--model {model} is not a folder, and loading it from the Hub failed ({_first_line(error)}). Check the name; a model on "
        "the Hub needs network access or a cached copy."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _context(model: str) -> int | None:
    """Context length of a model in tokens; None if its config has none, or for a folder with only a processor."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return None
    from transformers import AutoConfig

    from mpo.models.loading import official_folder
    from mpo.models.official.checkpoint import open_official

    try:
        folder = official_folder(model)
        config = AutoConfig.from_pretrained(model) if folder is None else open_official(folder).config
    except OSError as error:
        raise _not_opened(model, error) from error
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _write(pairs: Any, target: Path, args: argparse.Namespace) -> Any:
    from mpo.curation.write import write_pairs

    written = write_pairs(pairs, target, form=args.to, images=args.images, image_root=args.target_root)
    root = f"; read it with data.image_root={written.image_root}" if written.image_root else ""
    _print(f"{written.path}: {written.pairs:,} pairs{root}")
    for column, count in written.lost.items():
        _print(f"  {column!r} of {count:,} records was dropped, because MMPR's form has no field for it; --to trl keeps it")
    return written


def _bare(pairs: Any, dropped: list[str]) -> Any:
    return pairs.remove_columns([name for name in dropped if name in pairs.column_names])
