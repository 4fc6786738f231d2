"""Where reference log-probs come from: a cache on disk, keyed by content, that runs, ranks and sweeps share.

A root folder holds one sub-folder per fingerprint (see `mpo.fingerprint`), so a sweep over templates or models can share a root:

    cache/
      InternVLForConditionalGeneration-3f9c0a7be812/
        meta.json                              the fingerprint by parts, and where it came from
        answers-r0-4711-9a0b3c5d7e1f.parquet   a shard: key (16 bytes), logps (float32), tokens (int32), sorted by key
        answers-r0-4711-77aa01c2d3e4.parquet.tmp   a leftover of a killed writer; never read

Each shard is written aside, synced and renamed whole, under a name that no other writer has. Its metadata carries the fingerprint
and a checksum. An answer may be in two shards (two ranks met it at once); it is loaded once.
"""

import hashlib
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch

from mpo.fingerprint import KEY_BYTES, Fingerprint

FORMAT = 1
META_FILE = "meta.json"
SHARD_NAME = re.compile(r"answers-r\d+-\d+-[0-9a-f]{12}\.parquet")
LEFTOVER_NAME = re.compile(r"(answers-r\d+-\d+-[0-9a-f]{12}\.parquet|meta\.json\.[0-9a-f]{12})\.tmp")
LEFTOVER_AGE_SECONDS = 60.0
"""A younger `.tmp` may be somebody's shard on its way; writing one takes well under a second."""
SMALL_SHARD = 250_000
"""Pruning merges shards with fewer answers than this (6 MB)."""

_KEY_TYPE = f"S{KEY_BYTES}"
_ANSWER_BYTES = KEY_BYTES + 4 + 4
_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logps", pa.float32(), nullable=False),
        pa.field("tokens", pa.int32(), nullable=False),
    ]
)
logger = logging.getLogger(__name__)


class DamagedShard(ValueError):
    """A shard that cannot be read, or whose content is not what was written."""


class ForeignShard(ValueError):
    """A shard of another fingerprint."""


@dataclass(frozen=True)
class Answers:
    """Cached answers, sorted by key, each once. 24 bytes an answer.

    Args:
        keys: shape (N,), 16 raw bytes each.
        logps: shape (N,), float32, the sum of the scored tokens' log-probs.
        tokens: shape (N,), int32, the number of scored tokens.
    """

    keys: npt.NDArray[np.bytes_]
    logps: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.keys)

    def checksum(self) -> str:
        """Hash of the content, 32 hex digits."""
        hasher = hashlib.blake2b(digest_size=16)
        for column in (self.keys, self.logps, self.tokens):
            hasher.update(np.ascontiguousarray(column).tobytes())
        return hasher.hexdigest()

    @classmethod
    def merged(cls, parts: Sequence["Answers"]) -> "Answers":
        """All answers of `parts`, of those with the same key the first. Of one part: sorted, each once."""
        whole = parts[0] if len(parts) == 1 else cls._joined(parts)
        keys = whole.keys
        order = np.argsort(keys, kind="stable")  # stable: fast on sorted runs, and the first one stays first
        keys = keys[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        if not first.all():
            keys, order = keys[first], order[first]
        return cls(keys, whole.logps[order], whole.tokens[order])

    @classmethod
    def _joined(cls, parts: Sequence["Answers"]) -> "Answers":
        return cls(
            np.concatenate([part.keys for part in parts]),
            np.concatenate([part.logps for part in parts]),
            np.concatenate([part.tokens for part in parts]),
        )

    def look_up(self, keys: npt.NDArray[np.bytes_]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
        """Which of `keys` are here, and at which row those are; both of shape (len(keys),)."""
        if not len(self):
            return np.zeros(len(keys), dtype=bool), np.zeros(len(keys), dtype=np.intp)
        rows = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return self.keys[rows] == keys, rows


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
        fingerprint: of the reference model and the processing (see `mpo.fingerprint.fingerprint`).
        rank: this process's rank; for the names of its shards.
        flush_every: answers after which `add` writes a shard.
        flush_seconds: time after which `add` writes a shard.

    Raises:
        ValueError: when `folder` is a sub-folder of another fingerprint (it names what differs), or a shard is damaged or foreign.

    Example:
        >>> import tempfile
        >>> from mpo.fingerprint import answer_key
        >>> key = answer_key([], [1, 2], [3, 4], [True, True])
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
        _write_meta(self.folder, fingerprint)
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
        """Look up answers by their keys (`mpo.fingerprint.answer_key`)."""
        asked = _key_array(keys)
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
        added = Answers.merged([Answers(_key_array(list(self._pending)), logps, tokens)])
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
        size = sum(_size(path) for path in shards(self.folder) if path.name not in self._seen)
        room = size // _ANSWER_BYTES
        columns = Answers(np.empty(room, _KEY_TYPE), np.empty(room, np.float32), np.empty(room, np.int32))
        count = 0
        for answers in _read_new_shards(self.folder, self.fingerprint, self._seen):
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


# Folders


def cache_folders(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders with answers: `folder` itself, or its sub-folders.

    Raises:
        ValueError: when there is none.
    """
    path = Path(folder)
    found = [path] if (path / META_FILE).is_file() else sorted(meta.parent for meta in path.glob(f"*/{META_FILE}"))
    if not found:
        kind = "is not a folder" if not path.is_dir() else f"has no {META_FILE}, and no sub-folder with one"
        raise ValueError(f"{path} {kind}, so it is no cache of reference log-probs. Give the folder that the run was given.")
    return found


def read_fingerprint(folder: Path) -> Fingerprint:
    """The fingerprint in a folder's meta.json.

    Raises:
        ValueError: when it is damaged or of another version.
    """
    path = folder / META_FILE
    try:
        meta = json.loads(path.read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"{path} has format {meta['format']}, this version of mpo reads {FORMAT}. Use another folder.")
        return Fingerprint(meta["parts"], meta["settings"], meta["about"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it: the next run with this set-up "
            "writes it anew, and its shards are kept."
        ) from error


def shards(folder: Path) -> list[Path]:
    """Everything in a folder that is called Parquet, sorted by name."""
    return sorted(folder.glob("*.parquet"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # merged away in this moment
        return 0


def leftovers(folder: Path, *, min_age_seconds: float = 0.0) -> list[Path]:
    """Files that a killed writer left half-written."""
    now = time.time()
    found = []
    for path in sorted(folder.glob("*.tmp")):
        try:
            if LEFTOVER_NAME.fullmatch(path.name) and now - path.stat().st_mtime >= min_age_seconds:
                found.append(path)
        except FileNotFoundError:  # renamed whole in this moment
            continue
    return found


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


def _write_meta(folder: Path, fingerprint: Fingerprint) -> None:
    path = folder / META_FILE
    if path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"format": FORMAT, "created": created, **asdict(fingerprint)}, indent=2)
    # Ranks that start together all write it; whichever comes last replaces the same content.
    _write_whole(text.encode(), lambda: folder / f"{META_FILE}.{secrets.token_hex(6)}.tmp", path)


# Shards


def write_shard(folder: Path, answers: Answers, fingerprint: Fingerprint, rank: int = 0) -> Path:
    """Write one shard, whole or not at all; returns its path."""
    keys = pa.FixedSizeBinaryArray.from_buffers(pa.binary(KEY_BYTES), len(answers), [None, pa.py_buffer(answers.keys.tobytes())])
    metadata = {"mpo.format": str(FORMAT), "mpo.fingerprint": fingerprint.digest, "mpo.checksum": answers.checksum()}
    columns = [keys, pa.array(answers.logps), pa.array(answers.tokens)]
    table = pa.Table.from_arrays(columns, schema=_SCHEMA.with_metadata(metadata))
    sink = pa.BufferOutputStream()
    # Keys are random bytes: nothing to compress, and no use in dictionaries or statistics.
    pq.write_table(table, sink, compression="none", use_dictionary=False, write_statistics=False)
    path = folder / f"answers-r{rank}-{os.getpid()}-{secrets.token_hex(6)}.parquet"
    _write_whole(sink.getvalue(), lambda: path.with_suffix(".parquet.tmp"), path)
    return path


def read_shard(path: Path, fingerprint: Fingerprint) -> Answers:
    """Read one shard and check all of it.

    Raises:
        DamagedShard: when it is cut, not Parquet, has other columns or another checksum.
        ForeignShard: when it belongs to another fingerprint.
        FileNotFoundError: when it is gone (merged by a pruning).
    """
    data = path.read_bytes()  # apart from parsing: what fails there is the disk, not the shard
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise _damaged(path, f"it is cut or not Parquet: {reason}") from error
    metadata = {name.decode(): value.decode(errors="replace") for name, value in (table.schema.metadata or {}).items()}
    if not table.schema.equals(_SCHEMA, check_metadata=False):
        columns = ", ".join(f"{column.name} {column.type}" for column in table.schema)
        raise _damaged(
            path, f"its columns are {columns}; a shard has key fixed_size_binary[{KEY_BYTES}], logps float, tokens int32"
        )
    if metadata.get("mpo.format") != str(FORMAT):
        raise _damaged(path, f"its metadata has mpo.format {metadata.get('mpo.format')!r}, not '{FORMAT}'")
    if metadata.get("mpo.fingerprint") != fingerprint.digest:
        raise ForeignShard(
            f"{path} is a shard of another model or set-up (fingerprint {metadata.get('mpo.fingerprint')}, this folder has "
            f"{fingerprint.digest}). Move it back to the folder it came from."
        )
    answers = Answers(_keys_of(table), table["logps"].to_numpy().copy(), table["tokens"].to_numpy().copy())
    if answers.checksum() != metadata.get("mpo.checksum"):
        raise _damaged(path, "its content does not have the checksum it was written with")
    return answers


def _damaged(path: Path, reason: str) -> DamagedShard:
    if SHARD_NAME.fullmatch(path.name):
        cure = f"`mpo cache prune {path.parent}` removes it; its answers are then computed again"
    else:
        cure = "Its name is not one that mpo writes: move it out of this folder"
    return DamagedShard(f"{path} is not a shard of reference log-probs: {reason}. {cure}.")


def _keys_of(table: pa.Table) -> npt.NDArray[np.bytes_]:
    column = table["key"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of an empty table
        return np.empty(0, _KEY_TYPE)
    start = column.offset * KEY_BYTES
    data = column.buffers()[1]
    return np.frombuffer(data, _KEY_TYPE, count=len(column), offset=start).copy()


def _read_new_shards(folder: Path, fingerprint: Fingerprint, seen: set[str]) -> Iterable[Answers]:
    for _ in range(10):
        gone = False
        for path in shards(folder):
            if path.name in seen:
                continue
            try:
                answers = read_shard(path, fingerprint)
            except FileNotFoundError:  # a pruning has just merged it into another, which a new look shows
                gone = True
                continue
            seen.add(path.name)
            yield answers
        if not gone:
            return
    raise ValueError(f"The shards in {folder} vanish while they are read. Let whatever deletes them end, then start again.")


def _key_array(keys: Sequence[bytes]) -> npt.NDArray[np.bytes_]:
    for key in keys:
        assert len(key) == KEY_BYTES, f"a key has {KEY_BYTES} bytes, this one {len(key)}"
    return np.frombuffer(b"".join(keys), dtype=_KEY_TYPE)


def _write_whole(data: "bytes | pa.Buffer", aside: Any, path: Path) -> None:
    """Write aside, sync, rename, sync the folder: after a crash the file is there whole or not at all."""
    for attempt in (1, 2, 3):
        temporary = aside()
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(temporary, path)
            break
        except FileNotFoundError:  # a pruning took it for a leftover, on a disk whose clock is ahead
            if attempt == 3:
                raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # folders cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
