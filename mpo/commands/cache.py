"""`mpo cache`: inspect, verify and prune cached reference log-probs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

EXPLANATION = """\
Inspect, verify and prune cached reference log-probs.

With reference=cached the reference model's log-prob of every completion is stored on disk. A second epoch, a resumed
run, a sweep or a larger data set then computes only the new ones. The cache key is the content: the model's weights,
the chat template, the processor's settings, the images, the prompt and the completion. Each combination of model and
settings has a sub-folder. DIR is the folder of all sub-folders, or one of them.
"""

EXAMPLES = """\
examples
  mpo cache inspect runs/reference           show the model, settings, number of completions and size
  mpo cache verify runs/reference            read and check every shard; exit status 1 on a problem
  mpo cache prune --dry-run runs/reference   show what prune would change
  mpo cache prune runs/reference             remove temporary files and damaged shards, merge small shards
"""

INSPECT = "Show the model and settings, the number of completions, the size, the age and the temporary files of each folder."
VERIFY = """\
Read every shard and check its checksum and its fingerprint, that log-probs are finite and not positive, and that
completions stored twice agree. Changes nothing. The exit status is 1 if there are problems.
"""
PRUNE = """\
Remove temporary files of killed runs, damaged shards and invalid log-probs (verify lists them), and merge small
shards. Shards with other settings and files not written by mpo are never touched. Removed entries are computed again
by the next run that needs them. Training runs may continue at the same time.
"""

MOST_LINES = 100


def configure(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLANATION
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action, help, explanation in (
        ("inspect", inspect, "Show the contents of a cache", INSPECT),
        ("verify", verify, "Check every shard of a cache", VERIFY),
        ("prune", prune, "Remove temporary files and damaged shards, merge small shards", PRUNE),
    ):
        command = actions.add_parser(name, help=help, description=explanation, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_argument("folder", metavar="DIR", type=Path, help="folder of the cache, or one of its sub-folders")
        if name == "prune":
            command.add_argument("--dry-run", action="store_true", help="show the changes without making them")
        command.set_defaults(action=action)


def run(args: argparse.Namespace) -> int:
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


# The three actions


def inspect(args: argparse.Namespace) -> int:
    from mpo.training.reference.shards import cache_folders, leftovers, read_fingerprint, shards

    for folder in cache_folders(args.folder):
        fingerprint = read_fingerprint(folder)
        files = shards(folder)
        rows = [_rows(path) for path in files]
        times = [datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M") for path in files]
        unreadable = f" (and {rows.count(None)} unreadable: run mpo cache verify)" if None in rows else ""
        temporary = leftovers(folder)
        template = fingerprint.about.get("chat_template")
        _table(
            folder,
            {
                "completions": f"{sum(count or 0 for count in rows):,}",
                "shards": f"{len(files)}{unreadable}, {_size(files)}",
                "written": f"{min(times)} to {max(times)}" if times else "nothing yet",
                "temporary files": f"{len(temporary)}, {_size(temporary)} (removed by mpo cache prune)" if temporary else "none",
                "model": " ".join(str(fingerprint.about.get(name, "")) for name in ("model", "name_or_path")).strip(),
                "reference": "the base model with adapter 'ref'" if fingerprint.about.get("reference_adapter") else "the model",
                "chat template": "none" if template is None else _short(template),
                "image processor": _short(_flat(fingerprint.settings.get("image processor", {}).get("image_processor", {}))),
                "labelled tokens": _short(_flat(fingerprint.settings.get("scoring", {}))),
                "fingerprint": fingerprint.digest,
                **{f"  {part}": value for part, value in fingerprint.parts.items()},
            },
        )
    return 0


def verify(args: argparse.Namespace) -> int:
    from mpo.training.reference.maintenance import check_folder
    from mpo.training.reference.shards import cache_folders, read_fingerprint

    bad = 0
    for folder in cache_folders(args.folder):
        check = check_folder(folder, read_fingerprint(folder))
        print(f"{folder}: {check.entries:,} entries in {len(check.whole)} intact shards, {len(check.problems)} problems")
        for problem in check.problems[:MOST_LINES]:
            print(f"  {problem}")
        if len(check.problems) > MOST_LINES:
            print(f"  ... and {len(check.problems) - MOST_LINES:,} more")
        bad += len(check.problems)
    if bad:
        print(f"Run `mpo cache prune {args.folder}` to remove damaged and invalid entries; the next run computes them again.")
    return int(bad > 0)


def prune(args: argparse.Namespace) -> int:
    from mpo.training.reference.maintenance import prune_folder
    from mpo.training.reference.shards import cache_folders, read_fingerprint

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
