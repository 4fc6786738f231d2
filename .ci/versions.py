"""Run a part of the tests on the lowest or newest releases that the metadata allow, and write down the result.

    python .ci/versions.py lowest                         # in build/versions/lowest, with the python that runs this
    python3.13 .ci/versions.py newest                     # each Python has a newest of its own

`lowest` installs the oldest releases of the requirements in pyproject.toml that go together, extras included; `newest` the newest.
It is no part of `.ci/run`: PyTorch alone is several GB. Files that depend most on the releases come first. The outcomes of a file
are kept beside the environment: after an interruption, at the same commit and without changes, the same command goes on with the
files that have not passed yet. The result of all files that ran at this commit is a line of benchmarks/results/versions.jsonl, also
after Ctrl-C or kill; after a newest run, update `TESTED` in mpo/preflight/packages.py.
"""

import argparse
import datetime
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tomllib
import venv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = "demo,evaluate,internlm2,review,scale,server,verify,video"  # those that need no GPU
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "gguf", "tensorboard")
TESTS = (
    *(f"tests/training/test_{name}.py" for name in "trl_parity config training references saving resume adapters sft".split()),
    "tests/losses",
    *(f"tests/models/test_{name}.py" for name in "export official small parts".split()),
    "tests/generation/test_local.py",
    "tests/commands/test_train.py",
    "tests/training/reference",
    "tests/training/test_batching.py",
    *(f"tests/{name}" for name in "encoding batching data verification evaluation curation".split()),
)
"""Training, with what it has of TRL, transformers and PEFT; checkpoints in both formats; generation; from a record to a batch."""
_OUTCOME = re.compile(r"(tests/\S+?\.py)(?:::.*)? (PASSED|FAILED|ERROR|SKIPPED)(?: |$)")


def requirements() -> list[str]:
    """Every requirement with a lower bound in pyproject.toml, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in EXTRAS.split(",") for line in extras[name])]
    return [line for line in lines if ">=" in line]


def files_of(tests: Sequence[str]) -> list[str]:
    """The test files, in order: of a folder, all."""
    found = ((ROOT / name).rglob("test_*.py") if (ROOT / name).is_dir() else [ROOT / name] for name in tests)
    return [str(path.relative_to(ROOT)) for paths in found for path in sorted(paths)]


def commit() -> str | None:
    """The commit of this checkout; None if something else than results differs from it."""
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "diff", "--quiet", "HEAD", "--", ".", ":!benchmarks/results"], check=False).returncode:
        return None
    return subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


def run(python: str, files: Sequence[str]) -> Iterator[tuple[str, Counter[str]]]:
    """Run test files in one pytest; yields each file with the counts of its outcomes, as soon as its last test has ended."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [python, "-m", "pytest", "-v", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    done = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    current, counts = "", {name: Counter[str]() for name in files}
    try:
        for line in done.stdout or ():
            print(line, end="", flush=True)
            if outcome := _OUTCOME.match(line):
                if current not in ("", outcome[1]):
                    yield current, counts[current]
                current = outcome[1]
                counts[current][outcome[2].lower()] += 1
    except KeyboardInterrupt:
        done.terminate()
        raise
    if done.wait() in (0, 1, 5):  # not interrupted; 5: all of its tests are slow, as in a file without an outcome
        yield from ((name, found) for name, found in counts.items() if name == current or not found)


def main() -> int:
    """Install, run the tests, write the line; 0 when all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", choices=["lowest", "newest"])
    parser.add_argument("tests", nargs="*", help="test files instead of the usual ones; nothing is then written")
    given = parser.parse_args()
    folder = ROOT / "build" / "versions" / f"{given.releases}-{platform.python_version()}"
    python = str(folder / "bin" / "python")
    if not (folder / "installed").exists():
        venv.create(folder, clear=True, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"], check=True)
        install = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python]
        resolution = "lowest-direct" if given.releases == "lowest" else "highest"
        subprocess.run([*install, "--resolution", resolution, "--editable", f".[{EXTRAS}]"], cwd=ROOT, check=True)
        freeze = [*install[:4], "freeze", "--exclude-editable", "--python", python]
        (folder / "installed.txt").write_bytes(subprocess.run(freeze, capture_output=True, check=True).stdout)
        subprocess.run([*install, "--constraint", str(folder / "installed.txt"), *TOOLS], check=True)
        (folder / "installed").touch()
    files, at, log = files_of(given.tests or TESTS), commit(), folder / "outcomes.jsonl"
    kept = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() and at else []
    outcomes = {line["file"]: Counter(line["tests"]) for line in kept if line["commit"] == at and line["file"] in files}
    left = [name for name in files if outcomes.get(name, {"failed": 1}).keys() & {"failed", "error"}]
    print(f"{len(files) - len(left)} of {len(files)} files have passed at this commit", flush=True)
    for one in (signal.SIGINT, signal.SIGTERM):  # the first is ignored in the background of a shell
        signal.signal(one, signal.default_int_handler)
    try:
        for name, counts in run(python, left) if left else ():
            outcomes[name] = counts
            with log.open("a") as file:
                file.write(json.dumps({"commit": at, "file": name, "tests": counts}) + "\n")
    except KeyboardInterrupt:
        pass
    freeze = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(freeze.stdout)}
    names = [re.split(r"[\[>]", line)[0] for line in requirements()]
    line = {"date": datetime.date.today().isoformat(), "releases": given.releases, "python": platform.python_version()}
    line |= {"files": f"{len(outcomes)} of {len(files)}", "tests": dict(sum(outcomes.values(), Counter()))}
    line |= {"packages": {name: versions[name] for name in dict.fromkeys(names) if name in versions}}
    if not given.tests and outcomes:
        with (ROOT / "benchmarks" / "results" / "versions.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    return int(len(outcomes) < len(files) or any(counts.keys() & {"failed", "error"} for counts in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
