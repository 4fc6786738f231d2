"""Remove temporary files and damaged shards, merge small shards.

Temporary files of killed runs, damaged shards and invalid log-probs (verify lists them) are removed, and small shards
of log-probs merged. Shards with other settings and files not written by mpo are never touched. Removed entries are computed again
by the next run that needs them. Training runs may continue at the same time.
"""

from __future__ import annotations

import argparse

from mpo.commands.flags import add, path
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo cache prune --dry-run runs/reference   show the changes
mpo cache prune runs/reference
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", type=path, help="folder of the cache, or one of its sub-folders")
    add(parser, "--dry-run")


def run(args: argparse.Namespace) -> Report:
    from mpo.training.reference.maintenance import prune_folder
    from mpo.training.store import cache_folders, read_fingerprint

    lines, folders = [], []
    for folder in cache_folders(args.folder):
        done = prune_folder(folder, read_fingerprint(folder), dry_run=args.dry_run)
        lines += [f"{folder}: " + ("nothing to do" if not done else "would" if args.dry_run else "done")]
        lines += [f"  {line}" for line in done]
        folders.append({"folder": folder, "changes": done})
    return Report("\n".join(lines), {"dry_run": args.dry_run, "folders": folders})
