"""Open a path or a data set on the Hub as shards of its files (`mpo.data.shards`)."""

from __future__ import annotations

import glob
import logging
import os
import re
from codecs import BOM_UTF8
from itertools import accumulate
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from mpo.data import shards
from mpo.data.shards import DAMAGE, LinesShard, Shard, damaged, one_line
from mpo.io import BAD_RECORDS

logger = logging.getLogger(__name__)

LINES = (".jsonl", ".jsonl.gz", ".ndjson")
ARRAYS = (".json", ".json.gz")
TARS = (".tar", ".tar.gz", ".tgz")
KNOWN = (*LINES, *ARRAYS, ".parquet", *TARS)
"""Endings of files that records can be read from."""
KINDS = (TARS, LINES, ARRAYS, (".parquet",))
"""File types, of which a split has one; next to tars, other files are ignored."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words for each split, as on the Hub."""
NOT_PAIRS = ("dataset_info.json", "dataset_infos.json", BAD_RECORDS)
"""Files next to the records that contain none."""
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")
SHARD_BYTES = 16 * 2**20
"""Approximate size in bytes of a shard of a JSONL file."""
MAX_SHARDS = 256
_SLICE = re.compile(r"\[[^\]]*\]$")
"""The slice of a split in the syntax of `datasets`: ``train[:100]``, ``train[10%:20%]``."""
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_files(path: str | Path, split: str = "train", *, min_shards: int = 1) -> list[Shard]:
    """Open the shards of a source, in order.

    Args:
        path: a file: JSONL (optionally compressed with gzip), a JSON array, Parquet, a WebDataset tar; several files by a
            pattern such as ``shards-*.tar``; a folder of such files (`files_of_split`) or of `save_to_disk`; or the name of a
            data set on the Hub. For a local folder, nothing is downloaded and no file outside it is read, whatever its files say.
        split: the split to load; ``"train"`` for a source without splits. For a folder of files and a data set on the Hub, also
            a slice such as ``"train[:100]"``.
        min_shards: minimum number of shards of a JSONL file, if it has enough lines.

    Raises ValueError for a missing file, an unknown file type or an unknown split.
    """
    text = os.fspath(path)
    if not os.path.exists(text) and not is_pattern(text):
        if Path(text).name.lower().endswith(KNOWN) or not _HUB_NAME.fullmatch(text):
            raise ValueError(f"There is no file {text}. Give a file of records.")
        return of_dataset(_from_hub(text, split), text)
    if os.path.isdir(text) and _is_saved(Path(text)):
        return of_dataset(_from_disk(Path(text), split), text)
    found = files_of(text, split)
    if os.path.isdir(text):
        _report_unread(Path(text), split)
    if os.path.isdir(text) and _SLICE.search(split):
        return of_dataset(_sliced(found, text, split), text)
    if not found:
        raise ValueError(f"There is no file that matches {text}. Give a file of records.")
    return [shard for one in found for shard in _of_file(str(one), min_shards)]


def files_of(path: str | Path, split: str = "train") -> list[Path]:
    """List the local files of a source, which tell whether it has changed.

    Raises ValueError for an unknown split, and for a path that is neither a regular file nor a folder.
    """
    text = os.fspath(path)
    if os.path.isdir(text):
        if _is_saved(Path(text)):
            return sorted(one for one in Path(text).rglob("*") if one.is_file())
        found = files_of_split(Path(text), _SLICE.sub("", split))
    else:
        found = [Path(text)] if os.path.exists(text) else [Path(name) for name in sorted(glob.glob(text, recursive=True))]
        if split != "train" and (os.path.exists(text) or is_pattern(text)):
            raise ValueError(f"{text} has no splits, but split={split!r} is given. Give the file of that split.")
    for one in found:
        if not one.is_file():
            raise ValueError(f"{one} is not a regular file. Give a file of records.")
    return found


def is_pattern(text: str) -> bool:
    """Whether a path has wildcards."""
    return any(wildcard in text for wildcard in "*?[")


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


# Splits of a folder


def files_of_split(folder: Path, split: str) -> list[Path]:
    """Find the files of a split in a folder by their names alone, all of one type. Next to tars, other files are ignored.

    They are in the folder itself or in its ``data`` folder, under a name that has the split or in a folder named after it:

        train.jsonl, pairs_test-0.parquet          a word of the name
        data/train_prefs-00000-of-00002.parquet    as on the Hub: the name before the numbers
        validation/part-7.jsonl                    the name of the folder

    Files without a split in their names belong to ``train``. References from one file to others are not followed. `split` may be
    another word for it. Raises ValueError for a folder without files of records or without that split, or with several types of
    files.
    """
    asked = split.lower()
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for entry in _entries(place):
            name = entry.name.lower()
            if entry.is_dir() and (name in _SPLIT_OF or name == asked):
                found.setdefault(_SPLIT_OF.get(name, name), []).extend(filter(_may_hold_records, _entries(entry)))
            elif _may_hold_records(entry):
                found.setdefault(_split_of(name, asked, as_on_hub=place != folder), []).append(entry)
    names = [name for name, files in found.items() if files]
    if not names:
        none = f"{folder} is not a folder of records: neither it nor its 'data' folder has files that end in {', '.join(KNOWN)}"
        advice = "Name files or their folder after their split (train.jsonl), or give a pattern such as 'folder/*.jsonl'"
        raise ValueError(f"{none}, and it was not written by save_to_disk. {advice}.")
    files = found.get(_SPLIT_OF.get(asked, asked))
    if not files:
        raise ValueError(f"{folder} has no split {split!r}. Choose one of {', '.join(names)}, or give files.")
    kinds = [[file for file in files if file.name.lower().endswith(endings)] for endings in KINDS]
    there = [kind for kind in kinds if kind]
    if len(there) > 1 and not kinds[0]:
        several = f"{folder} has files of several types, such as {' and '.join(kind[0].name for kind in there)}"
        advice = f"Give a pattern of the files to read, such as '{folder}/*{there[0][0].suffix}'"
        raise ValueError(f"{several}, which may have the same records. {advice}.")
    return there[0]


def _report_unread(folder: Path, split: str) -> None:
    known = {*_SPLIT_OF, "data", _SLICE.sub("", split).lower()}
    places = [place for place in (*_entries(folder), *_entries(folder / "data")) if place.is_dir()]
    others = [place for place in places if place.name.lower() not in known and place.name[0] != "."]
    unread = [file for place in others for file in _entries(place) if file.name.lower().endswith(LINES) and _may_hold_records(file)]
    if unread:
        found = f"{folder} has files in subfolders that are not read ({len(unread)}, such as {unread[0].relative_to(folder)})"
        logger.warning(f"{found}. To read them give a pattern, such as '{folder}/**/*.jsonl'.")


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _may_hold_records(entry: Path) -> bool:
    name = entry.name.lower()
    return name.endswith(KNOWN) and name[0] != "." and name not in NOT_PAIRS and not entry.is_dir()


def _split_of(name: str, asked: str, *, as_on_hub: bool) -> str:
    if as_on_hub and (shard := _SHARD.match(name)):
        return _SPLIT_OF.get(shard[1], shard[1])
    if name.startswith(asked) and not name[len(asked) :][:1].isalnum():
        return _SPLIT_OF.get(asked, asked)
    return next((_SPLIT_OF[word] for word in re.findall(r"[a-z]+", name) if word in _SPLIT_OF), "train")


# File types


def _of_file(path: str, min_shards: int) -> list[Shard]:
    name, size = os.path.basename(path).lower(), os.path.getsize(path)
    if name.endswith(".parquet"):
        return _of_parquet(path)
    if name.endswith(TARS):
        return [shards.TarShard(path, size)]
    if not name.endswith(KNOWN):
        advice = f"Records are read from files that end in {', '.join(KNOWN)}"
        if name.endswith((".csv", ".tsv")):
            advice = (
                "Records are read from JSONL, JSON, Parquet and tar. Convert it in Python: "
                "datasets.load_dataset('csv', data_files=..., split='train').to_json('pairs.jsonl'), with sep='\\t' for tabs"
            )
        raise ValueError(f"{path} has an unknown file type. {advice}.")
    if not name.endswith(LINES) and _is_array(path):
        return [shards.ArrayShard(path, size)]
    return [LinesShard(path, size)] if name.endswith(".gz") else _of_lines(path, size, min_shards)


def _of_lines(path: str, size: int, min_shards: int) -> list[Shard]:
    step = max(1, min(max(SHARD_BYTES, -(-size // MAX_SHARDS)), size // min_shards))
    parts: list[Shard] = []
    start, line = 0, 1
    with open(path, "rb") as file:
        while start < size:
            lines, left = 0, step
            while left > 0 and (block := file.read(min(left, 2**20))):
                lines += block.count(b"\n")
                left -= len(block)
            while block and not block.endswith(b"\n"):  # to the end of the line
                block = file.readline(2**20)
                lines += block.endswith(b"\n")
            parts.append(LinesShard(path, file.tell() - start, start, file.tell(), line))
            start, line = file.tell(), line + lines
    return parts


def _is_array(path: str) -> bool:
    try:
        with shards.opened(path) as file:
            head: bytes = file.read(4096)
    except DAMAGE as error:
        raise damaged(path, error) from error
    return head.removeprefix(BOM_UTF8).lstrip()[:1] == b"["


def _of_parquet(path: str) -> list[Shard]:
    try:
        metadata = pq.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error, "not a Parquet file, ") from error
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{path} has the column {twice!r} twice, but only the last one would be used. Rename or remove one.")
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    firsts = accumulate(rows, initial=1)
    return [shards.ParquetShard(path, count, group, first) for group, (count, first) in enumerate(zip(rows, firsts, strict=False))]


def _from_disk(path: Path, split: str) -> Dataset:
    try:
        loaded = load_from_disk(str(path))
    except Exception as error:  # of many types: from its JSON and its Arrow files
        raise ValueError(f"{path} is damaged, or not complete ({one_line(error)}). Save it again with save_to_disk.") from error
    splits = loaded if isinstance(loaded, DatasetDict) else {"train": loaded}
    if split not in splits:
        raise ValueError(f"{path} has no split {split!r}. Choose one of {', '.join(map(str, splits))}.")
    for file in splits[split].cache_files:  # state.json names them
        if not Path(os.path.abspath(file["filename"])).is_relative_to(os.path.abspath(path)):
            raise ValueError(f"{path} refers to a file outside it, {file['filename']}, which is not read. Save the data set again.")
    return splits[split]


def _sliced(files: list[Path], folder: str, split: str) -> Dataset:
    kind = "parquet" if files[0].name.lower().endswith(".parquet") else "json"
    if files[0].name.lower().endswith(TARS):
        raise ValueError(
            f"{folder} has tars, of which {split!r} cannot be loaded: tars have no slices. Limit the number of records instead."
        )
    name = split[: split.index("[")]
    try:
        return load_dataset(kind, data_files={name: [str(file.resolve()) for file in files]}, split=split)
    except Exception as error:  # of many types: no such slice, damaged files
        found = f"{split!r} could not be loaded from the files in {folder} ({one_line(error)})"
        raise ValueError(f"{found}. Give a valid slice.") from error


def _from_hub(name: str, split: str) -> Dataset:
    try:
        return load_dataset(name, split=split)
    except Exception as error:  # of many types: no such name or split, no network, no files in it
        found = f"{name!r} is not a file or folder, and could not be loaded from the Hub ({one_line(error)})"
        raise ValueError(f"{found}. Give a file of records, or the name of a data set.") from error


def of_dataset(dataset: Dataset, name: str) -> list[Shard]:
    """The shards of a data set in memory or of the Hub, whose images stay encoded; `name` is for messages."""
    step = max(shards.ROWS, -(-len(dataset) // MAX_SHARDS))
    bare = dataset.with_format("arrow")
    return [shards.DatasetShard(name, min(step, len(bare) - start), bare, start) for start in range(0, len(bare), step)]
