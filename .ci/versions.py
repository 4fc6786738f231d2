"""Run a part of the tests on the lowest or newest releases that the metadata allow, and write down the result.

    python .ci/versions.py lowest                         # in build/versions/lowest, with the python that runs this
    python3.13 .ci/versions.py newest                     # each Python has a newest of its own

`lowest` installs the oldest releases of the requirements in pyproject.toml that go together, extras included; `newest` the newest.
It is no part of `.ci/run`: PyTorch alone is several GB. The result is a line of benchmarks/results/versions.jsonl; after a newest
run, update `TESTED` in mpo/preflight/packages.py.
"""

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = "demo,evaluate,internlm2,review,scale,server,verify,video"  # those that need no GPU
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "gguf", "tensorboard")
TESTS = (
    *(f"tests/{name}" for name in "batching curation data encoding evaluation losses verification".split()),
    *(f"tests/models/test_{name}.py" for name in "small official export parts".split()),
    *(f"tests/training/test_{name}.py" for name in "training config trl_parity references saving resume sft batching".split()),
    "tests/training/reference",
    "tests/generation/test_local.py",
    "tests/commands/test_train.py",
)
"""From a record to a loss, checkpoints in both formats, training with what it has of TRL and transformers, generation."""


def requirements() -> list[str]:
    """Every requirement with a lower bound in pyproject.toml, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in EXTRAS.split(",") for line in extras[name])]
    return [line for line in lines if ">=" in line]


def main() -> int:
    """Install, run the tests, write the line; 0 when all passed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = ["-q", "-m", "not slow", "-p", "no:cacheprovider", *(given.tests or TESTS)]
    done = subprocess.Popen([python, "-m", "pytest", *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    last = ""
    for line in done.stdout or ():
        print(line, end="", flush=True)
        last = line if line.strip() else last
    freeze = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    versions = {entry["name"].lower().replace("_", "-"): entry["version"] for entry in json.loads(freeze.stdout)}
    names = [re.split(r"[\[>]", line)[0] for line in requirements()]
    counts = {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    line = {"date": datetime.date.today().isoformat(), "releases": given.releases, "python": platform.python_version()}
    line |= {"tests": counts, "packages": {name: versions[name] for name in dict.fromkeys(names) if name in versions}}
    if not given.tests:
        with (ROOT / "benchmarks" / "results" / "versions.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(json.dumps(line))
    return done.wait()


if __name__ == "__main__":
    sys.exit(main())
