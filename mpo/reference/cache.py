"""Where reference log-probs come from: a cache on disk, keyed by content, that runs, ranks and sweeps share.

A root folder holds one sub-folder per fingerprint (see `mpo.reference.fingerprint`); a sweep over templates can share a root:

    cache/
      InternVLForConditionalGeneration-3f9c0a7be812/
        meta.json                              the fingerprint by parts, and where it came from
        answers-r0-4711-9a0b3c5d7e1f.parquet   a shard: key (16 bytes), logps (float32), tokens (int32), sorted by key
        answers-r0-4711-77aa01c2d3e4.parquet.tmp   a leftover of a killed writer; never read

Each shard is written aside, synced and renamed whole, under a name that no other writer has. Its metadata carries the fingerprint
and a checksum. An answer may be in two shards (two ranks met it at once); it is loaded once.
"""

import logging
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpo.reference.fingerprint import Fingerprint
from mpo.reference.shards import (
    ANSWER_BYTES,
    KEY_TYPE,
    META_FILE,
    Answers,
    key_array,
    read_fingerprint,
    read_new_shards,
    shards,
    size_of,
    write_meta,
    write_shard,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """Answer of `ReferenceCache.get`, all of shape (N,), in the order of the keys asked for.

    Args:
        known: whether the cache has the answer.
        logps: float32 log-prob sums; NaN where unknown.
        tokens: int32 numbers of scored tokens; 0 where unknown.
    """

    known: npt.NDArray[np.bool_]
    logps: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]


class ReferenceCache:
    """Reference log-probs on disk, for one fingerprint.

    Any number of ranks and runs may have the same folder open. What others write shows after `refresh`. A process killed at any
    moment loses at most what it had not flushed.

    Args:
        folder: a root for many fingerprints (made when missing), of which this cache opens or makes its own sub-folder; or such a
            sub-folder itself, which then has to have the same fingerprint.
        fingerprint: of the reference model and the processing (see `mpo.reference.fingerprint.fingerprint`).
        rank: this process's rank; for the names of its shards.
        flush_every: answers after which `add` writes a shard.
        flush_seconds: time after which `add` writes a shard.

    Raises:
        ValueError: when `folder` is a sub-folder of another fingerprint (it names what differs), or a shard is damaged or foreign.

    Example:
        >>> import tempfile
        >>> from mpo.packing.keys import completion_key
        >>> from mpo.reference.fingerprint import Fingerprint
        >>> key = completion_key([], [1, 2], [3, 4], [True, True])
        >>> with tempfile.TemporaryDirectory() as folder, ReferenceCache(folder, Fingerprint({"model weights": "0"})) as cache:
        ...     cache.get([key]).known.tolist()
        ...     cache.add([key], [-1.5], [2])
        ...     cache.get([key]).logps.tolist()
        [False]
        [-1.5]

    Attributes:
        folder: where the shards are.
        why_new: when the root had other fingerprints only, which of them is nearest and what differs, for a log line; else None.
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
        self.folder, self.why_new = _place(Path(folder), fingerprint)
        if self.why_new:
            logger.info(self.why_new)
        write_meta(self.folder, fingerprint)
        # Sorted blocks, each at least twice as long as the next: few to look into, and cheap to add to.
        self._blocks: list[Answers] = []
        self._pending: dict[bytes, tuple[float, int]] = {}
        self._seen: set[str] = set()
        self._flushed_at = time.monotonic()
        self.refresh()

    def __len__(self) -> int:
        """Answers known, an answer that another rank wrote too perhaps twice until the blocks are merged."""
        return sum(map(len, self._blocks)) + len(self._pending)

    def __enter__(self) -> "ReferenceCache":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def get(self, keys: Sequence[bytes]) -> Found:
        """Look up answers by their keys (`mpo.packing.keys.completion_key`)."""
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
        """Remember answers; those already known stay as they are.

        Args:
            keys: N keys.
            logps: N log-prob sums, a sequence or tensor of shape (N,).
            tokens: N numbers of scored tokens, likewise.

        Raises:
            ValueError: for a log-prob that is not finite.
        """
        values = torch.as_tensor(logps).detach().float().tolist()
        counts = torch.as_tensor(tokens).detach().tolist()
        known = self.get(keys).known
        for key, value, count, old in zip(keys, values, counts, known, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"The reference's log-prob of an answer of {count} tokens is {value} (key {bytes(key).hex()}), so it is not "
                    "cached. A reference that gives such values cannot be trained against: check its weights, and its dtype "
                    "(float16 overflows where bfloat16 does not)."
                )
            if not old:
                self._pending.setdefault(bytes(key), (value, int(count)))
        if len(self._pending) >= self.flush_every or time.monotonic() - self._flushed_at >= self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write what has been added since the last time, as one shard."""
        self._flushed_at = time.monotonic()
        if not self._pending:
            return
        values = list(self._pending.values())
        logps = np.asarray([value for value, _ in values], np.float32)
        tokens = np.asarray([count for _, count in values], np.int32)
        added = Answers.merged([Answers(key_array(list(self._pending)), logps, tokens)])
        self._seen.add(write_shard(self.folder, added, self.fingerprint, self.rank).name)
        self._pending.clear()
        self._remember(added)

    def close(self) -> None:
        """Write what is left. The cache can be used on; a later `close` writes the rest."""
        self.flush()

    def refresh(self) -> None:
        """Read the shards that other ranks and runs have written since."""
        # One array that holds all of them from the start: collecting and then joining shards would take the memory twice.
        # An answer takes at least its 24 bytes on disk, so the files' sizes say how many may come; what is too much costs nothing.
        size = sum(size_of(path) for path in shards(self.folder) if path.name not in self._seen)
        room = size // ANSWER_BYTES
        columns = Answers(np.empty(room, KEY_TYPE), np.empty(room, np.float32), np.empty(room, np.int32))
        count = 0
        for answers in read_new_shards(self.folder, self.fingerprint, self._seen):
            if count + len(answers) > room:  # somebody writes while we read
                self._remember(answers)
                continue
            here = slice(count, count + len(answers))
            columns.keys[here], columns.logps[here], columns.tokens[here] = answers.keys, answers.logps, answers.tokens
            count = here.stop
        if count:
            self._remember(Answers(columns.keys[:count], columns.logps[:count], columns.tokens[:count]))

    def _remember(self, answers: Answers) -> None:
        self._blocks.append(Answers.merged([answers]))
        while len(self._blocks) > 1 and len(self._blocks[-2]) < 2 * len(self._blocks[-1]):
            self._blocks[-2:] = [Answers.merged(self._blocks[-2:])]


def _place(root: Path, fingerprint: Fingerprint) -> tuple[Path, str | None]:
    if root.exists() and not root.is_dir():
        raise ValueError(f"The cache of reference log-probs needs a folder, but {root} is a file. Give another path.")
    if (root / META_FILE).is_file():
        return _same_set_up(root, fingerprint), None
    kind = re.sub(r"[^A-Za-z0-9_.]", "_", str(fingerprint.about.get("model", "reference")))
    folder = root / f"{kind}-{fingerprint.digest[:12]}"
    if (folder / META_FILE).is_file():
        return _same_set_up(folder, fingerprint), None
    others = {}
    for meta in root.glob(f"*/{META_FILE}"):
        try:
            others[meta.parent.name] = fingerprint.differences(read_fingerprint(meta.parent))
        except ValueError:  # damaged, but not ours to use
            continue
    if not others:
        return folder, None
    name, differences = min(others.items(), key=lambda item: len(item[1]))
    return folder, (
        f"No reference log-probs are cached in {root} for this set-up; they are computed. The nearest there, {name}, differs in "
        f"(there -> here): {'; '.join(differences)}."
    )


def _same_set_up(folder: Path, fingerprint: Fingerprint) -> Path:
    differences = fingerprint.differences(read_fingerprint(folder))
    if differences:
        raise ValueError(
            f"{folder} holds reference log-probs of another set-up. What differs (there -> here): {'; '.join(differences)}. "
            "Give the folder above it, in which every set-up has its own sub-folder, or an empty one. "
            f"`mpo cache inspect {folder}` shows what it was made with."
        )
    return folder
