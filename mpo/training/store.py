"""The store of caches on disk: entries by key, in shards, which are files that are written whole or not at all.

A root folder holds a sub-folder for each fingerprint (`mpo.training.reference.fingerprint`), whatever it keeps:

    cache/InternVLForConditionalGeneration-3f9c0a7be812/
        meta.json                                  the fingerprint by parts, and its origin
        4f0c…9a.safetensors                        a shard, under a name of its own
        77aa…c2.safetensors.0a1b2c3d4e5f.tmp       a leftover of a killed writer; never read

A shard has the key and some columns of each of its entries and, of vision features, their tensors one after the other. Keys and
columns of all shards are in memory, in a `Store`; tensors are memory-mapped when they are read. A shard's metadata holds the
fingerprint and a checksum of all but the tensors, each of which has its own. No shard is ever changed, only added or removed, so
ranks, runs and data loader workers share a folder. Two shards may have the same entry (two ranks computed it).
"""

import json
import logging
import os
import re
import secrets
import time
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mpo.encoding.keys import KEY_BYTES
from mpo.io import TEMPORARY, StoreError, atomic_write
from mpo.training.reference.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

META_FILE = "meta.json"
LEFTOVER_AGE_SECONDS = 60.0
"""A younger `.tmp` file may be a shard that is being written, which takes well under a second."""
SHARD_NAME = re.compile(r"(answers-r\d+-\d+-[0-9a-f]{12}|[0-9a-f]{32})\.(safetensors|parquet)")
"""Names of files that mpo writes, or wrote in earlier versions."""
KIND, LOG_PROBS, FEATURES = "cache", "reference log-probs", "vision features"
"""The part of a fingerprint that names what its cache holds, and what that is. Log-probs have no such part."""
FORMATS = {LOG_PROBS: 2, FEATURES: 3}
TENSOR, PLACE = "features", ("shard", "begin")
"""Name of a shard's tensors, and the columns that are not in its file: its number in a `Store`, and the first row of an entry."""
_OF_TENSORS = [("rows", "i4"), ("checksum", "i8"), ("shard", "i4"), ("begin", "i4")]
COLUMNS = {
    LOG_PROBS: np.dtype([("logps", "f4"), ("tokens", "i4")]),  # sums of log-probs, and numbers of labelled tokens
    FEATURES: np.dtype([("image", "u1", KEY_BYTES), ("size", "i4", 2), *_OF_TENSORS]),  # key of the pixels; width and height
}


class DamagedShard(StoreError):
    """A shard that cannot be read, or whose content has changed."""


class ForeignShard(StoreError):
    """A shard of another fingerprint."""


class UnreadableShard(StoreError):
    """A shard that this user may not read, or that cannot be opened for another reason than its content."""


class EarlierFormat(ValueError):
    """A folder of an earlier format."""


class Entries(NamedTuple):
    """Keys, raw bytes of shape (N,), and columns (`COLUMNS`), a structured array of shape (N,)."""

    keys: npt.NDArray[np.bytes_]
    values: npt.NDArray[Any]

    @classmethod
    def of(cls, keys: npt.NDArray[np.bytes_], kind: str, **columns: Any) -> "Entries":
        """Make entries of keys (`key_array`) and columns."""
        values = np.zeros(len(keys), COLUMNS[kind])
        for name, column in columns.items():
            values[name] = column
        if "rows" in columns:
            values["begin"] = np.cumsum(values["rows"]) - values["rows"]
        return cls(keys, values)

    @classmethod
    def merged(cls, parts: Sequence["Entries"]) -> "Entries":
        """Merge `parts`, sort them by key, and keep the last of the entries with the same key."""
        keys = np.concatenate([part.keys for part in parts])
        order = np.argsort(keys, kind="stable")  # stable: fast on sorted runs, and keeps the last last
        keys = keys[order]
        last = np.ones(len(keys), dtype=bool)
        last[:-1] = keys[1:] != keys[:-1]
        return cls(keys[last], np.concatenate([part.values for part in parts])[order[last]])


class Store:
    """The entries of one fingerprint on disk. `refresh` reads what others have written.

    Args:
        folder: a root for many fingerprints (created if missing), in which this store opens or creates its sub-folder; or such a
            sub-folder, which then must have the same fingerprint.
        fingerprint: says what all entries depend on, and what they are.
        durable: write a shard to the disk before it gets its name, so that no power cut damages it.

    Raises:
        ValueError: when `folder` is a sub-folder of another fingerprint (with the differences), or a shard is damaged or foreign.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint, *, durable: bool = True) -> None:
        self.fingerprint, self._durable = fingerprint, durable
        self.folder = open_folder(Path(folder), fingerprint)
        try:
            write_meta(self.folder, fingerprint)
        except OSError as error:
            what = f"The cache of {what_of(fingerprint)} cannot be written to {self.folder} ({error.strerror})"
            raise ValueError(f"{what}. Pass a folder that this user may write to, on a disk with room.") from error
        # Sorted blocks, each at least twice as long as the next: few to search, and cheap to add to.
        self._blocks: list[Entries] = []
        self._names: list[str] = []  # of shards, by number
        self._seen: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        """Return the number of entries. One that another rank wrote too may count twice until blocks are merged."""
        return sum(len(block.keys) for block in self._blocks)

    def look_up(self, keys: Sequence[bytes]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[Any]]:
        """Return which of N entries are here, and their columns, zeros for the others; both of shape (N,)."""
        asked, known = key_array(keys), np.zeros(len(keys), bool)
        values = np.zeros(len(keys), COLUMNS[what_of(self.fingerprint)])
        for block in self._blocks:  # a later one has the later of two shards
            rows = np.minimum(np.searchsorted(block.keys, asked), len(block.keys) - 1)
            here = block.keys[rows] == asked
            values[here], known[here] = block.values[rows[here]], True
        return known, values

    def count(self, names: Container[str]) -> int:
        """Return the number of entries with tensors in shards of these names."""
        numbers = [number for number, name in enumerate(self._names) if name in names]
        return sum(int(np.isin(block.values["shard"], numbers).sum()) for block in self._blocks)

    def write(self, keys: Sequence[bytes], tensors: Sequence[Tensor] = (), **columns: Any) -> None:
        """Write entries as one shard: their columns and, for features, their tensors, each of shape (rows, ...). Raises OSError."""
        if tensors:
            columns |= {"rows": list(map(len, tensors)), "checksum": [_checksum({}, {TENSOR: tensor}) for tensor in tensors]}
        entries = Entries.of(key_array(keys), what_of(self.fingerprint), **columns)
        write_meta(self.folder, self.fingerprint)  # again, if the folder was removed
        path = write_shard(self.folder, entries, self.fingerprint, tensors, durable=self._durable)
        self._remember({path.name: entries})

    def refresh(self) -> None:
        """Read the shards that other ranks and runs have written since."""
        found = dict[str, Entries]()
        for _ in range(10):
            new = shards(self.folder, self._seen | found.keys())
            for path in new:
                with suppress(FileNotFoundError):  # removed by others, or merged into one that the next look finds
                    found[path.name] = read_shard(path, self.fingerprint)
            if all(path.name in found for path in new):
                return self._remember(found)
        raise ValueError(f"Shards in {self.folder} disappear while they are read. Run again when no other process deletes them.")

    def _remember(self, found: Mapping[str, Entries]) -> None:
        for number, entries in enumerate(found.values(), len(self._names)):
            if "shard" in (entries.values.dtype.names or ()):
                entries.values["shard"] = number
        self._names += found
        self._seen |= found.keys()
        if any(len(entries.keys) for entries in found.values()):
            self._blocks.append(Entries.merged(list(found.values())))
        while len(self._blocks) > 1 and len(self._blocks[-2].keys) < 2 * len(self._blocks[-1].keys):
            self._blocks[-2:] = [Entries.merged(self._blocks[-2:])]


def open_folder(root: Path, fingerprint: Fingerprint) -> Path:
    """Return the folder of a fingerprint, `root` or a sub-folder, which may not exist yet; log what the nearest differs in.

    Raises ValueError for a file, or a folder of another fingerprint.
    """
    what, root = what_of(fingerprint), Path(os.path.abspath(root.expanduser()))  # "." has no parent
    if root.exists() and not root.is_dir():
        raise ValueError(f"The cache of {what} must be a folder, but {root} is a file. Pass another path.")
    own = own_folder(root, fingerprint)
    for folder in (root, own):
        if not (folder / META_FILE).is_file():
            continue
        if differences := fingerprint.differences(read_fingerprint(folder)):
            raise ValueError(
                f"{folder} holds {what} of another model or other settings. Differences (there -> here): "
                f"{'; '.join(differences)}. Pass its parent folder, where each fingerprint has a sub-folder, or an empty one. "
                f"`mpo cache inspect {folder}` shows its settings."
            )
        return folder
    caches = read_caches(root)[0] if _metas(root) else []
    others = [(path.name, fingerprint.differences(other)) for path, other in caches if what_of(other) == what]
    if others:
        name, differences = min(others, key=lambda item: len(item[1]))
        logger.info(
            f"{root} has no {what} for these settings, so they are computed. The nearest, {name}, differs in (there -> "
            f"here): {'; '.join(differences)}."
        )
    return own


def own_folder(root: Path, fingerprint: Fingerprint) -> Path:
    """Return the sub-folder of a root folder for a fingerprint."""
    kind = re.sub(r"[^A-Za-z0-9_.]", "_", str(fingerprint.about.get("model", "reference")))
    return root / f"{kind}-{fingerprint.digest[:12]}"


def what_of(fingerprint: Fingerprint) -> str:
    """Name what a cache holds, by its fingerprint."""
    return fingerprint.parts.get(KIND, LOG_PROBS)


def format_of(fingerprint: Fingerprint) -> int:
    """Return the format in which this version of mpo writes and reads a cache."""
    return FORMATS.get(what_of(fingerprint), 0)


def _metas(folder: Path) -> list[Path]:
    return [folder / META_FILE] if (folder / META_FILE).is_file() else sorted(folder.glob(f"*/{META_FILE}"))


def read_caches(folder: str | os.PathLike[str]) -> tuple[list[tuple[Path, Fingerprint]], dict[Path, Exception]]:
    """Return the caches in a folder, itself or its sub-folders, with their fingerprints; and those that cannot be read, with why.

    Raises ValueError when there is none.
    """
    found, unread, path = [], dict[Path, Exception](), Path(folder)
    for meta in _metas(path):
        try:
            found.append((meta.parent, read_fingerprint(meta.parent)))
        except (ValueError, OSError) as error:  # damaged, of another format or user
            unread[meta.parent] = error
    if not (found or unread):
        kind = "is not a folder" if not path.is_dir() else f"has no {META_FILE}, and no sub-folder with one"
        raise ValueError(f"{path} {kind}, so it is not a cache. Pass the run's reference_cache or vision_feature_cache folder.")
    return found, unread


def read_fingerprint(folder: Path) -> Fingerprint:
    """Read the fingerprint in a folder's meta.json. Raises EarlierFormat, and ValueError if it is damaged or has a later format."""
    path = folder / META_FILE
    try:
        meta = json.loads(path.read_text())
        parts = meta.get("parts") if isinstance(meta, dict) else None  # of a later format they may be anything
        reads = format_of(Fingerprint(parts if isinstance(parts, dict) else {}))
        found, other = f"{path} has format {meta['format']}, and this version of mpo reads {reads}.", "or use another folder."
        if meta["format"] > reads:
            raise ValueError(f"{found} Update mpo, {other}")
        fingerprint = Fingerprint({**meta["parts"]}, {**meta["settings"]}, {**meta["about"]})
        if meta["format"] != reads:
            fix = f"Delete {folder} (`mpo cache prune --old {folder}`), whose content is then computed again, {other}"
            raise EarlierFormat(f"{found} {fix}")
        return fingerprint
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or of something else ({type(error).__name__}: {error}). Delete it if this is the folder of a "
            "cache: the next run with these settings writes it again, and keeps the shards."
        ) from error


def leftovers(folder: Path, *, min_age_seconds: float = 0.0) -> list[Path]:
    """Return incomplete files of killed writers: shards or meta.json under a temporary name."""
    old = [path for path, status in statuses(sorted(folder.rglob("*.tmp"))) if time.time() - status.st_mtime >= min_age_seconds]
    named = [(path, target["name"]) for path in old if (target := TEMPORARY.fullmatch(path.name))]
    return [path for path, name in named if (name == META_FILE or SHARD_NAME.fullmatch(name)) and path.is_file()]


def write_meta(folder: Path, fingerprint: Fingerprint) -> None:
    """Write a folder's meta.json unless it exists. Raises OSError where it cannot be written."""
    path = folder / META_FILE
    if path.exists():
        return
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"format": format_of(fingerprint), "created": created, **asdict(fingerprint)}, indent=2)
    write_file(text.encode(), path)  # ranks may write it at the same time; the last one replaces equal content


def write_file(data: bytes, path: Path, *, durable: bool = True) -> None:
    """Write a file atomically, again if a pruning on a disk whose clock is ahead removes it as a leftover."""
    for attempt in (1, 2, 3):
        try:
            with atomic_write(path, "wb", durable=durable) as file:
                file.write(data)
            return
        except FileNotFoundError:
            if attempt == 3:
                raise


def key_array(keys: Sequence[bytes]) -> npt.NDArray[np.bytes_]:
    """Return keys as one array, shape (N,)."""
    for key in keys:
        assert len(key) == KEY_BYTES, f"a key has {KEY_BYTES} bytes, this one {len(key)}"
    return np.frombuffer(b"".join(keys), dtype=f"S{KEY_BYTES}")


def statuses(paths: Iterable[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    """Return paths and their status, without those that other processes have removed."""
    for path in paths:
        with suppress(FileNotFoundError):
            yield path, path.stat()


def shards(folder: Path, seen: Container[str] = ()) -> list[Path]:
    """Return the shards of a folder, and files that look like some, sorted; without those whose names were `seen`."""
    with suppress(FileNotFoundError), os.scandir(folder) as found:
        names = {entry.name for entry in found if entry.name.endswith(".safetensors") and entry.is_file()}
        return [folder / name for name in sorted(name for name in names if name not in seen)]
    return []


def write_shard(
    folder: Path, entries: Entries, fingerprint: Fingerprint, tensors: Sequence[Tensor] = (), *, durable: bool = True
) -> Path:
    """Write one shard atomically, and return its path."""
    columns = {name: entries.values[name] for name in entries.values.dtype.names or () if name not in PLACE}
    columns["keys"] = entries.keys.view(np.uint8).reshape(-1, KEY_BYTES)
    parts = {name: torch.from_numpy(column.copy()) for name, column in columns.items()}
    about, path = _about(fingerprint), folder / f"{secrets.token_hex(16)}.safetensors"
    about["checksum"] = str(_checksum(about, parts))
    write_file(save(parts | ({TENSOR: torch.cat(list(tensors))} if tensors else {}), about), path, durable=durable)
    return path


def open_shard(path: Path, fingerprint: Fingerprint) -> Any:
    """Open a shard, which can then be read after its removal. Raises FileNotFoundError, UnreadableShard and DamagedShard."""
    try:
        return safe_open(path, "pt")  # type: ignore[no-untyped-call]
    except (SafetensorError, ValueError, OSError, RuntimeError) as error:
        # It opens the file twice, and says of any that it cannot open, first that it does not exist, then RuntimeError.
        try:
            path.open("rb").close()
        except FileNotFoundError as removed:
            raise removed from None
        except OSError as reason:
            fix = "Give this user the right to read it, or use another folder"
            raise UnreadableShard(f"{path} cannot be opened ({reason.strerror}). {fix}.") from error
        raise damaged(path, fingerprint, f"{type(error).__name__}: {error}") from error


def read_shard(path: Path, fingerprint: Fingerprint) -> Entries:
    """Read and check all of a shard but its tensors. Raises as `open_shard`, and ForeignShard for one of another fingerprint."""
    file = open_shard(path, fingerprint)
    try:
        found = {name: file.get_tensor(name) for name in file.keys() if name != TENSOR}  # noqa: SIM118
    except SafetensorError as error:
        raise damaged(path, fingerprint, f"{type(error).__name__}: {error}") from error
    about = dict(file.metadata() or {})
    if about.pop("checksum", None) != str(_checksum(about, found)):
        raise damaged(path, fingerprint, "its content does not match its checksum")
    if about != _about(fingerprint):
        raise ForeignShard(
            f"{path} has {what_of(fingerprint)} of another model or other settings (fingerprint {about.get('fingerprint')}, this "
            f"folder has {fingerprint.digest}). Move it back to its folder."
        )
    keys, columns = found.pop("keys").numpy(), {name: column.numpy() for name, column in found.items()}
    return Entries.of(keys.reshape(-1).view(f"S{KEY_BYTES}"), what_of(fingerprint), **columns)


def read_tensor(file: Any, path: Path, fingerprint: Fingerprint, value: Any) -> Tensor:
    """Read the tensor of an entry, by its columns, from an opened shard. Raises DamagedShard if it is not what was written."""
    try:
        found: Tensor = file.get_slice(TENSOR)[int(value["begin"]) : int(value["begin"] + value["rows"])]
    except (SafetensorError, LookupError) as error:
        raise damaged(path, fingerprint, str(error)) from error
    if _checksum({}, {TENSOR: found}) != value["checksum"]:
        raise damaged(path, fingerprint, "its content does not match its checksum")
    return found


def _about(fingerprint: Fingerprint) -> dict[str, str]:
    return {"format": str(format_of(fingerprint)), "fingerprint": fingerprint.digest}


def _checksum(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> int:
    shapes = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    found = zlib.crc32(repr((sorted(about.items()), shapes)).encode())
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return found


def damaged(path: Path, fingerprint: Fingerprint, reason: str) -> DamagedShard:
    """The error for a file that cannot be read."""
    fix = "mpo does not write files of this name: move it out of this folder"
    if SHARD_NAME.fullmatch(path.name):
        fix = f"`mpo cache prune {path.parent}` removes it; what it held is then computed again"
    return DamagedShard(f"{path} is not a file of {what_of(fingerprint)}: {reason}. {fix}.")
