"""A path or a name on the Hub -> the shards of its files (`mpo.data.shards`)."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from mpo.data.shards import DAMAGE, ROWS, ArrayShard, DatasetShard, LinesShard, ParquetShard, Shard, one_line, opened
from mpo.data.splits import KNOWN, LINES, TARS, files_of_split
from mpo.data.tars import TarShard

__all__ = ["KNOWN", "Shard", "files_of", "open_files"]

SHARD_BYTES = 16 * 2**20
"""Bytes of a JSONL file that are read in one go, about."""
MAX_SHARDS = 256
_SLICE = re.compile(r"\[[^\]]*\]$")
"""Of a split, as `datasets` writes it: ``train[:100]``, ``train[10%:20%]``."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_files(path: str | Path, split: str = "train", *, min_shards: int = 1) -> list[Shard]:
    """The shards of a source, in order.

    Args:
        path: a file: JSONL (also compressed with gzip), a JSON array, Parquet, a tar of a WebDataset; several of them by a pattern
            such as ``shards-*.tar``; a folder of such files (`mpo.data.splits`) or of `save_to_disk`; or the name of a data set on
            the Hub. Of a folder on this machine, nothing is fetched and no file beside it is read, whatever its files say.
        split: which one to take, where there are several; else ``"train"``. Of a folder of files and a data set on the Hub, also a
            slice of one, ``"train[:100]"``.
        min_shards: cut a JSONL file into at least so many, if it has the lines.

    Raises:
        ValueError: when there is no such file, its kind is not known, or it has no such split.
    """
    text = os.fspath(path)
    if not os.path.exists(text) and not _is_pattern(text):
        if Path(text).name.lower().endswith(KNOWN) or not _HUB_NAME.fullmatch(text):
            raise ValueError(f"There is no file {text}. Set data.path to a file of pairs.")
        return _of_dataset(_from_hub(text, split), text)
    if os.path.isdir(text) and _is_saved(Path(text)):
        return _of_dataset(_from_disk(Path(text), split), text)
    found = files_of(text, split)
    if os.path.isdir(text) and _SLICE.search(split):
        return _of_dataset(_sliced(found, text, split), text)
    if not found:
        raise ValueError(f"There is no file that fits {text}. Set data.path to a file of pairs.")
    return [shard for one in found for shard in _of_file(one, min_shards)]


def files_of(path: str | Path, split: str = "train") -> list[Path]:
    """The files that a source is made of, as far as they are on this disk: what decides whether it has changed.

    Raises:
        ValueError: for a split that is not there, and what is neither a file nor a folder.
    """
    text = os.fspath(path)
    if os.path.isdir(text) and _is_saved(Path(text)):
        return sorted(one for one in Path(text).rglob("*") if one.is_file())
    found = files_of_split(Path(text), _SLICE.sub("", split)) if os.path.isdir(text) else _files_at(text, split)
    for one in found:
        if not one.is_file():
            raise ValueError(f"{one} is no ordinary file. Set data.path to a file of pairs.")
    return found


def _files_at(text: str, split: str) -> list[Path]:
    is_file = os.path.exists(text)
    if split != "train" and (is_file or _is_pattern(text)):
        raise ValueError(
            f"{text} has no splits, and split={split!r} is asked for. Set data.path to the file of that split, and leave split out."
        )
    return [Path(text)] if is_file else [Path(name) for name in sorted(glob.glob(text, recursive=True))]


def _is_pattern(text: str) -> bool:
    return any(mark in text for mark in "*?[")


def _is_saved(folder: Path) -> bool:
    """Whether a folder is one of `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


# Kinds of files


def _of_file(path: Path, min_shards: int) -> list[Shard]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _of_parquet(path)
    if name.endswith(TARS):
        return [TarShard(path)]
    if name.endswith((".gz", ".json")) and name.endswith(KNOWN):
        if not name.endswith(LINES) and _is_array(path):
            return [ArrayShard(path)]
        if name.endswith(".gz"):
            return [LinesShard(path, 0, None, 1)]
    elif not name.endswith(LINES):
        raise ValueError(f"{path} is of no kind that is known. Pairs are read from files that end in {', '.join(KNOWN)}.")
    return _of_lines(path, min_shards)


def _of_lines(path: Path, min_shards: int) -> list[Shard]:
    """Cut a JSONL file after line ends, and count its lines on the way, for errors to name."""
    size = path.stat().st_size
    step = max(1, min(max(SHARD_BYTES, -(-size // MAX_SHARDS)), size // min_shards))
    shards: list[Shard] = []
    start, line = 0, 1
    with path.open("rb") as file:
        while start < size:
            lines, end = _count_lines(file, start, step)
            shards.append(LinesShard(path, start, end, line))
            start, line = end, line + lines
    return shards


def _count_lines(file: BinaryIO, start: int, step: int) -> tuple[int, int]:
    """How many lines end within `step` bytes and the rest of the line that they end in, and where that is."""
    file.seek(start)
    lines, left = 0, step
    while left > 0:
        block = file.read(min(left, 2**20))
        if not block:
            return lines, file.tell()
        lines += block.count(b"\n")
        left -= len(block)
    if block[-1:] != b"\n":
        while True:
            rest = file.readline(2**20)
            if not rest:
                return lines, file.tell()
            if rest[-1:] == b"\n":
                lines += 1
                break
    return lines, file.tell()


def _is_array(path: Path) -> bool:
    try:
        with opened(path) as file:
            start: bytes = file.read(4096)
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or cut short: {one_line(error)}") from error
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _of_parquet(path: Path) -> list[Shard]:
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or is cut short ({one_line(error)}).") from error
    shards: list[Shard] = []
    first = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        shards.append(ParquetShard(path, group, first, rows))
        first += rows
    return shards


def _from_disk(path: Path, split: str) -> Dataset:
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # of many kinds: its JSON, its Arrow files
        raise ValueError(f"{path} was not saved whole by save_to_disk, or is damaged: {one_line(error)}") from error
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}. Set data.split to one of {', '.join(map(str, splits))}.")
    for file in splits[split].cache_files:  # state.json names them
        if not Path(os.path.abspath(file["filename"])).is_relative_to(os.path.abspath(path)):
            raise ValueError(f"{path} names a file outside of it, {file['filename']}, which is not read. Save the data set anew.")
    return splits[split]


def _sliced(files: list[Path], folder: str, split: str) -> Dataset:
    """Rows of a split, cut by `datasets`, which is given the files and looks at nothing beside them."""
    kind = "parquet" if files[0].name.lower().endswith(".parquet") else "json"
    if files[0].name.lower().endswith(TARS):
        raise ValueError(
            f"A slice such as {split!r} is not taken of tars, as in {folder}. Set data.limit, or data.path to some of them."
        )
    name = split[: split.index("[")]
    try:
        return load_dataset(kind, data_files={name: [str(file.resolve()) for file in files]}, split=split)
    except Exception as error:  # of many kinds: no such slice, damaged files
        raise ValueError(f"{split!r} could not be taken of the files in {folder}: {one_line(error)}") from error


def _from_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # of many kinds: no such name or split, no network, no files in it
        raise ValueError(
            f"{name!r} is no file or folder of pairs, and could not be loaded as a data set of that name: {one_line(error)}"
        ) from error


def _of_dataset(dataset: Dataset, name: str) -> list[Shard]:
    step = max(ROWS, -(-len(dataset) // MAX_SHARDS))
    bare = dataset.with_format("arrow")
    return [DatasetShard(bare, name, start, min(start + step, len(bare))) for start in range(0, len(bare), step)]
