"""Show the contents of a cache.

For each folder: the model and settings, the number of completions or images, the size, the age and the temporary
files. A folder that cannot be read, as of an earlier format, is named, and the exit status is then 1.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

from mpo.commands.cache import FOLDER
from mpo.commands.flags import Args
from mpo.commands.outcome import Report

EXAMPLES = """\
mpo cache inspect runs/reference
mpo cache inspect runs/reference --json
"""
ARGUMENTS = FOLDER


def run(args: Args) -> Report:
    from mpo.training.store import read_caches

    caches, unread = read_caches(args.folder)
    folders, problems = [_contents(*cache) for cache in caches], list(map(str, unread.values()))
    return Report("\n".join([*map(_table, folders), *problems]), {"folders": folders, "problems": problems}, int(bool(unread)))


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
    removed = f"{temporary['files']}, {_size(temporary['bytes'])} (removed by mpo cache prune)"
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
        "shards": f"{found['shards']}{unreadable}, {_size(found['bytes'])}",
        "written": " to ".join(found["written"]) or "nothing yet",
        "temporary files": removed if temporary["files"] else "none",
        "model": " ".join(str(about.get(name, "")) for name in ("model", "name_or_path")).strip(),
        **(of_features or of_log_probs),
        "fingerprint": found["fingerprint"]["digest"],
        **{f"  {part}": value for part, value in parts.items()},
    }
    width = max(map(len, rows))
    return "\n".join([found["folder"], *(f"  {name:<{width}}  {value}" for name, value in rows.items()), ""])


def _size(total: int) -> str:
    return f"{total / 2**20:.1f} MiB" if total >= 2**20 else f"{total / 2**10:.1f} KiB"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else ", ".join(f"{name}={one}" for name, one in value.items()) or "none"
    text = " ".join(text.split())
    return text if len(text) <= 100 else text[:97] + "..."
