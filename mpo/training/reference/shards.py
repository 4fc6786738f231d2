"""Shards of reference log-probs: Parquet files, written atomically."""

import hashlib
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mpo.encoding.keys import KEY_BYTES
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import FORMAT, SHARD_NAME, DamagedShard, ForeignShard, write_file

SMALL_SHARD = 250_000
"""Pruning merges shards with fewer entries than this (6 MB)."""

KEY_TYPE = f"S{KEY_BYTES}"
ENTRY_BYTES = KEY_BYTES + 4 + 4
_FIELDS = {"key": pa.binary(KEY_BYTES), "logps": pa.float32(), "tokens": pa.int32()}
_SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _FIELDS.items()])


@dataclass(frozen=True)
class Entries:
    """Cache entries, one per completion, sorted by key, without duplicates. 24 bytes each. All of shape (N,)."""

    keys: npt.NDArray[np.bytes_]  # 16 raw bytes each
    logps: npt.NDArray[np.float32]  # sums of the labelled tokens' log-probs
    tokens: npt.NDArray[np.int32]  # numbers of labelled tokens

    def __len__(self) -> int:
        return len(self.keys)

    def checksum(self) -> str:
        """Return a hash of the content, 32 hex digits."""
        hasher = hashlib.blake2b(digest_size=16)
        for column in (self.keys, self.logps, self.tokens):
            hasher.update(np.ascontiguousarray(column).tobytes())
        return hasher.hexdigest()

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
    """Return all .parquet files of a folder, sorted by name."""
    return sorted(folder.glob("*.parquet"))


def size_of(path: Path) -> int:
    """Return the bytes of a file; 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:  # merged by a concurrent pruning
        return 0


def write_shard(folder: Path, entries: Entries, fingerprint: Fingerprint, rank: int = 0) -> Path:
    """Write one shard atomically, and return its path."""
    keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(entries), [None, pa.py_buffer(entries.keys.tobytes())])
    metadata = {"mpo.format": str(FORMAT), "mpo.fingerprint": fingerprint.digest, "mpo.checksum": entries.checksum()}
    columns = [keys, pa.array(entries.logps), pa.array(entries.tokens)]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    # Keys are random bytes: compression, dictionaries and statistics are useless.
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    path = folder / f"answers-r{rank}-{os.getpid()}-{secrets.token_hex(6)}.parquet"
    write_file(sink.getvalue(), path)
    return path


def read_shard(path: Path, fingerprint: Fingerprint) -> Entries:
    """Read one shard and check all of it.

    Raises:
        DamagedShard: when it is truncated, not Parquet, has other columns or another checksum.
        ForeignShard: when it belongs to another fingerprint.
        FileNotFoundError: when it no longer exists (merged by a pruning).
    """
    data = path.read_bytes()  # separate from parsing: an error here is the disk's, not the shard's
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise _damaged(path, f"it is truncated or not Parquet: {reason}") from error
    metadata = {name.decode(): value.decode(errors="replace") for name, value in (table.schema.metadata or {}).items()}
    if not table.schema.equals(_SCHEMA, check_metadata=False):
        columns = ", ".join(f"{column.name} {column.type}" for column in table.schema)
        expected = ", ".join(f"{name} {kind}" for name, kind in _FIELDS.items())
        raise _damaged(path, f"its columns are {columns}; a shard has {expected}")
    if metadata.get("mpo.format") != str(FORMAT):
        raise _damaged(path, f"its metadata has mpo.format {metadata.get('mpo.format')!r}, not '{FORMAT}'")
    if metadata.get("mpo.fingerprint") != fingerprint.digest:
        raise ForeignShard(
            f"{path} is a shard of another model or other settings (fingerprint {metadata.get('mpo.fingerprint')}, this folder has "
            f"{fingerprint.digest}). Move it back to its folder."
        )
    entries = Entries(_keys_of(table), table["logps"].to_numpy().copy(), table["tokens"].to_numpy().copy())
    if entries.checksum() != metadata.get("mpo.checksum"):
        raise _damaged(path, "its content does not match its checksum")
    return entries


def _damaged(path: Path, reason: str) -> DamagedShard:
    if SHARD_NAME.fullmatch(path.name):
        fix = f"`mpo cache prune {path.parent}` removes it; its entries are then computed again"
    else:
        fix = "mpo does not write files of this name: move it out of this folder"
    return DamagedShard(f"{path} is not a shard of reference log-probs: {reason}. {fix}.")


def _keys_of(table: pa.Table) -> npt.NDArray[np.bytes_]:
    column = table["key"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # for an empty table
        return np.empty(0, KEY_TYPE)
    start = column.offset * KEY_BYTES
    data = column.buffers()[1]
    return np.frombuffer(data, KEY_TYPE, count=len(column), offset=start).copy()


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
