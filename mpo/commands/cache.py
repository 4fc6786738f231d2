"""Inspect, verify and prune cached reference log-probs and vision features.

With reference=cached the reference model's log-prob of every completion is stored on disk. A second epoch, a resumed
run, a sweep or a larger data set then computes only the new ones. The cache key is the content: the model's weights,
the chat template, the processor's settings, the images, the prompt and the completion. Each combination of model and
settings has a sub-folder. DIR is the folder of all sub-folders, or one of them.

With vision_features=cached the features of every image are stored likewise, by the vision tower's weights, the
processor's settings and the image.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from mpo.commands.flags import Args, action, arg, flags, path
from mpo.commands.outcome import Report
from mpo.visible import size

FOLDER = {"folder": arg("folder of the cache, or one of its sub-folders", "DIR", type=path)}


@action(
    FOLDER,
    "mpo cache inspect runs/reference           show the model, settings, number of completions and size",
    "mpo cache inspect runs/reference --json",
)
def inspect(args: Args) -> Report:
    """Show the contents of a cache.

    For each folder: the model and settings, the number of completions or images, the size, the age and the temporary
    files. A folder that cannot be read, as of an earlier format, is named, and the exit status is then 1.
    """
    from mpo.training.store import read_caches

    caches, unread = read_caches(args.folder)
    folders = [_contents(*cache) for cache in caches]
    return _report(map(_table, folders), folders, unread)


def _report(lines: Iterable[str], folders: list[Any], unread: Mapping[Path, Exception], bad: bool = False, **more: Any) -> Report:
    problems = list(map(str, unread.values()))
    return Report("\n".join([*lines, *problems]), {**more, "folders": folders, "problems": problems}, int(bad or bool(unread)))


def _contents(folder: Path, fingerprint: Any) -> dict[str, Any]:
    from mpo.training.store import FEATURES, leftovers, read_shard, shards, statuses, what_of

    temporary, files, entries, unreadable = [status.st_size for _, status in statuses(leftovers(folder))], [], 0, 0
    for shard, status in statuses(shards(folder)):
        try:
            entries += len(read_shard(shard, fingerprint).keys)
        except FileNotFoundError:  # removed by a run
            continue
        except ValueError:
            unreadable += 1
        files.append(status)
    times = sorted(status.st_mtime for status in files)
    return {
        "folder": str(folder),
        "images" if what_of(fingerprint) == FEATURES else "completions": entries,
        "shards": len(files),
        "unreadable": unreadable,
        "bytes": sum(status.st_size for status in files),
        "written": [datetime.fromtimestamp(time).isoformat(" ", "minutes") for time in (times[0], times[-1])] if times else [],
        "temporary": {"files": len(temporary), "bytes": sum(temporary)},
        "about": fingerprint.about,
        "settings": fingerprint.settings,
        "fingerprint": {"digest": fingerprint.digest, "parts": fingerprint.parts},
    }


def _table(found: dict[str, Any]) -> str:
    about, settings, temporary = found["about"], found["settings"], found["temporary"]
    unreadable = f" (and {found['unreadable']} unreadable: run mpo cache verify)" if found["unreadable"] else ""
    removed = f"{temporary['files']}, {size(temporary['bytes'])} (removed by mpo cache prune)"
    parts = found["fingerprint"]["parts"]
    of_features = {name: parts.get(name, "not known") for name in ("features", "compute dtype", "device") if "images" in found}
    of_log_probs = {
        "reference": "the base model with adapter 'ref'" if about.get("reference_adapter") else "the model",
        "chat template": _short(about.get("chat_template") or "none"),
        "image processor": _short(settings.get("image processor", {}).get("image_processor", {})),
        "labelled tokens": _short(settings.get("scoring", {})),
    }
    rows = {
        **{name: f"{found[name]:,}" for name in ("completions", "images") if name in found},
        "shards": f"{found['shards']}{unreadable}, {size(found['bytes'])}",
        "written": " to ".join(found["written"]) or "nothing yet",
        "temporary files": removed if temporary["files"] else "none",
        "model": " ".join(str(about.get(name, "")) for name in ("model", "name_or_path")).strip(),
        **(of_features or of_log_probs),
        "fingerprint": found["fingerprint"]["digest"],
        **{f"  {part}": value for part, value in parts.items()},
    }
    width = max(map(len, rows))
    return "\n".join([found["folder"], *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""])


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else ", ".join(f"{name}={one}" for name, one in value.items()) or "none"
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."


MOST_LINES = 100
"""Maximum number of problems listed per folder; with --json, all are."""


@action(
    FOLDER,
    "mpo cache verify runs/reference            read and check every shard; exit status 1 on a problem",
    "mpo cache verify runs/reference --json > problems.json",
)
def verify(args: Args) -> Report:
    """Check every shard of a cache.

    Read every shard and check its checksum and its fingerprint, that log-probs are finite and not positive, and that
    completions stored twice agree. Changes nothing. The exit status is 1 if there are problems, such as a folder of an
    earlier format.
    """
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
    return _report(lines, folders, unread, bad)


@action(
    {**FOLDER, **flags("--dry-run", "--old")},
    "mpo cache prune runs/reference             remove temporary files and damaged shards, merge small shards",
    "mpo cache prune --dry-run runs/reference   show the changes",
    "mpo cache prune --old runs/reference       remove folders of earlier formats too",
)
def prune(args: Args) -> Report:
    """Remove temporary files and damaged shards, merge small shards.

    Temporary files of killed runs, damaged shards and invalid log-probs (verify lists them) are removed, and small shards
    of log-probs merged. Shards with other settings and files not written by mpo are never touched. Removed entries are computed
    again by the next run that needs them. Training runs may continue at the same time. A folder that cannot be read, as of an
    earlier format, is named, and the exit status is then 1; --old removes those of an earlier format.
    """
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
    return _report(lines, folders, unread, dry_run=args.dry_run)
