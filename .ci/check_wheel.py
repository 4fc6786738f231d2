"""Check the built wheel: its size, files and metadata, and that it works without the checkout.

The wheel is unpacked into an empty folder with a copy of the tests, where the editable install is not active: every module is
imported, a recipe of every group composed, and tests of every package run. What the modules do is tested by `make test`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TESTS = (
    "losses/test_values.py",
    "data/test_formats.py",
    "models/test_small.py",
    "encoding/test_tokens.py",
    "batching/test_layout.py",
    "generation/test_local.py",
    "verification/test_verification.py",
    "pipelines/test_job.py",
    "evaluation/test_statistics.py",
    "curation/test_write.py",
    "training/test_finite.py",
    "preflight/doctor/test_step.py",
    "demo/test_questions.py",
    "commands/test_flags.py",  # the help of every command
    "commands/test_doctor.py::test_the_page_of_this_machine",
    "commands/test_train.py::test_a_run_and_its_resumption",
)
"""One file of each package, or one test where a file trains for long."""

CHECK = """
import sys
import mpo
assert "torch" not in sys.modules, "import mpo imports torch"
from importlib import import_module
from pkgutil import walk_packages
for name in ["mpo", *(found.name for found in walk_packages(mpo.__path__, "mpo."))]:
    file = import_module(name).__file__
    assert file.startswith(sys.argv[1]), f"{name} comes from {file}"
import torch
from mpo.losses import Mixture, PairLogps
zeros, ones = torch.zeros(1), torch.ones(1)
loss = Mixture.from_trl(["sigmoid", "bco_pair"], [0.8, 0.2])(PairLogps(zeros, zeros, zeros, zeros, ones, ones)).loss
assert abs(loss.item() - 0.8317766) < 1e-6, loss
from mpo.commands import main
assert main(["train", "--cfg", "job", "experiment=internvl3_8b_lora", "launch=zero3", "loss=bco", "data=mmpr"]) == 0
"""


def main() -> None:
    """Check the one wheel in the folder given on the command line."""
    (wheel,) = Path(sys.argv[1]).glob("mpo_trainer-*.whl")
    checkout = Path.cwd()
    assert wheel.stat().st_size < 1_000_000, f"the wheel has {wheel.stat().st_size:,} bytes, and should have less than 1 MB"
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert top == {"mpo"}, f"the wheel holds {top}"
    about = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
    assert "\nRequires-Python: >=3.11\n" in about, "the wheel's Requires-Python is not that of TRL"
    for line in ("License-Expression: Apache-2.0", "Description-Content-Type: text/markdown", "Classifier: Typing :: Typed"):
        assert f"\n{line}\n" in about, f"the wheel's metadata have no line {line}"
    assert about.partition("\n\n")[2].startswith("# mpo\n"), "the wheel's description is not the README"
    assert "mpo/py.typed" in names, "the wheel is not typed"
    for folder, inside in (("mpo", "mpo"), ("losses", "mpo/losses"), ("recipes", "mpo/recipes")):
        for path in (checkout / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".typed", ".html") or path.name == "py.typed":
                name = f"{inside}/{path.relative_to(checkout / folder).as_posix()}"
                assert name in names, f"{name} is missing from the wheel"
    with tempfile.TemporaryDirectory() as folder:
        site = str(Path(folder).resolve())
        zipfile.ZipFile(wheel).extractall(site)
        # Without site's .pth files the editable install is not active; the environment's libraries still are.
        libraries = next(path for path in sys.path if path.endswith("site-packages"))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([site, libraries])}
        python = [sys.executable, "-S"]
        subprocess.run([*python, "-c", CHECK, site], check=True, cwd=site, env=environment, stdout=subprocess.DEVNULL)
        shutil.copytree(checkout / "tests", Path(folder) / "tests")
        pytest = [*python, "-m", "pytest", "-q", "--import-mode=importlib", "-o", "pythonpath=tests", "-o", "markers=slow: -"]
        subprocess.run([*pytest, *(f"tests/{test}" for test in TESTS)], check=True, cwd=folder, env=environment)
    print(f"{wheel.name}: {len(names)} files, works from outside the checkout")


if __name__ == "__main__":
    main()
