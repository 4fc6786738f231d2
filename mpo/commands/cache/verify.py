"""Check every shard of a cache.

Read every shard and check its checksum and its fingerprint, that log-probs are finite and not positive, and that
completions stored twice agree. Changes nothing. The exit status is 1 if there are problems, such as a folder of an
earlier format.
"""

from mpo.commands.cache import FOLDER
from mpo.commands.flags import Args
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo cache verify runs/reference
mpo cache verify runs/reference --json > problems.json
"""
MOST_LINES = 100
"""Maximum number of problems listed per folder; with --json, all are."""
ARGUMENTS = FOLDER


def run(args: Args) -> Report:
    from mpo.training.reference.maintenance import check_folder
    from mpo.training.store import read_caches

    lines, folders, prunable = [], [], False
    caches, unread = read_caches(args.folder)
    for folder, fingerprint in caches:
        check = check_folder(folder, fingerprint)
        problems, prunable = check.problems, prunable or bool(check.damaged or check.wrong)
        folders.append({"folder": folder, "entries": check.entries, "intact_shards": len(check.whole), "problems": problems})
        lines.append(f"{folder}: {check.entries:,} entries in {len(check.whole)} intact shards, {len(problems)} problems")
        lines += [f"  {problem}" for problem in problems[:MOST_LINES]]
        if len(problems) > MOST_LINES:
            lines.append(f"  ... and {len(problems) - MOST_LINES:,} more")
    bad = any(found["problems"] for found in folders)
    fix = f"Run `mpo cache prune {args.folder}` to remove damaged and invalid entries; the next run computes them again."
    lines += [fix] if prunable else []
    others = list(map(str, unread.values()))
    return Report("\n".join([*lines, *others]), {"folders": folders, "problems": others}, int(bad or bool(unread)))
