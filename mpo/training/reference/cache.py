"""A cache of reference log-probs on disk, a `mpo.training.store.Store` that runs, ranks and sweeps can share.

An entry, 24 bytes, is the log-prob of one completion.
"""

import hashlib
import math
import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import Entries, Store


class Found(NamedTuple):
    """Result of `ReferenceCache.get`, all of shape (N,), in the order of the keys."""

    known: npt.NDArray[np.bool_]  # whether the cache has the entry
    logps: npt.NDArray[np.float32]  # log-prob sums; NaN where unknown
    tokens: npt.NDArray[np.int32]  # numbers of labelled tokens; 0 where unknown


class ReferenceCache(Store):
    """Cache reference log-probs on disk, for one fingerprint. A killed process loses at most what it had not flushed.

    Args:
        folder: see `Store`, and the errors.
        fingerprint: fingerprint of the reference model and the processing (see `mpo.training.reference.fingerprint.fingerprint`).
        flush_every: number of entries after which `add` writes a shard.
        flush_seconds: seconds after which it does.

    Example:
        >>> import tempfile
        >>> from mpo.encoding.keys import completion_key
        >>> from mpo.training.reference.fingerprint import Fingerprint
        >>> key = completion_key([], [1, 2], [3, 4], [True, True])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = ReferenceCache(folder, Fingerprint({"model weights": "0"}))
        ...     cache.get([key]).known.tolist()
        ...     cache.add([key], [-1.5], [2])
        ...     cache.get([key]).logps.tolist()
        [False]
        [-1.5]
    """

    def __init__(
        self, folder: str | os.PathLike[str], fingerprint: Fingerprint, *, flush_every: int = 16_384, flush_seconds: float = 60.0
    ) -> None:
        super().__init__(folder, fingerprint)
        self.flush_every, self.flush_seconds = flush_every, flush_seconds
        self._pending: dict[bytes, tuple[float, int]] = {}
        self._flushed_at = time.monotonic()

    def __len__(self) -> int:
        return super().__len__() + len(self._pending)

    def digest(self) -> str:
        """Return a hash of the keys of all entries that are written."""
        keys = Entries.merged(self._blocks).keys if self._blocks else np.array([], "S1")
        return hashlib.sha256(keys.tobytes()).hexdigest()

    def get(self, keys: Sequence[bytes]) -> Found:
        """Look up entries by their keys (`mpo.encoding.keys.completion_key`)."""
        known, values = self.look_up(keys)
        for place in np.flatnonzero(~known).tolist() if self._pending else ():
            if (value := self._pending.get(bytes(keys[place]))) is not None:
                known[place], values[place] = True, value
        return Found(known, np.where(known, values["logps"], np.float32(np.nan)), values["tokens"])

    def add(self, keys: Sequence[bytes], logps: Any, tokens: Any) -> None:
        """Add entries of N keys: log-prob sums and numbers of labelled tokens, sequences or tensors of shape (N,).

        Existing ones are not changed. Raises ValueError for a log-prob that is not finite.
        """
        values = torch.as_tensor(logps).detach().float().tolist()
        counts = torch.as_tensor(tokens).detach().tolist()
        for key, value, count, old in zip(keys, values, counts, self.get(keys).known, strict=True):
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
        if self._pending:
            logps, tokens = zip(*self._pending.values(), strict=True)
            self.write(list(self._pending), logps=logps, tokens=tokens)
            self._pending.clear()
