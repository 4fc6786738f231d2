"""Find the files of a split in a folder, by their names alone. References from one file to others are not followed.

The files are in the folder itself or in its ``data`` folder, under a name that has the split or in a folder named after it:

    train.jsonl, pairs_test-0.parquet          a word of the name
    data/train_prefs-00000-of-00002.parquet    as on the Hub: the name before the numbers
    validation/part-7.jsonl                    the name of the folder

Files without a split in their names belong to ``train``.
"""

from __future__ import annotations

import re
from pathlib import Path

from mpo.io import BAD_RECORDS

LINES = (".jsonl", ".jsonl.gz", ".ndjson")
ARRAYS = (".json", ".json.gz")
TARS = (".tar", ".tar.gz", ".tgz")
KNOWN = (*LINES, *ARRAYS, ".parquet", *TARS)
"""Endings of files that pairs can be read from."""
KINDS = (TARS, LINES, ARRAYS, (".parquet",))
"""File types, of which a split has one; next to tars, other files are ignored."""
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words for each split, as on the Hub."""
NOT_PAIRS = ("dataset_info.json", "dataset_infos.json", BAD_RECORDS)
"""Files next to the pairs that contain none."""
_SPLIT_OF = {word: split for split, words in SPLITS.items() for word in words}
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}\b")


def files_of_split(folder: Path, split: str) -> list[Path]:
    """Find the files of a split in a folder, all of one type. Next to tars, other files of the split are ignored.

    Args:
        folder: the folder.
        split: name of the split, or another word for it.

    Raises:
        ValueError: for a folder without files of pairs, without that split, or with files of several types.
    """
    asked = split.lower()
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for entry in _entries(place):
            name = entry.name.lower()
            if entry.is_dir() and (name in _SPLIT_OF or name == asked):
                found.setdefault(_SPLIT_OF.get(name, name), []).extend(filter(_may_hold_pairs, _entries(entry)))
            elif _may_hold_pairs(entry):
                found.setdefault(_split_of(name, asked, as_on_hub=place != folder), []).append(entry)
    names = [name for name, files in found.items() if files]
    if not names:
        none = f"{folder} is not a folder of pairs: neither it nor its 'data' folder has files that end in {', '.join(KNOWN)}"
        advice = (
            "Name files or their folder after their split (train.jsonl), or set data.path to a pattern such as 'folder/*.jsonl'"
        )
        raise ValueError(f"{none}, and it was not written by save_to_disk. {advice}.")
    files = found.get(_SPLIT_OF.get(asked, asked))
    if not files:
        raise ValueError(f"{folder} has no split {split!r}. Set data.split to one of {', '.join(names)}, or data.path to files.")
    kinds = [[file for file in files if file.name.lower().endswith(endings)] for endings in KINDS]
    there = [kind for kind in kinds if kind]
    if len(there) > 1 and not kinds[0]:
        several = f"{folder} has files of several types, such as {' and '.join(kind[0].name for kind in there)}"
        advice = f"Set data.path to a pattern of the files to read, such as '{folder}/*{there[0][0].suffix}'"
        raise ValueError(f"{several}, which may have the same pairs. {advice}.")
    return there[0]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _may_hold_pairs(entry: Path) -> bool:
    name = entry.name.lower()
    return name.endswith(KNOWN) and name[0] != "." and name not in NOT_PAIRS and not entry.is_dir()


def _split_of(name: str, asked: str, *, as_on_hub: bool) -> str:
    """Find the split of a file name in lower case; the requested split may have any name."""
    if as_on_hub and (shard := _SHARD.match(name)):
        return _SPLIT_OF.get(shard[1], shard[1])
    if name.startswith(asked) and not name[len(asked) :][:1].isalnum():
        return _SPLIT_OF.get(asked, asked)
    words = re.findall(r"[a-z]+", name)
    return next((_SPLIT_OF[word] for word in words if word in _SPLIT_OF), "train")
