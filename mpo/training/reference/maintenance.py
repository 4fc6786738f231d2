"""Check and prune a folder of cached reference log-probs, or of vision features."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpo.io import StoreError
from mpo.training.features.cache import feature_files, open_features
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.reference.shards import SMALL_SHARD, Entries, read_shard, shards, size_of, write_shard
from mpo.training.store import (
    FEATURES,
    LEFTOVER_AGE_SECONDS,
    META_FILE,
    SHARD_NAME,
    DamagedShard,
    leftovers,
    read_tensors,
    what_of,
)

HIGHEST_LOGPS = 1e-3
"""A log-prob is at most 0, up to rounding."""
DISAGREEMENT = {"float32": 1e-3, "float64": 1e-3}
"""Tolerance between two computations of the same entry, in different batches, times the square root of its tokens, ..."""
DISAGREEMENT_16_BIT = 0.1
"""... and in 16 bits: logits of about 20 have a precision of about 0.1, and errors of tokens are independent."""


@dataclass
class Check:
    """Result of `check_folder`. `problems` are sentences; `wrong` holds the keys of entries that cannot be right."""

    entries: int = 0
    whole: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wrong: set[bytes] = field(default_factory=set)
    contents: list[Entries] = field(default_factory=list)


def check_folder(folder: Path, fingerprint: Fingerprint) -> Check:
    """Read and check every shard of a folder, and compare log-probs across shards."""
    check = Check()
    has_features = what_of(fingerprint) == FEATURES
    for path in sorted(feature_files(folder)) if has_features else shards(folder):
        try:
            if has_features:
                read_tensors(open_features(path, fingerprint).file, path, fingerprint)
            else:
                check.contents.append(read_shard(path, fingerprint))
            check.whole.append(path)
        except FileNotFoundError:  # merged by a concurrent pruning
            continue
        except StoreError as error:
            (check.damaged if isinstance(error, DamagedShard) else check.foreign).append(path)
            check.problems.append(str(error))
    if not check.contents:
        check.entries = len(check.whole)
        return check
    sizes = [len(entries) for entries in check.contents]
    keys = np.concatenate([entries.keys for entries in check.contents])
    logps = np.concatenate([entries.logps for entries in check.contents])
    tokens = np.concatenate([entries.tokens for entries in check.contents])
    names = np.repeat(np.arange(len(sizes)), sizes)

    def blame(row: Any, reason: str) -> None:
        key = keys[[row]].tobytes()
        check.wrong.add(key)
        check.problems.append(f"{check.whole[names[row]]}: entry {key.hex()} {reason}")

    for row in np.flatnonzero(~np.isfinite(logps) | (logps > HIGHEST_LOGPS) | (tokens < 1)):
        blame(row, f"has log-prob {logps[row]:g} over {tokens[row]} tokens; a sum of log-probs must be finite and at most 0")

    order = np.argsort(keys, kind="stable")
    before, after = order[:-1], order[1:]
    twice = keys[before] == keys[after]
    before, after = before[twice], after[twice]
    tolerance = DISAGREEMENT.get(fingerprint.parts.get("compute dtype", ""), DISAGREEMENT_16_BIT) * np.sqrt(
        np.maximum(tokens[after], 1)
    )
    differ = (np.abs(logps[before] - logps[after]) > tolerance) | (tokens[before] != tokens[after])
    for first, second in zip(before[differ], after[differ], strict=True):
        reason = f"has log-prob {logps[second]:g} over {tokens[second]} tokens, but {logps[first]:g} over {tokens[first]} in "
        blame(second, reason + check.whole[names[first]].name)
    check.entries = len(keys) - int(twice.sum())
    return check


def remove_old(folder: Path, *, dry_run: bool) -> list[str]:
    """Remove a folder of an earlier format, but not files of other names; return what was done or would be."""
    shards = [path for path in (*folder.glob("*"), *folder.glob("??/*")) if SHARD_NAME.fullmatch(path.name)]
    files = [*shards, *leftovers(folder, min_age_seconds=LEFTOVER_AGE_SECONDS), folder / META_FILE]  # this last, if it is killed
    size = sum(map(size_of, files))
    if not dry_run:
        for path in files:
            path.unlink(missing_ok=True)
        for path in (*folder.glob("??"), folder):
            with suppress(OSError):  # not empty, or no folder
                path.rmdir()
    return [f"remove the files of an earlier format ({len(files):,}, {size / 1e6:,.1f} MB)"]


def prune_folder(folder: Path, fingerprint: Fingerprint, *, dry_run: bool) -> list[str]:
    """Prune one folder, and return what was done or would be. Remove only files with names that mpo writes."""
    check = check_folder(folder, fingerprint)
    old = leftovers(folder, min_age_seconds=LEFTOVER_AGE_SECONDS)
    damaged = [path for path in check.damaged if SHARD_NAME.fullmatch(path.name)]
    done = [f"remove {path.name}: incomplete, of a killed run" for path in old]
    done += [f"remove {path.name}: damaged" for path in damaged]
    own = {path: found for path, found in zip(check.whole, check.contents, strict=False) if SHARD_NAME.fullmatch(path.name)}
    # A wrong entry may be in any shard, so all of them are rewritten.
    merging = {path: entries for path, entries in own.items() if check.wrong or len(entries) < SMALL_SHARD}
    if len(merging) > 1 or check.wrong:
        merged = Entries.merged(list(merging.values()))
        if check.wrong:
            keep = ~np.isin(merged.keys, np.frombuffer(b"".join(sorted(check.wrong)), merged.keys.dtype))
            dropped = len(merged) - int(keep.sum())
            merged = Entries(merged.keys[keep], merged.logps[keep], merged.tokens[keep])
            done.append(f"drop {dropped} entries that cannot be right (mpo cache verify lists them)")
        done.append(f"merge {len(merging)} shards into one of {len(merged):,} entries")
        if not dry_run:
            # The new shard is complete before an old one is removed. If killed in between, entries exist twice, which is harmless.
            if len(merged):
                write_shard(folder, merged, fingerprint)
            damaged += merging
    if not dry_run:
        for path in (*old, *damaged):
            path.unlink(missing_ok=True)
    unknown = [path for path in (*check.whole, *check.damaged) if not SHARD_NAME.fullmatch(path.name)]
    done += [f"keep {path.name}: mpo does not write files of this name" for path in unknown]
    other = "a shard of another model or other settings; move it back to its folder"
    return done + [f"keep {path.name}: {other}" for path in check.foreign]
