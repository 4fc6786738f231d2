"""Read MMPR's ``meta.json``: many sources in one file, each with its annotations, its images and its repeat_time.

{"NAME": {"root": FOLDER, "annotation": FILE.jsonl, "data_augment": false, "repeat_time": 0.5, "length": 6910,
          "max_dynamic_patch": 6}, ...}
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo.io import BadRecord, json_kind, parse_json

MAX_BYTES = 64 * 2**20
"""Maximum size of a file; the largest of MMPR has 46 kB."""


@dataclass(frozen=True)
class SourceSpec:
    """One source of a ``meta.json``.

    Attributes:
        name: name of the source.
        root: the folder of its images.
        annotation: the JSONL file of its pairs.
        data_augment: whether its images are augmented in training.
        repeat_time: how often its pairs are used; below 1, a random fraction of them.
        length: number of lines of the file; None if not given.
        max_tiles: maximum tiles per image (``max_dynamic_patch``); None: the processor's setting.
    """

    name: str
    root: Path
    annotation: Path
    data_augment: bool = False
    repeat_time: float = 1.0
    length: int | None = None
    max_tiles: int | None = None

    def as_source(self) -> dict[str, Any]:
        """Convert to a source of `mpo.data.load.mix`."""
        return {
            "name": self.name,
            "source": self.name,
            "path": str(self.annotation),
            "image_root": str(self.root),
            "repeat_time": self.repeat_time,
            "augment": self.data_augment or None,
            "tiles": None if self.max_tiles is None else {"max": self.max_tiles},
        }


def is_meta(path: str | Path) -> bool:
    """Whether a file is a ``meta.json`` and not a file of pairs: an object of objects with an ``annotation``."""
    path = Path(path)
    if not _may_be_object(path):
        return False
    found = one_object(path)
    entries = found and all(isinstance(entry, dict) and "annotation" in entry for entry in found.values())
    return bool(entries) or path.name.lower() == "meta.json"


def one_object(path: str | Path) -> dict[str, Any]:
    """Read the single object of a ``.json`` file; return an empty dict for other files, such as an array or lines of objects.

    An array is detected by its first bytes; a file larger than `MAX_BYTES` is not opened.
    """
    path = Path(path)
    if not _may_be_object(path):
        return {}
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError):  # lines, each of them JSON
        return {}
    return found if isinstance(found, dict) else {}


def _may_be_object(path: Path) -> bool:
    if not path.name.lower().endswith(".json") or not path.is_file() or path.stat().st_size > MAX_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def read_meta(path: str | Path, *, base: str | Path | None = None) -> list[SourceSpec]:
    """Read and check a ``meta.json``.

    Args:
        path: the file.
        base: the folder that its paths are relative to; every ``root`` must be inside it, also after following links. The default
            is the first of these folders that has the annotations: the file's folder, its parent (as MMPR's own files expect),
            the current folder. A ``root`` may then be any folder (``..``, an absolute path). Set a base for files that you do not
            trust.

    Raises:
        ValueError: for a file that is not a meta.json, entries with missing or invalid values, missing files, a root outside
            `base`, and annotations whose number of lines is not ``length``.
    """
    path = Path(path).expanduser()
    try:
        found = parse_json(path.read_bytes().removeprefix(b"\xef\xbb\xbf"), "a meta.json")
    except OSError as error:
        raise ValueError(f"There is no file {path} that can be read ({error}). Set data.meta to a meta.json.") from error
    except BadRecord as bad:
        raise ValueError(f"{path}: {bad.reason}") from None
    if not isinstance(found, dict) or not found:
        kind = "an empty object" if found == {} else json_kind(found)
        raise ValueError(f"{path} holds {kind} instead of an object of sources, each with a root and an annotation.")
    bases = [Path(base).expanduser()] if base else [path.parent, path.parent.resolve().parent, Path.cwd()]
    specs = [_entry(f"{path}: source {name!r}", name, entry, bases) for name, entry in found.items()]
    if base:
        for spec in specs:
            _refuse_outside(bases[0], spec, f"{path}: source {spec.name!r}")
    return specs


def _refuse_outside(base: Path, spec: SourceSpec, where: str) -> None:
    root = spec.root.resolve()
    if not root.is_relative_to(base.resolve()):
        raise ValueError(
            f"{where}: its 'root' is {root}, which lies outside data.image_root ({base}). Fix 'root' or, if you trust the file, "
            "set data.image_root to a folder that contains it."
        )


def _entry(where: str, name: str, entry: Any, bases: list[Path]) -> SourceSpec:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {json_kind(entry)} instead of an object with a root and an annotation.")
    for field in ("root", "annotation"):
        value = entry.get(field)
        if not isinstance(value, str) or (field == "annotation" and not value) or "\0" in value:
            found = "is missing" if field not in entry else "is empty" if value == "" else f"is {json_kind(value)}"
            raise ValueError(f"{where}: {field!r} {found}. Set it to a path.")
        if "://" in value:
            raise ValueError(f"{where}: {field!r} is {value!r}, but nothing is downloaded for a data file. Set it to a local path.")
    base = next((one for one in bases if (one / entry["annotation"]).is_file()), None)
    if base is None:
        tried = ", ".join(str(one / entry["annotation"]) for one in bases)
        raise ValueError(
            f"{where}: there is no annotation file; tried {tried}. Set data.image_root to the folder that the paths are "
            "relative to."
        )
    annotation = base / entry["annotation"]
    root = base / entry["root"]
    spec = SourceSpec(
        name,
        root if root.is_dir() else next((one / entry["root"] for one in bases if (one / entry["root"]).is_dir()), root),
        annotation,
        _flag(entry.get("data_augment"), f"{where}: 'data_augment'"),
        _repeat_time(entry.get("repeat_time", 1), where),
        _whole(entry.get("length"), f"{where}: 'length'", 0),
        _whole(entry.get("max_dynamic_patch"), f"{where}: 'max_dynamic_patch'", 1),
    )
    if spec.length is not None and (lines := count_lines(annotation)) != spec.length:
        raise ValueError(
            f"{where}: {annotation} has {lines:,} lines, and 'length' says {spec.length:,}. Its download may be cut short. Repeat "
            "it or, if the file is complete, correct 'length' or leave it out."
        )
    return spec


def count_lines(path: str | os.PathLike[str]) -> int:
    """Count the lines of a file, including a last line without a line end, but not blank lines at the end."""
    lines, ends = 0, 0
    with open(path, "rb") as file:
        while block := file.read(2**20):
            if text := block.rstrip():
                lines = ends + text.count(b"\n") + 1
            ends += block.count(b"\n")
    return lines


def _flag(value: Any, what: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{what} is {json_kind(value)} instead of true or false.")
    return bool(value)


def _repeat_time(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6 or not math.isfinite(value):
        raise ValueError(
            f"{where}: 'repeat_time' must be a number above 0 and below 1e6 (0.1: a random tenth of the pairs; 2: all of them "
            f"twice); got {value!r}."
        )
    return float(value)


def _whole(value: Any, what: str, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{what} must be a whole number of {least} or more; got {value if isinstance(value, float) else json_kind(value)}."
        )
    return value
