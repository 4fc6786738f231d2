"""What caches on disk share: a folder for each fingerprint, with its meta.json, and files that are written whole or not at all.

A file is one of safetensors, whose metadata holds the fingerprint and a checksum of tensors and metadata. It is memory-mapped when
it is read, and written under a temporary name and renamed.
"""

import json
import os
import re
import time
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mpo.io import TEMPORARY, StoreError, atomic_write
from mpo.training.reference.fingerprint import Fingerprint

FORMAT = 2
META_FILE = "meta.json"
LEFTOVER_AGE_SECONDS = 60.0
"""A younger `.tmp` file may be a shard that is being written, which takes well under a second."""
KIND, FEATURES = "cache", "vision features"
"""The part of a fingerprint that names what its cache holds, and the value for vision features. Log-probs have none."""
SHARD_NAME = re.compile(r"(answers-r\d+-\d+-[0-9a-f]{12}|[0-9a-f]{32})\.(safetensors|parquet)")
"""Names of files that mpo writes, or wrote in format 1."""


class DamagedShard(StoreError):
    """A shard that cannot be read, or whose content has changed."""


class ForeignShard(StoreError):
    """A shard of another fingerprint."""


class EarlierFormat(ValueError):
    """A folder of an earlier format."""


def open_folder(root: Path, fingerprint: Fingerprint) -> tuple[Path, str | None]:
    """Find the folder of a fingerprint: `root` itself or a sub-folder of it.

    Returns:
        the folder, which may not exist yet; and, if the root has other fingerprints only, the nearest and its differences.

    Raises:
        ValueError: when `root` is a file, or the folder of another fingerprint.
    """
    what, root = what_of(fingerprint), root.expanduser()
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
        return folder, None
    others = {}
    for meta in root.glob(f"*/{META_FILE}"):
        with suppress(ValueError, OSError):  # damaged, of another format or user, and not used here
            if what_of(other := read_fingerprint(meta.parent)) == what:
                others[meta.parent.name] = fingerprint.differences(other)
    if not others:
        return own, None
    name, differences = min(others.items(), key=lambda item: len(item[1]))
    return own, (
        f"{root} has no {what} for these settings, so they are computed. The nearest, {name}, differs in (there -> "
        f"here): {'; '.join(differences)}."
    )


def own_folder(root: Path, fingerprint: Fingerprint) -> Path:
    """Return the sub-folder of a root folder for a fingerprint."""
    kind = re.sub(r"[^A-Za-z0-9_.]", "_", str(fingerprint.about.get("model", "reference")))
    return root / f"{kind}-{fingerprint.digest[:12]}"


def what_of(fingerprint: Fingerprint) -> str:
    """Name what a cache holds, by its fingerprint."""
    return fingerprint.parts.get(KIND, "reference log-probs")


def cache_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the folders of caches: `folder` itself, or its sub-folders.

    Raises:
        ValueError: when there is none.
    """
    path = Path(folder)
    found = [path] if (path / META_FILE).is_file() else sorted(meta.parent for meta in path.glob(f"*/{META_FILE}"))
    if not found:
        kind = "is not a folder" if not path.is_dir() else f"has no {META_FILE}, and no sub-folder with one"
        raise ValueError(f"{path} {kind}, so it is not a cache. Pass the run's reference_cache or vision_feature_cache folder.")
    return found


def read_caches(folder: str | os.PathLike[str]) -> tuple[list[tuple[Path, Fingerprint]], dict[Path, Exception]]:
    """Return the folders of `cache_folders` with their fingerprints, and those of which it cannot be read, with the reason."""
    found, unread = [], dict[Path, Exception]()
    for path in cache_folders(folder):
        try:
            found.append((path, read_fingerprint(path)))
        except (ValueError, OSError) as error:
            unread[path] = error
    return found, unread


def read_fingerprint(folder: Path) -> Fingerprint:
    """Read the fingerprint in a folder's meta.json.

    Raises:
        EarlierFormat: when an earlier version of mpo wrote the folder.
        ValueError: when it is damaged or has a later format.
    """
    path = folder / META_FILE
    try:
        meta = json.loads(path.read_text())
        found, other = f"{path} has format {meta['format']}, and this version of mpo reads {FORMAT}.", "or use another folder."
        if meta["format"] > FORMAT:
            raise ValueError(f"{found} Update mpo, {other}")
        fingerprint = Fingerprint({**meta["parts"]}, {**meta["settings"]}, {**meta["about"]})
        if meta["format"] != FORMAT:
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
    found = []
    for path in sorted(folder.rglob("*.tmp")):
        target = TEMPORARY.fullmatch(path.name)
        with suppress(FileNotFoundError):  # renamed by its writer meanwhile
            if target and (target["name"] == META_FILE or SHARD_NAME.fullmatch(target["name"])):
                if time.time() - path.stat().st_mtime >= min_age_seconds:
                    found.append(path)
    return found


def write_meta(folder: Path, fingerprint: Fingerprint) -> None:
    """Write a folder's meta.json unless it exists. Raises ValueError where it cannot be written."""
    path = folder / META_FILE
    if path.exists():
        return
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = json.dumps({"format": FORMAT, "created": created, **asdict(fingerprint)}, indent=2)
    # Ranks may write it at the same time; the last one replaces equal content.
    try:
        write_file(text.encode(), path)
    except OSError as error:
        what = f"The cache of {what_of(fingerprint)} cannot be written to {folder} ({error.strerror})"
        raise ValueError(f"{what}. Pass a folder that this user may write to.") from error


def write_file(data: Any, path: Path, *, durable: bool = True) -> None:
    """Write a file atomically, again if a pruning on a disk whose clock is ahead removes it as a leftover.

    Args:
        data: its content.
        path: its path.
        durable: write it to the disk before it gets its name, so that no power cut damages it.
    """
    for attempt in (1, 2, 3):
        try:
            with atomic_write(path, "wb", durable=durable) as file:
                file.write(data)
            return
        except FileNotFoundError:
            if attempt == 3:
                raise


def write_tensors(
    tensors: Mapping[str, Tensor],
    path: Path,
    fingerprint: Fingerprint,
    about: Mapping[str, str] | None = None,
    *,
    durable: bool = True,
) -> int:
    """Write a file of tensors, with metadata `about` them, atomically (see `write_file`). Returns its size in bytes."""
    known = {**(about or {}), "format": str(FORMAT), "fingerprint": fingerprint.digest}
    data = save(dict(tensors), {**known, "checksum": _checksum(known, tensors)})
    write_file(data, path, durable=durable)
    return len(data)


def open_tensors(path: Path, fingerprint: Fingerprint) -> Any:
    """Open a file of tensors, as safetensors does; it can then be read after its removal.

    Raises:
        FileNotFoundError: when there is none.
        DamagedShard: for a file that cannot be read.
        ForeignShard: for one of another fingerprint.
    """
    try:
        file: Any = safe_open(path, "pt")  # type: ignore[no-untyped-call]
        about = file.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise damaged(path, fingerprint, f"{type(error).__name__}: {error}") from error
    if about.get("fingerprint") != fingerprint.digest or about.get("format") != str(FORMAT):
        read_tensors(file, path, fingerprint)  # rather damaged than foreign
        raise ForeignShard(
            f"{path} has {what_of(fingerprint)} of another model or other settings (fingerprint {about.get('fingerprint')}, this "
            f"folder has {fingerprint.digest}). Move it back to its folder."
        )
    return file


def read_tensors(file: Any, path: Path, fingerprint: Fingerprint) -> dict[str, Tensor]:
    """Read an opened file. Raises DamagedShard if its content does not match its checksum."""
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = dict(file.metadata() or {})
    if about.pop("checksum", None) != _checksum(about, tensors):
        raise damaged(path, fingerprint, "its content does not match its checksum")
    return tensors


def _checksum(about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    shapes = [(name, str(tensor.dtype), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    found = zlib.crc32(repr((sorted(about.items()), shapes)).encode())
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return str(found)


def damaged(path: Path, fingerprint: Fingerprint, reason: str) -> DamagedShard:
    """The error for a file that cannot be read."""
    folder = path.parent if (path.parent / META_FILE).is_file() else path.parent.parent
    fix = "mpo does not write files of this name: move it out of this folder"
    if SHARD_NAME.fullmatch(path.name):
        fix = f"`mpo cache prune {folder}` removes it; what it held is then computed again"
    return DamagedShard(f"{path} is not a file of {what_of(fingerprint)}: {reason}. {fix}.")
