"""`mpo cache`: look into a folder of cached reference log-probs, check it, clean it up."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --help needs no torch
    pass

EXPLANATION = """\
A run with reference=cached keeps the reference model's log-prob of every answer on disk, so that a second epoch,
a resumed run, a sweep or a larger data set computes only what is new. Answers are found by their content: the
model's weights, the chat template, the processor's settings, the images, the prompt and the answer itself.
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
    from mpo.reference.shards import cache_folders, leftovers, read_fingerprint, shards

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
    from mpo.reference.maintenance import check_folder
    from mpo.reference.shards import cache_folders, read_fingerprint

    bad = 0
    for folder in cache_folders(args.folder):
        check = check_folder(folder, read_fingerprint(folder))
        print(f"{folder}: {check.entries:,} answers in {len(check.whole)} whole shards, {len(check.problems)} problems")
        for problem in check.problems[:MOST_LINES]:
            print(f"  {problem}")
        if len(check.problems) > MOST_LINES:
            print(f"  ... and {len(check.problems) - MOST_LINES:,} more")
        bad += len(check.problems)
    if bad:
        print(f"`mpo cache prune {args.folder}` removes what is damaged or wrong; it is then computed again.")
    return int(bad > 0)


def prune(args: argparse.Namespace) -> int:
    from mpo.reference.maintenance import prune_folder
    from mpo.reference.shards import cache_folders, read_fingerprint

    for folder in cache_folders(args.folder):
        done = prune_folder(folder, read_fingerprint(folder), dry_run=args.dry_run)
        print(f"{folder}: " + ("nothing to do" if not done else "would" if args.dry_run else "done"))
        for line in done:
            print(f"  {line}")
    return 0


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
