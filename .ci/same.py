"""Run the same small runs in two trees, and compare what comes out bit for bit: losses, weights, log-probs, an export, FLOPs.

    python .ci/same.py main                    # a revision against this checkout, uncommitted changes included
    python .ci/same.py v0.1 v0.2               # two revisions, or folders of checkouts
    python .ci/same.py main --only full lora   # some of the runs

The runs are those of tests/fixed_runs.py; both trees run them under this Python, on the CPU, with the helpers of this checkout's
tests. Where a change moves no number every row says equal. A row that differs says by how much at the most; the exit status is 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run in both trees, print the table; 0 when nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a revision, or the folder of a checkout")
    parser.add_argument("new", nargs="?", default=str(ROOT), help="the same (default: this checkout)")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="some of the runs (default: all)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for side in ("old", "new"):
            folder = Path(name, side)
            tree = tree_of(getattr(given, side), folder / "tree")
            (folder / "mpo").mkdir(parents=True)
            for one in (*(tree / "mpo").iterdir(), tree / "losses", tree / "recipes"):
                (folder / "mpo" / one.name).symlink_to(one)  # found there before the packages that are installed
            paths = {"PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT / "tests"))), "HF_HUB_OFFLINE": "1"}
            code = f"import fixed_runs; fixed_runs.run_all({str(tree)!r}, {f'{folder}.pt'!r}, {given.only})"
            words = [sys.executable, "-P", "-c", code]
            if subprocess.run(words, env={**os.environ, **paths}, stdout=subprocess.DEVNULL, check=False).returncode:
                sys.exit(f"The runs of {getattr(given, side)} have failed; see above.")
        return compare(Path(name))


def tree_of(asked: str, new: Path) -> Path:
    """The folder of a checkout as it is, or that of a revision, whose files are written to `new`."""
    folder = Path(asked).resolve()
    if (folder / "mpo").is_dir():
        return folder
    git = ["git", "-C", str(ROOT), "archive", asked]
    files = subprocess.run(git, stdout=subprocess.PIPE, check=False)
    if files.returncode:
        sys.exit(f"{asked} is neither the folder of a checkout nor a revision.")
    new.mkdir(parents=True)
    subprocess.run(["tar", "-x", "-C", str(new)], input=files.stdout, check=True)
    return new


def compare(folder: Path) -> int:
    """Print the largest difference of each part of each run; 0 when nothing differs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from small_runs import difference, torch

    old, new = (torch.load(folder / f"{side}.pt") for side in ("old", "new"))
    rows = {f"{run}: {part}": difference(value, new[run].get(part)) for run, parts in old.items() for part, value in parts.items()}
    for label, most in rows.items():
        print(f"{label:<24} {'equal' if most == 0 else f'differs by {most:.3g}'}")
    return int(any(rows.values()))


if __name__ == "__main__":
    sys.exit(main())
