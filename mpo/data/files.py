"""A path or a name on the Hub -> the pieces of its files (`mpo.data.pieces`)."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from mpo.data.pieces import DAMAGE, ROWS, ArrayPiece, DatasetPiece, LinesPiece, ParquetPiece, Piece, TarPiece, one_line, opened

__all__ = ["KNOWN", "Piece", "files_of", "open_files"]

LINES = (".jsonl", ".jsonl.gz", ".ndjson")
TARS = (".tar", ".tar.gz", ".tgz")
KNOWN = (*LINES, ".json", ".json.gz", ".parquet", *TARS)
"""Endings of files that pairs are read from."""
PIECE = 16 * 2**20
"""Bytes of a JSONL file that are read in one go, about."""
MOST_PIECES = 256
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_files(path: str | Path, split: str = "train", *, least_pieces: int = 1) -> list[Piece]:
    """The pieces of a source, in order.

    Args:
        path: a file: JSONL (also compressed with gzip), a JSON array, Parquet, a tar of a WebDataset; several of them by a pattern
            such as ``shards-*.tar``; a folder of `save_to_disk`, of tars, or of a data set as it lies on the Hub; or the name of
            a data set on the Hub.
        split: which one to take, where there are several.
        least_pieces: cut a JSONL file into at least so many, if it has the lines.

    Raises:
        ValueError: when there is no such file, or its kind is not known.
    """
    text = os.fspath(path)
    if any(mark in text for mark in "*?[") and not os.path.exists(text):
        found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        if not found:
            raise ValueError(f"There is no file that fits {text}. Set data.path to a file of pairs.")
        return [piece for one in found for piece in _of_file(one, least_pieces)]
    path = Path(text)
    if path.is_dir():
        return _of_folder(path, split)
    if path.is_file():
        return _of_file(path, least_pieces)
    if path.exists():
        raise ValueError(f"{path} is no ordinary file. Set data.path to a file of pairs.")
    if path.name.lower().endswith(KNOWN) or not _HUB_NAME.fullmatch(text):
        raise ValueError(f"There is no file {path}. Set data.path to a file of pairs.")
    return _of_dataset(_from_hub(text, split), text)


def files_of(path: str | Path) -> list[Path]:
    """The files that a source is made of, as far as they are on this disk: what decides whether it has changed."""
    text = os.fspath(path)
    found = [Path(name) for name in sorted(glob.glob(text, recursive=True))] if not os.path.exists(text) else [Path(text)]
    return [one for given in found for one in ([given] if given.is_file() else sorted(p for p in given.rglob("*") if p.is_file()))]


# Kinds of files


def _of_file(path: Path, least_pieces: int) -> list[Piece]:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _of_parquet(path)
    if name.endswith(TARS):
        return [TarPiece(path)]
    if name.endswith((".gz", ".json")) and name.endswith(KNOWN):
        if not name.endswith(LINES) and _is_array(path):
            return [ArrayPiece(path)]
        if name.endswith(".gz"):
            return [LinesPiece(path, 0, None, 1)]
    elif not name.endswith(LINES):
        raise ValueError(f"{path} is of no kind that is known. Pairs are read from files that end in {', '.join(KNOWN)}.")
    return _of_lines(path, least_pieces)


def _of_lines(path: Path, least_pieces: int) -> list[Piece]:
    """Cut a JSONL file behind line ends, and count its lines on the way, for errors to name."""
    size = path.stat().st_size
    step = max(1, min(max(PIECE, -(-size // MOST_PIECES)), size // least_pieces))
    pieces: list[Piece] = []
    start, line = 0, 1
    with path.open("rb") as file:
        while start < size:
            lines, end = _count_lines(file, start, step)
            pieces.append(LinesPiece(path, start, end, line))
            start, line = end, line + lines
    return pieces


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


def _of_parquet(path: Path) -> list[Piece]:
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no Parquet file, or is cut short ({one_line(error)}).") from error
    pieces: list[Piece] = []
    first = 1
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        pieces.append(ParquetPiece(path, group, first, rows))
        first += rows
    return pieces


def _of_folder(path: Path, split: str) -> list[Piece]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            loaded = load_from_disk(str(path))
        except Exception as error:  # of many kinds: its JSON, its Arrow files
            raise ValueError(f"{path} was not saved whole by save_to_disk, or is damaged: {one_line(error)}") from error
        if isinstance(loaded, DatasetDict):
            if split not in loaded:
                raise ValueError(f"{path} has no split {split!r}. Set data.split to one of {', '.join(map(str, loaded))}.")
            loaded = loaded[split]
        return _of_dataset(loaded, str(path))
    tars = sorted(one for one in path.iterdir() if one.name.lower().endswith(TARS))
    if tars:
        return [TarPiece(one) for one in tars]
    return _of_dataset(_from_hub(str(path), split), str(path))


def _from_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # of many kinds: no such name or split, no network, no files in it
        raise ValueError(
            f"{name!r} is no file or folder of pairs, and could not be loaded as a data set of that name: {one_line(error)}"
        ) from error


def _of_dataset(dataset: Dataset, name: str) -> list[Piece]:
    step = max(ROWS, -(-len(dataset) // MOST_PIECES))
    bare = dataset.with_format("arrow")
    return [DatasetPiece(bare, name, start, min(start + step, len(bare))) for start in range(0, len(bare), step)]
