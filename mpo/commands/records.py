"""The data sets and models that the actions of `mpo data` read, and the files that they write."""

import os
from pathlib import Path
from typing import Any

from mpo.commands.flags import Args, Words, arg, flags, path

INPUT = {
    "path": arg("data set: a file, a folder, or a data set on the Hub", "PATH"),
    **flags("--format", "--image-root", "--metadata"),
}
SPLIT = flags(split="train")
"""Of an action that can read one split of several."""
TARGET = {"target": arg("new file or folder to write", "TARGET", type=path)}
OUTPUT = {
    **flags(output_format=Words("by the name of TARGET"), choices=("trl", "mmpr", "parquet", "disk")),
    **flags("--images", "--output-image-root"),
}


def load(args: Args) -> Any:
    """Load the pairs or conversations of PATH."""
    from mpo.data import load_conversations, load_preferences
    from mpo.data.load import kind_of_source
    from mpo.data.mixture_file import is_mixture, refuse_beside_mixture

    if is_mixture(args.path):
        refuse_beside_mixture(args.path, format=args.format, image_root=args.image_root, metadata=args.metadata)
    names = ("format", "image_root", "metadata", "split")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    is_pair = kind_of_source(args.path, given.get("split", "train"), format=args.format) == "pair"
    return (load_preferences if is_pair else load_conversations)(args.path, num_proc=processes(args), **given)


def ids(pairs: Any) -> list[str]:
    """The ids of the records; their indices where they have none."""
    return list(pairs.select_columns(["id"])[:]["id"]) if "id" in pairs.column_names else list(map(str, range(len(pairs))))


def processes(args: Args) -> int:
    """`--num-proc`, or the number of CPU cores of this process."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return getattr(args, "num_proc", None) or available


def processor_of(args: Args) -> Any:
    """The processor of `--model`; None without it."""
    if not args.model:
        if args.max_tiles is not None:
            raise ValueError("--max-tiles needs --model. Add --model NAME_OR_PATH.")
        return None
    from mpo.models.loading import NotOpened, load_processor

    try:
        return load_processor(args.model, max_tiles=args.max_tiles)
    except NotOpened as error:
        raise ValueError(f"--model {error}") from error


def write(pairs: Any, target: Path, args: Args) -> Any:
    """Write pairs to a new file or folder; returns a `mpo.curation.write.Written`."""
    from mpo.curation.write import write_pairs

    return write_pairs(pairs, target, form=args.output_format, images=args.images, image_root=args.output_image_root)


def written_text(written: Any) -> str:
    """What was written, as text."""
    beside = written.form in ("trl", "mmpr") and written.image_root == written.path.parent.resolve()
    root = "" if beside or not written.image_root else f"; read it with data.image_root={written.image_root}"
    lines = [f"{written.path}: {written.pairs:,} {written.unit}{root}"]
    why = "because MMPR's form has no field for it; --output-format trl keeps it"
    lines += [f"  {column!r} of {count:,} records was dropped, {why}" for column, count in written.lost.items()]
    return "\n".join(lines)


def written_data(written: Any) -> dict[str, Any]:
    """What was written, for JSON."""
    data = {"path": written.path, "format": written.form, "pairs": written.pairs}
    return {**data, "image_root": written.image_root, "dropped_columns": written.lost}
