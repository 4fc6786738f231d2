"""Check a folder of cached reference log-probs, and clean it up."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpo.reference.fingerprint import Fingerprint
from mpo.reference.shards import (
    LEFTOVER_AGE_SECONDS,
    SHARD_NAME,
    SMALL_SHARD,
    Answers,
    DamagedShard,
    ForeignShard,
    leftovers,
    read_shard,
    shards,
    write_shard,
)

HIGHEST_LOGPS = 1e-3
"""A log-prob is at most 0, up to rounding."""
DISAGREEMENT = {"float32": 1e-3, "float64": 1e-3}
"""The same answer computed twice, in other batches, may differ by this times the root of its number of tokens, ..."""
DISAGREEMENT_16_BIT = 0.1
"""... in 16 bits by this: logits of about 20 are known to about 0.1 there, and errors of tokens are independent."""


@dataclass
class Check:
    """What is wrong in a folder. `problems` are sentences; `wrong` the keys of answers that cannot be right."""

    answers: int = 0
    whole: list[Path] = field(default_factory=list)
    damaged: list[Path] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    wrong: set[bytes] = field(default_factory=set)
    contents: list[Answers] = field(default_factory=list)


def check_folder(folder: Path, fingerprint: Fingerprint) -> Check:
    """Read every shard of a folder and check it, and the answers across shards."""
    check = Check()
    for path in shards(folder):
        try:
            check.contents.append(read_shard(path, fingerprint))
            check.whole.append(path)
        except FileNotFoundError:  # another pruning has just merged it
            continue
        except DamagedShard as error:
            check.damaged.append(path)
            check.problems.append(str(error))
        except ForeignShard as error:
            check.foreign.append(path)
            check.problems.append(str(error))
    if not check.contents:
        return check
    sizes = [len(answers) for answers in check.contents]
    keys = np.concatenate([answers.keys for answers in check.contents])
    logps = np.concatenate([answers.logps for answers in check.contents])
    tokens = np.concatenate([answers.tokens for answers in check.contents])
    names = np.repeat(np.arange(len(sizes)), sizes)

    def blame(row: Any, reason: str) -> None:
        key = keys[[row]].tobytes()
        check.wrong.add(key)
        check.problems.append(f"{check.whole[names[row]]}: answer {key.hex()} {reason}")

    for row in np.flatnonzero(~np.isfinite(logps) | (logps > HIGHEST_LOGPS) | (tokens < 1)):
        blame(row, f"has log-prob {logps[row]:g} over {tokens[row]} tokens; a sum of log-probs is finite and at most 0")

    order = np.argsort(keys, kind="stable")
    before, after = order[:-1], order[1:]
    twice = keys[before] == keys[after]
    before, after = before[twice], after[twice]
    tolerance = DISAGREEMENT.get(fingerprint.parts.get("compute dtype", ""), DISAGREEMENT_16_BIT) * np.sqrt(
        np.maximum(tokens[after], 1)
    )
    apart = (np.abs(logps[before] - logps[after]) > tolerance) | (tokens[before] != tokens[after])
    for first, second in zip(before[apart], after[apart], strict=True):
        reason = f"has log-prob {logps[second]:g} over {tokens[second]} tokens, but {logps[first]:g} over {tokens[first]} in "
        blame(second, reason + check.whole[names[first]].name)
    check.answers = len(keys) - int(twice.sum())
    return check


def prune_folder(folder: Path, fingerprint: Fingerprint, *, dry_run: bool) -> list[str]:
    """Clean one folder; returns what was done, or would be. Only files with names that mpo writes are ever removed."""
    check = check_folder(folder, fingerprint)
    old = leftovers(folder, min_age_seconds=LEFTOVER_AGE_SECONDS)
    damaged = [path for path in check.damaged if SHARD_NAME.fullmatch(path.name)]
    done = [f"remove {path.name}: left half-written by a killed run" for path in old]
    done += [f"remove {path.name}: damaged" for path in damaged]
    own = {path: answers for path, answers in zip(check.whole, check.contents, strict=True) if SHARD_NAME.fullmatch(path.name)}
    # A wrong answer may stand in any shard, so then all are written anew.
    merging = {path: answers for path, answers in own.items() if check.wrong or len(answers) < SMALL_SHARD}
    if len(merging) > 1 or check.wrong:
        merged = Answers.merged(list(merging.values()))
        if check.wrong:
            keep = ~np.isin(merged.keys, np.frombuffer(b"".join(sorted(check.wrong)), merged.keys.dtype))
            dropped = len(merged) - int(keep.sum())
            merged = Answers(merged.keys[keep], merged.logps[keep], merged.tokens[keep])
            done.append(f"leave out {dropped} answers that cannot be right (mpo cache verify lists them)")
        done.append(f"merge {len(merging)} shards into one of {len(merged):,} answers")
        if not dry_run:
            # The new shard is whole before an old one goes: killed in between, answers stand twice, which does no harm.
            if len(merged):
                write_shard(folder, merged, fingerprint)
            damaged += merging
    if not dry_run:
        for path in (*old, *damaged):
            path.unlink(missing_ok=True)
    strange = [path for path in (*check.whole, *check.damaged) if not SHARD_NAME.fullmatch(path.name)]
    done += [f"leave {path.name}: mpo does not write such names" for path in strange]
    return done + [f"leave {path.name}: a shard of another set-up; move it back to its folder" for path in check.foreign]
