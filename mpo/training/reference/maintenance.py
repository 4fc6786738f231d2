"""Check and prune a folder of cached reference log-probs, or of vision features."""

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpo.io import StoreError
from mpo.training import store
from mpo.training.reference.fingerprint import Fingerprint
from mpo.training.store import DamagedShard, Entries, ForeignShard

SMALL_SHARD = 250_000
"""Pruning merges shards of log-probs with fewer entries than this (6 MB)."""
HIGHEST_LOGPS = 1e-3
"""A log-prob is at most 0, up to rounding."""
DISAGREEMENT = {"float32": 1e-3, "float64": 1e-3}
"""Tolerance between two computations of the same entry, in different batches, times the square root of its tokens, ..."""
DISAGREEMENT_16_BIT = 0.1
"""... and in 16 bits: logits of about 20 have a precision of about 0.1, and errors of tokens are independent."""


@dataclass
class Check:
    """Result of `check_folder`. `problems` are sentences; `wrong` holds the keys of log-probs that cannot be right."""

    entries: int = 0
    whole: dict[Path, Entries] = field(default_factory=dict)
    damaged: list[Path] = field(default_factory=list)
    kept: dict[Path, StoreError] = field(default_factory=dict)  # of another fingerprint, or not readable
    problems: list[str] = field(default_factory=list)
    wrong: set[bytes] = field(default_factory=set)


def check_folder(folder: Path, fingerprint: Fingerprint) -> Check:
    """Read and check every shard of a folder, and compare log-probs across shards."""
    check, is_log_probs = Check(), store.what_of(fingerprint) == store.LOG_PROBS
    for path in store.shards(folder):
        with suppress(FileNotFoundError):  # merged by a concurrent pruning, or removed by a run
            try:
                entries, file = store.read_shard(path, fingerprint), store.open_shard(path, fingerprint)
                for value in () if is_log_probs else entries.values:
                    store.read_tensor(file, path, fingerprint, value)
                check.whole[path] = entries
            except StoreError as error:
                if isinstance(error, DamagedShard):
                    check.damaged.append(path)
                else:
                    check.kept[path] = error
                check.problems.append(str(error))
    if check.whole:
        check.entries = len(Entries.merged(list(check.whole.values())).keys)
        if is_log_probs:
            _check_log_probs(check, fingerprint)
    return check


def _check_log_probs(check: Check, fingerprint: Fingerprint) -> None:
    keys, values = (np.concatenate(parts) for parts in zip(*check.whole.values(), strict=True))
    logps, tokens, paths = values["logps"], values["tokens"], list(check.whole)
    names = np.repeat(np.arange(len(paths)), [len(entries.keys) for entries in check.whole.values()])

    def blame(row: Any, reason: str) -> None:
        key = keys[[row]].tobytes()
        check.wrong.add(key)
        check.problems.append(f"{paths[names[row]]}: entry {key.hex()} {reason}")

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
        blame(second, reason + paths[names[first]].name)


def remove_old(folder: Path, *, dry_run: bool) -> list[str]:
    """Remove a folder of an earlier format, but not files of other names; return what was done or would be."""
    own = [path for path in (*folder.glob("*"), *folder.glob("??/*")) if store.SHARD_NAME.fullmatch(path.name)]
    own = [*filter(Path.is_file, own), *store.leftovers(folder, min_age_seconds=store.LEFTOVER_AGE_SECONDS)]
    files = [*own, folder / store.META_FILE]  # this last, if it is killed
    size = sum(status.st_size for _, status in store.statuses(files))
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
    removed = {path: "incomplete, of a killed run" for path in store.leftovers(folder, min_age_seconds=store.LEFTOVER_AGE_SECONDS)}
    removed |= {path: "damaged" for path in check.damaged if store.SHARD_NAME.fullmatch(path.name)}
    done = [f"remove {path.name}: {reason}" for path, reason in removed.items()]
    # A wrong entry may be in any shard, so all of them are rewritten.
    merging = {
        path: entries
        for path, entries in check.whole.items()
        if store.SHARD_NAME.fullmatch(path.name) and (check.wrong or len(entries.keys) < SMALL_SHARD)
    }
    if store.what_of(fingerprint) == store.LOG_PROBS and (len(merging) > 1 or check.wrong):
        merged = Entries.merged(list(merging.values()))
        keep = ~np.isin(merged.keys, np.array(sorted(check.wrong), merged.keys.dtype))
        if check.wrong:
            done.append(f"drop {len(keep) - keep.sum()} entries that cannot be right (mpo cache verify lists them)")
        merged = Entries(merged.keys[keep], merged.values[keep])
        done.append(f"merge {len(merging)} shards into one of {len(merged.keys):,} entries")
        if len(merged.keys) and not dry_run:
            # The new shard is complete before an old one is removed. If killed in between, entries exist twice, which is harmless.
            store.write_shard(folder, merged, fingerprint)
        removed |= dict.fromkeys(merging, "merged")
    for path in () if dry_run else removed:
        path.unlink(missing_ok=True)
    unknown = [path for path in (*check.whole, *check.damaged) if not store.SHARD_NAME.fullmatch(path.name)]
    done += [f"keep {path.name}: mpo does not write files of this name" for path in unknown]
    foreign, unread = "a shard of another model or other settings; move it back to its folder", "this user cannot read it"
    return done + [f"keep {path.name}: {foreign if isinstance(why, ForeignShard) else unread}" for path, why in check.kept.items()]
