"""A cache of vision features on disk, a `mpo.training.store.Store` that ranks, data loader workers and runs share.

A shard has the images of a batch that were not known: a killed run loses no more, and others find them at once. Its modification
time is that of its last use. When the shards of all fingerprints take more than the limit, those that were not used for longest are
removed, but none that has been used since this run began: of images that do not all fit, it keeps the first, and no others.
"""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpo.encoding.keys import KEY_BYTES
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import (
    FEATURES,
    META_FILE,
    SHARD_NAME,
    Store,
    open_shard,
    read_fingerprint,
    read_tensor,
    shards,
    statuses,
    what_of,
)

logger = logging.getLogger(__name__)

LIMIT_GB = 200.0
SLACK = 0.01
"""Fraction of the limit that a process may write before it looks at the folder's size again, and that is removed beyond it."""
DAY_NS = 86_400 * 10**9
"""A time of last use so far in the future is of a wrong clock, and says nothing."""
SHARD_BYTES = 64e6
"""Size of the features at which a shard is written before its batch is complete."""


class Found(NamedTuple):
    """An image whose features the cache has."""

    key: bytes
    image: bytes  # key of its pixels (`mpo.encoding.keys.image_key`)
    size: tuple[int, int]  # width and height
    tiles: int
    path: Path
    file: Any  # opened, so that it can be read after its removal
    value: Any  # its columns in the store


class FeatureCache(Store):
    """Cache the features of images on disk, for one fingerprint (`mpo.training.features.use.vision_fingerprint`).

    Args:
        folder: see `Store`, and `fingerprint`, and the errors, which `find` and `read` raise too.
        limit_bytes: maximum size of all features in the root folder. inf: no limit, and nothing is removed.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Fingerprint, *, limit_bytes: float = LIMIT_GB * 1e9) -> None:
        super().__init__(folder, fingerprint, durable=False)
        self.limit_bytes = limit_bytes
        self._began = time.time_ns() - 10**9  # the clock of files is coarser
        self._look_again = 0.0
        self._pending: dict[bytes, tuple[bytes, tuple[int, int], Tensor]] = {}
        self._unseen = float("inf")  # bytes written since the folder's size was looked at
        self._is_full = False

    @staticmethod
    def key(image: bytes, limits: Mapping[str, Any]) -> bytes:
        """Return the key of an image's tiles, of the key of its file or pixels and its tile limits (`mpo.encoding.tiles`)."""
        return hashlib.blake2b(image + repr(sorted(limits.items())).encode(), digest_size=KEY_BYTES).digest()

    def find(self, key: bytes) -> Found | None:
        """Look an image up, again among the shards that others have written since."""
        if (found := self._find(key)) is None and time.monotonic() >= self._look_again:
            start = time.thread_time()
            self.refresh()
            # Of many thousands of shards the names alone take a while: at most a twentieth of the time.
            spent = time.thread_time() - start
            self._look_again = time.monotonic() + 20 * spent if spent > 5e-3 else 0.0
            found = self._find(key)
        return found

    def _find(self, key: bytes) -> Found | None:
        (known,), (value,) = self.look_up([key])
        if known:
            path, (width, height) = self.folder / self._names[value["shard"]], value["size"].tolist()
            with suppress(FileNotFoundError):  # removed since
                file = open_shard(path, self.fingerprint)
                return Found(key, value["image"].tobytes(), (width, height), int(value["rows"]), path, file, value)
        return None

    def read(self, images: Sequence[Found]) -> Tensor:
        """Read the features of images, shape (tiles of all, tokens, channels)."""
        for path in {one.path for one in images}:
            with suppress(OSError):  # removed meanwhile, or of another user
                os.utime(path)
        return torch.cat([read_tensor(one.file, one.path, self.fingerprint, one.value) for one in images])

    def add(self, key: bytes, image: bytes, size: tuple[int, int], features: Tensor) -> None:
        """Add the features of an image, shape (tiles, tokens, channels), which `flush` writes; not those that are not finite."""
        if not self._is_full and bool(features.isfinite().all()):
            self._pending[key] = (image, size, features.detach().cpu().contiguous())
            if sum(tensor.nbytes for _, _, tensor in self._pending.values()) > SHARD_BYTES:
                self.flush()

    def flush(self) -> None:
        """Write what was added since the last time as one shard, where it fits."""
        added, self._pending = self._pending, {}
        if not added or self._is_full:
            return
        images, sizes, tensors = zip(*added.values(), strict=True)
        if not self._has_room(sum(tensor.nbytes for tensor in tensors)):
            self._is_full = True
            logger.warning(
                f"{self.holds()}. All of it is in use, so further images are encoded each time; a higher vision_feature_cache_gb "
                "keeps them."
            )
            return
        try:
            self.write(list(added), tensors, image=np.frombuffer(b"".join(images), np.uint8).reshape(-1, KEY_BYTES), size=sizes)
        except OSError as error:
            self._is_full = True
            logger.warning(f"Vision features cannot be written to {self.folder} ({error.strerror}), so new images are not cached.")

    def holds(self) -> str:
        """Describe what the cache holds."""
        self.refresh()
        states = list(self._states())
        own = {path.name: size for _, size, path in states if path.parent == self.folder}
        return (
            f"{self.folder} holds vision features of {self.count(own):,} images, {sum(own.values()) / 1e9:.2f} GB; with other "
            f"settings {sum(size for _, size, _ in states) / 1e9:.2f} of at most {self.limit_bytes / 1e9:g} GB"
        )

    def _states(self) -> Iterator[tuple[int, int, Path]]:
        """Time of the last use, size and path of the shards of features in the root folder, and of nothing else there."""
        latest = time.time_ns() + DAY_NS
        for meta in self.folder.parent.glob(f"*/{META_FILE}"):
            with suppress(ValueError, OSError):  # damaged, of an earlier format, or of another user
                if what_of(read_fingerprint(meta.parent)) == FEATURES:
                    for path, status in statuses(path for path in shards(meta.parent) if SHARD_NAME.fullmatch(path.name)):
                        used = status.st_mtime_ns
                        yield (used if used < latest else 0), status.st_size, path

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more can be written. Removes what has not been used since this cache was opened."""
        self._unseen += size
        if self._unseen <= SLACK * self.limit_bytes:
            return True
        states, removed = sorted(self._states()), 0
        total, self._unseen = size + sum(size for _, size, _ in states), size
        least = self.limit_bytes * (1 - SLACK) if total > self.limit_bytes else self.limit_bytes
        for used, freed, path in states:
            if total <= least or used >= self._began:
                break
            with suppress(OSError):  # of another user
                path.unlink(missing_ok=True)
                total, removed = total - freed, removed + 1
        if removed:
            logger.info(f"{removed:,} shards of vision features, not used for longest, were removed: {self.holds()}.")
        return total <= self.limit_bytes
