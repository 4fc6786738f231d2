"""`mpo cache`: look into a folder of cached reference log-probs, check it, clean it up."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --help needs no torch
    from mpo.fingerprint import Fingerprint
    from mpo.reference import Answers

EXPLANATION = """\
A run with reference=cached keeps the reference model's log-prob of every answer on disk, so that a second epoch,
a resumed run, a sweep or a larger data set computes only what is new. Answers are found by their content: the
model's weights, the chat template, the processor's settings, the pictures, the prompt and the answer itself.
Every model or set-up has its own sub-folder; DIR is the folder above them, or one of them.
"""

EXAMPLES = """\
examples
  mpo cache inspect runs/reference           whose answers these are, how many, how large
  mpo cache verify runs/reference            read and check everything; exit status 1 when something is wrong
  mpo cache prune --dry-run runs/reference   say what a clean-up would do
  mpo cache prune runs/reference             remove leftovers and damaged shards, merge small shards
"""

INSPECT = "Say which model and set-up each folder belongs to, how many answers it has, its size, age and leftovers."
VERIFY = """\
Read every shard and check: that it is whole (checksum), that it belongs to this folder, that log-probs are finite
and not positive, that answers stored twice agree. Changes nothing. Exit status 1 when something is wrong.
"""
PRUNE = """\
Clean up: remove what killed runs left half-written, remove damaged shards, leave out answers that cannot be right
(verify lists them), merge small shards into one. Files that mpo did not write are never touched, nor are shards of
another set-up. What is removed is computed again by the next run that needs it. Runs may go on meanwhile.
"""

MOST_LINES = 100
HIGHEST_LOGPS = 1e-3
"""A log-prob is at most 0, up to rounding."""
DISAGREEMENT = {"float32": 1e-3, "float64": 1e-3}
"""The same answer computed twice, in other batches, may differ by this times the root of its number of tokens, ..."""
DISAGREEMENT_16_BIT = 0.1
"""... in 16 bits by this: logits of about 20 are known to about 0.1 there, and errors of tokens are independent."""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action, help, explanation in (
        ("inspect", inspect, "what a cache holds, and whose", INSPECT),
        ("verify", verify, "read all of it and check it", VERIFY),
        ("prune", prune, "remove leftovers and damaged shards, merge small ones", PRUNE),
    ):
        command = actions.add_parser(name, help=help, description=explanation, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("folder", metavar="DIR", type=Path, help="the cache's folder, or one sub-folder of it")
        if name == "prune":
            command.add_argument("--dry-run", action="store_true", help="only say what would be done")
        command.set_defaults(action=action)


def run(args: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


# The three actions


def inspect(args: argparse.Namespace) -> int:
    from mpo.reference import cache_folders, leftovers, read_fingerprint, shards

    for folder in cache_folders(args.folder):
        fingerprint = read_fingerprint(folder)
        files = shards(folder)
        rows = [_rows(path) for path in files]
        times = [datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M") for path in files]
        unread = f" (and {rows.count(None)} unreadable: see mpo cache verify)" if None in rows else ""
        left = leftovers(folder)
        template = fingerprint.about.get("chat_template")
        _table(
            folder,
            {
                "answers": f"{sum(count or 0 for count in rows):,}",
                "shards": f"{len(files)}{unread}, {_size(files)}",
                "written": f"{min(times)} to {max(times)}" if times else "nothing yet",
                "leftovers": f"{len(left)}, {_size(left)} (mpo cache prune removes them)" if left else "none",
                "model": " ".join(str(fingerprint.about.get(name, "")) for name in ("model", "name_or_path")).strip(),
                "reference": "the base model with its adapter 'ref'" if fingerprint.about.get("reference_adapter") else "the model",
                "chat template": "none" if template is None else _short(template),
                "image processor": _short(_flat(fingerprint.settings.get("image processor", {}).get("image_processor", {}))),
                "scoring": _short(_flat(fingerprint.settings.get("scoring", {}))),
                "fingerprint": fingerprint.digest,
                **{f"  {part}": value for part, value in fingerprint.parts.items()},
            },
        )
    return 0


def verify(args: argparse.Namespace) -> int:
    from mpo.reference import cache_folders, read_fingerprint

    bad = 0
    for folder in cache_folders(args.folder):
        check = check_folder(folder, read_fingerprint(folder))
        print(f"{folder}: {check.answers:,} answers in {len(check.whole)} whole shards, {len(check.problems)} problems")
        for problem in check.problems[:MOST_LINES]:
            print(f"  {problem}")
        if len(check.problems) > MOST_LINES:
            print(f"  ... and {len(check.problems) - MOST_LINES:,} more")
        bad += len(check.problems)
    if bad:
        print(f"`mpo cache prune {args.folder}` removes what is damaged or wrong; it is then computed again.")
    return int(bad > 0)


def prune(args: argparse.Namespace) -> int:
    from mpo.reference import cache_folders, read_fingerprint

    for folder in cache_folders(args.folder):
        done = prune_folder(folder, read_fingerprint(folder), dry_run=args.dry_run)
        print(f"{folder}: " + ("nothing to do" if not done else "would" if args.dry_run else "done"))
        for line in done:
            print(f"  {line}")
    return 0


# Checking and cleaning one folder


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
    import numpy as np

    from mpo.reference import DamagedShard, ForeignShard, read_shard, shards

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
    import numpy as np

    from mpo.reference import LEFTOVER_AGE_SECONDS, SHARD_NAME, SMALL_SHARD, Answers, leftovers, write_shard

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


# Printing


def _rows(path: Path) -> int | None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        return int(pq.read_metadata(path).num_rows)
    except (pa.ArrowException, OSError):
        return None


def _table(title: Path, rows: dict[str, str]) -> None:
    print(title)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
    print()


def _size(files: list[Path]) -> str:
    total = sum(path.stat().st_size for path in files)
    return f"{total / 2**20:.1f} MiB" if total >= 2**20 else f"{total / 2**10:.1f} KiB"


def _flat(settings: Any) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "none"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
