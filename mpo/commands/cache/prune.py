"""Remove temporary files and damaged shards, merge small shards.

Temporary files of killed runs, damaged shards and invalid log-probs (verify lists them) are removed, and small shards
of log-probs merged. Shards with other settings and files not written by mpo are never touched. Removed entries are computed again
by the next run that needs them. Training runs may continue at the same time. A folder that cannot be read, as of an
earlier format, is named, and the exit status is then 1; --old removes those of an earlier format.
"""

from mpo.commands.cache import FOLDER
from mpo.commands.flags import Args, flags
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo cache prune --dry-run runs/reference   show the changes
mpo cache prune runs/reference
mpo cache prune --old runs/reference       remove folders of earlier formats too
"""
ARGUMENTS = {**FOLDER, **flags("--dry-run", "--old")}


def run(args: Args) -> Report:
    from mpo.training.reference.maintenance import prune_folder, remove_old
    from mpo.training.store import EarlierFormat, read_caches

    lines, folders = [], []
    caches, unread = read_caches(args.folder)
    pruned = {folder: prune_folder(folder, fingerprint, dry_run=args.dry_run) for folder, fingerprint in caches}
    for folder in [folder for folder, error in unread.items() if args.old and isinstance(error, EarlierFormat)]:
        pruned[folder] = remove_old(folder, dry_run=args.dry_run)
        del unread[folder]
    for folder, done in pruned.items():
        lines += [f"{folder}: " + ("nothing to do" if not done else "would" if args.dry_run else "done")]
        lines += [f"  {line}" for line in done]
        folders.append({"folder": folder, "changes": done})
    problems = list(map(str, unread.values()))
    data = {"dry_run": args.dry_run, "folders": folders, "problems": problems}
    return Report("\n".join([*lines, *problems]), data, int(bool(unread)))
