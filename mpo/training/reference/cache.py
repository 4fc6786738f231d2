"""A cache of reference log-probs on disk, keyed by content, that runs, ranks and sweeps can share.

A root folder holds one sub-folder per fingerprint (see `mpo.training.reference.fingerprint`); a sweep over templates can share
a root:

    cache/
      InternVLForConditionalGeneration-3f9c0a7be812/
        meta.json                              the fingerprint by parts, and its origin
        answers-r0-4711-9a0b3c5d7e1f.safetensors   a shard: keys (16 bytes each), logps (float32), tokens (int32), sorted by key
        answers-r0-4711-77aa01c2d3e4.safetensors.0a1b2c3d4e5f.tmp   a leftover of a killed writer; never read

Each shard is a file of `mpo.training.store`, synced, under a unique name. An entry, the log-prob of one completion, may be in two
shards (two ranks computed it); it is loaded once.
"""

import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.reference.shards import (
    ENTRY_BYTES,
    KEY_TYPE,
    Entries,
    key_array,
    read_new_shards,
    shards,
    size_of,
    write_shard,
)
from mpo.training.store import open_folder, write_meta

logger = logging.getLogger(__name__)


class Found(NamedTuple):
    """Result of `ReferenceCache.get`, all of shape (N,), in the order of the keys."""

    known: npt.NDArray[np.bool_]  # whether the cache has the entry
    logps: npt.NDArray[np.float32]  # log-prob sums; NaN where unknown
    tokens: npt.NDArray[np.int32]  # numbers of labelled tokens; 0 where unknown


class ReferenceCache:
    """Cache reference log-probs on disk, for one fingerprint.

    Any number of ranks and runs may open the same folder. `refresh` reads what others have written. A killed process loses at
    most what it had not flushed.

    Args:
        folder: a root for many fingerprints (created if missing), in which this cache opens or creates its sub-folder; or such a
            sub-folder, which then must have the same fingerprint.
        fingerprint: fingerprint of the reference model and the processing (see `mpo.training.reference.fingerprint.fingerprint`).
        rank: this process's rank, for the names of its shards.
        flush_every: number of entries after which `add` writes a shard.
        flush_seconds: seconds after which `add` writes a shard.

    Raises:
        ValueError: when `folder` is a sub-folder of another fingerprint (with the differences), or a shard is damaged or foreign.

    Example:
        >>> import tempfile
        >>> from mpo.encoding.keys import completion_key
        >>> from mpo.training.reference.fingerprint import Fingerprint
        >>> key = completion_key([], [1, 2], [3, 4], [True, True])
        >>> with tempfile.TemporaryDirectory() as folder, ReferenceCache(folder, Fingerprint({"model weights": "0"})) as cache:
        ...     cache.get([key]).known.tolist()
        ...     cache.add([key], [-1.5], [2])
        ...     cache.get([key]).logps.tolist()
        [False]
        [-1.5]

    Attributes:
        folder: folder of the shards.
        why_new: when the root has other fingerprints only, the nearest of them and its differences, for a log line; else None.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        fingerprint: Fingerprint,
        *,
        rank: int = 0,
        flush_every: int = 16_384,
        flush_seconds: float = 60.0,
    ) -> None:
        self.fingerprint = fingerprint
        self.rank = rank
        self.flush_every = flush_every
        self.flush_seconds = flush_seconds
        self.folder, self.why_new = open_folder(Path(folder), fingerprint)
        if self.why_new:
            logger.info(self.why_new)
        write_meta(self.folder, fingerprint)
        # Sorted blocks, each at least twice as long as the next: few to search, and cheap to add to.
        self._blocks: list[Entries] = []
        self._pending: dict[bytes, tuple[float, int]] = {}
        self._seen: set[str] = set()
        self._flushed_at = time.monotonic()
        self.refresh()

    def __len__(self) -> int:
        """Return the number of entries. One that another rank wrote too may count twice until blocks are merged."""
        return sum(map(len, self._blocks)) + len(self._pending)

    def __enter__(self) -> "ReferenceCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def get(self, keys: Sequence[bytes]) -> Found:
        """Look up entries by their keys (`mpo.encoding.keys.completion_key`)."""
        asked = key_array(keys)
        found = Found(np.zeros(len(keys), bool), np.full(len(keys), np.nan, np.float32), np.zeros(len(keys), np.int32))
        for block in self._blocks:
            here, rows = block.look_up(asked)
            found.logps[here], found.tokens[here] = block.logps[rows[here]], block.tokens[rows[here]]
            found.known[here] = True
        for place in np.flatnonzero(~found.known).tolist() if self._pending else ():
            if (value := self._pending.get(bytes(keys[place]))) is not None:
                found.logps[place], found.tokens[place] = value
                found.known[place] = True
        return found

    def add(self, keys: Sequence[bytes], logps: Any, tokens: Any) -> None:
        """Add entries. Existing ones are not changed.

        Args:
            keys: N keys.
            logps: log-prob sums, a sequence or tensor of shape (N,).
            tokens: numbers of labelled tokens, a sequence or tensor of shape (N,).

        Raises:
            ValueError: for a log-prob that is not finite.
        """
        values = torch.as_tensor(logps).detach().float().tolist()
        counts = torch.as_tensor(tokens).detach().tolist()
        known = self.get(keys).known
        for key, value, count, old in zip(keys, values, counts, known, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"The reference's log-prob of a completion of {count} tokens is {value} (key {bytes(key).hex()}), so it is not "
                    "cached. Log-probs of a reference must be finite: check its weights and its dtype (float16 overflows where "
                    "bfloat16 does not)."
                )
            if not old:
                self._pending.setdefault(bytes(key), (value, int(count)))
        if len(self._pending) >= self.flush_every or time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what was added since the last flush, as one shard."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        values = list(self._pending.values())
        logps = np.asarray([value for value, _ in values], np.float32)
        tokens = np.asarray([count for _, count in values], np.int32)
        added = Entries.merged([Entries(key_array(list(self._pending)), logps, tokens)])
        self._seen.add(write_shard(self.folder, added, self.fingerprint, self.rank).name)
        self._pending.clear()
        self._remember(added)

    def close(self) -> None:
        """Write what is left. The cache remains usable."""
        self.flush()

    def refresh(self) -> None:
        """Read the shards that other ranks and runs have written since."""
        # One array is allocated for all shards, since concatenating them would need twice the memory. An entry takes at least 24
        # bytes on disk, so the files' sizes bound their number; unused pages cost nothing.
        size = sum(size_of(path) for path in shards(self.folder) if path.name not in self._seen)
        room = size // ENTRY_BYTES
        columns = Entries(np.empty(room, KEY_TYPE), np.empty(room, np.float32), np.empty(room, np.int32))
        count = 0
        for entries in read_new_shards(self.folder, self.fingerprint, self._seen):
            if count + len(entries) > room:  # another process writes meanwhile
                self._remember(entries)
                continue
            here = slice(count, count + len(entries))
            columns.keys[here], columns.logps[here], columns.tokens[here] = entries.keys, entries.logps, entries.tokens
            count = here.stop
        if count:
            self._remember(Entries(columns.keys[:count], columns.logps[:count], columns.tokens[:count]))

    def _remember(self, entries: Entries) -> None:
        self._blocks.append(Entries.merged([entries]))
        while len(self._blocks) > 1 and len(self._blocks[-2]) < 2 * len(self._blocks[-1]):
            self._blocks[-2:] = [Entries.merged(self._blocks[-2:])]
