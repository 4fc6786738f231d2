"""A cache of vision features on disk, a file per image, that ranks, data loader workers and runs share.

A root folder holds one sub-folder per fingerprint, as that of `mpo.training.reference.cache`:

    cache/
      InternVLForConditionalGeneration-91c2d7aa03fe/
        meta.json                                        the fingerprint by parts, and its origin
        0a/0a3b…e1.safetensors                           the features of an image, by its key; memory-mapped when it is read
        0a/0a77…c2.safetensors.0a1b2c3d4e5f.tmp          a leftover of a killed writer; never read

The file system is the index: shards with one in memory, as log-probs have, find an image no faster (`benchmarks/feature_files.py`).
A file's modification time is that of its last use: when the files of all fingerprints take more than the limit, those that were not
used for longest are removed.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from mpo.encoding.keys import KEY_BYTES
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import META_FILE, SHARD_NAME, damaged, open_folder, open_tensors, read_tensors, write_meta, write_tensors

logger = logging.getLogger(__name__)

LIMIT_GB = 200.0
SLACK = 0.01
"""Fraction of the limit that a process may write before it looks at the folder's size again, and that is removed beyond it."""


class Found(NamedTuple):
    """An image whose features the cache has."""

    key: bytes
    image: bytes  # key of its pixels (`mpo.encoding.keys.image_key`)
    size: tuple[int, int]  # width and height
    tiles: int
    path: Path
    file: Any  # opened, so that it can be read after its removal


class FeatureCache:
    """Cache the features of images on disk, for one fingerprint (`mpo.training.features.use.vision_fingerprint`).

    Args:
        folder: root folder or sub-folder, as in `mpo.training.reference.cache.ReferenceCache`.
        fingerprint: likewise.
        limit_bytes: maximum size of all features in the root folder.

    Raises:
        ValueError: when `folder` is a sub-folder of another fingerprint; from `find` and `read`, for damaged and foreign files.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint, *, limit_bytes: float = LIMIT_GB * 1e9) -> None:
        self.fingerprint, self.limit_bytes = fingerprint, limit_bytes
        self.folder, why_new = open_folder(Path(folder), fingerprint)
        if why_new:
            logger.info(why_new)
        write_meta(self.folder, fingerprint)
        self._unseen = float("inf")  # bytes written since the folder's size was looked at
        self._is_full = False

    @staticmethod
    def key(image: bytes, limits: Mapping[str, Any]) -> bytes:
        """Return the key of an image's tiles, of the key of its file or pixels and its tile limits (`mpo.encoding.tiles`)."""
        return hashlib.blake2b(image + repr(sorted(limits.items())).encode(), digest_size=KEY_BYTES).digest()

    def _path(self, key: bytes) -> Path:
        return self.folder / key.hex()[:2] / f"{key.hex()}.safetensors"

    def find(self, key: bytes) -> Found | None:
        """Look an image up."""
        with suppress(FileNotFoundError):
            return open_features(self._path(key), self.fingerprint)
        return None

    def read(self, images: Sequence[Found]) -> Tensor:
        """Read the features of images, shape (tiles of all, tokens, channels)."""
        for one in images:
            with suppress(OSError):  # removed meanwhile, or of another user
                os.utime(one.path)
        return torch.cat([read_tensors(one.file, one.path, self.fingerprint)["features"] for one in images])

    def add(self, key: bytes, image: bytes, size: tuple[int, int], features: Tensor) -> None:
        """Add the features of an image; not those that are not finite.

        Args:
            key: see `key`.
            image: key of its pixels.
            size: its width and height.
            features: shape (tiles, tokens, channels), on any device.
        """
        values, path = features.detach().cpu().contiguous(), self._path(key)
        if self._is_full or not bool(values.isfinite().all()):
            return
        about = {"key": key.hex(), "image": image.hex(), "size": "{} {}".format(*size)}
        try:
            path.parent.mkdir(exist_ok=True)
            written = write_tensors({"features": values}, path, self.fingerprint, about, durable=False)
        except OSError as error:
            self._is_full = True
            logger.warning(f"Vision features cannot be written to {self.folder} ({error.strerror}), so new images are not cached.")
            return
        self._unseen += written
        if self._unseen > SLACK * self.limit_bytes:
            self._remove_unused()

    def holds(self) -> str:
        """Describe what the cache holds."""
        sizes = [(size, path.parent.parent == self.folder) for _, size, path in self._states()]
        own = [size for size, is_own in sizes if is_own]
        return (
            f"{self.folder} holds vision features of {len(own):,} images, {sum(own) / 1e9:.2f} GB; with other settings "
            f"{sum(size for size, _ in sizes) / 1e9:.2f} of at most {self.limit_bytes / 1e9:g} GB"
        )

    def _states(self) -> Iterator[tuple[int, int, Path]]:
        """Time of the last use, size and path of the files of all fingerprints of the root folder, and of nothing else there."""
        for meta in self.folder.parent.glob(f"*/{META_FILE}"):
            for path in feature_files(meta.parent):
                with suppress(FileNotFoundError):  # another process removes files too
                    status = path.stat()
                    yield status.st_mtime_ns, status.st_size, path

    def _remove_unused(self) -> None:
        self._unseen, states = 0, sorted(self._states())
        excess, removed = sum(size for _, size, _ in states) - self.limit_bytes, 0
        for _, size, path in states if excess > 0 else ():
            if excess <= -SLACK * self.limit_bytes:
                break
            with suppress(OSError):  # of another user
                path.unlink(missing_ok=True)
                excess, removed = excess - size, removed + 1
        if removed:
            logger.info(f"Vision features of {removed:,} images, not used for longest, were removed: {self.holds()}.")


def feature_files(folder: Path) -> Iterable[Path]:
    """Return the files of features in a folder, in no order."""
    return (path for path in folder.glob("??/*.safetensors") if SHARD_NAME.fullmatch(path.name))


def open_features(path: Path, fingerprint: Fingerprint) -> Found:
    """Open the features of an image; errors as of `mpo.training.store.open_tensors`."""
    file = open_tensors(path, fingerprint)
    try:
        about, (tiles, *_) = file.metadata(), file.get_slice("features").get_shape()
        width, height = map(int, about["size"].split())
        if about.get("key", path.stem) != path.stem:  # files of earlier versions have none
            raise ValueError(f"it was written as {about['key']}{path.suffix}, of another image or other tile limits")
        return Found(bytes.fromhex(path.stem), bytes.fromhex(about["image"]), (width, height), tiles, path, file)
    except (SafetensorError, LookupError, ValueError) as error:
        raise damaged(path, fingerprint, f"{type(error).__name__}: {error}") from error
