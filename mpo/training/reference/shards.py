"""Shards of reference log-probs: files of many entries, sorted by key."""

import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from mpo.encoding.keys import KEY_BYTES
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import open_tensors, read_tensors, write_tensors

SMALL_SHARD = 250_000
"""Pruning merges shards with fewer entries than this (6 MB)."""

KEY_TYPE = f"S{KEY_BYTES}"
ENTRY_BYTES = KEY_BYTES + 4 + 4


@dataclass(frozen=True)
class Entries:
    """Cache entries, one per completion, sorted by key, without duplicates. 24 bytes each. All of shape (N,)."""

    keys: npt.NDArray[np.bytes_]  # 16 raw bytes each
    logps: npt.NDArray[np.float32]  # sums of the labelled tokens' log-probs
    tokens: npt.NDArray[np.int32]  # numbers of labelled tokens

    def __len__(self) -> int:
        return len(self.keys)

    @classmethod
    def merged(cls, parts: Sequence["Entries"]) -> "Entries":
        """Merge `parts`, sort them, and keep the first of the entries with the same key."""
        columns = ("keys", "logps", "tokens")
        whole = parts[0] if len(parts) == 1 else cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))
        keys = whole.keys
        order = np.argsort(keys, kind="stable")  # stable: fast on sorted runs, and keeps the first first
        keys = keys[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        if not first.all():
            keys, order = keys[first], order[first]
        return cls(keys, whole.logps[order], whole.tokens[order])

    def look_up(self, keys: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
        """Return which of `keys` are here, and their rows; both of shape (len(keys),)."""
        if not len(self):
            return np.zeros(len(keys), dtype=bool), np.zeros(len(keys), dtype=np.intp)
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return self.keys[rows] == keys, rows


def shards(folder: Path) -> list[Path]:
    """Return all shards of a folder, and files that look like some, sorted by name."""
    return sorted(folder.glob("*.safetensors"))


def size_of(path: Path) -> int:
    """Return the bytes of a file; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:  # merged by a concurrent pruning
        return 0


def write_shard(folder: Path, entries: Entries, fingerprint: Fingerprint, rank: int = 0) -> Path:
    """Write one shard atomically, and return its path."""
    columns = {"keys": entries.keys.view(np.uint8).reshape(-1, KEY_BYTES), "logps": entries.logps, "tokens": entries.tokens}
    path = folder / f"answers-r{rank}-{os.getpid()}-{secrets.token_hex(6)}.safetensors"
    write_tensors({name: torch.tensor(column) for name, column in columns.items()}, path, fingerprint)
    return path


def read_shard(path: Path, fingerprint: Fingerprint) -> Entries:
    """Read one shard and check all of it; errors as of `mpo.training.store.open_tensors`, such as when a pruning merged it."""
    columns = {name: tensor.numpy() for name, tensor in read_tensors(open_tensors(path, fingerprint), path, fingerprint).items()}
    return Entries(columns["keys"].reshape(-1).view(KEY_TYPE), columns["logps"], columns["tokens"])


def read_new_shards(folder: Path, fingerprint: Fingerprint, seen: set[str]) -> Iterable[Entries]:
    """Read the shards whose names are not in `seen`, and add them to it."""
    for _ in range(10):
        gone = False
        for path in shards(folder):
            if path.name in seen:
                continue
            try:
                entries = read_shard(path, fingerprint)
            except FileNotFoundError:  # merged by a concurrent pruning: look again
                gone = True
                continue
            seen.add(path.name)
            yield entries
        if not gone:
            return
    raise ValueError(f"Shards in {folder} disappear while they are read. Run again when no other process deletes them.")


def key_array(keys: Sequence[bytes]) -> npt.NDArray[np.bytes_]:
    """Return keys as one array, shape (N,)."""
    for key in keys:
        assert len(key) == KEY_BYTES, f"a key has {KEY_BYTES} bytes, this one {len(key)}"
    return np.frombuffer(b"".join(keys), dtype=KEY_TYPE)
