"""The installed package: imports, dependencies, metadata and README."""

import platform
import re
import runpy
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent


def test_imports_are_lazy_and_list_their_names():
    code = "import sys, mpo, mpo.models; assert 'torch' not in sys.modules; assert dir(mpo) == sorted(mpo.__all__); "
    code += "from mpo.models import load_internvl, load_processor; assert mpo.MPOTrainer.__name__ == 'MPOTrainer'; "
    code += "print(load_internvl.__module__, load_processor.__module__)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["mpo.models.loading", "mpo.models.loading"]


def test_import_mpo_loads_nothing_but_the_standard_library():
    """Which is what makes it fast: it takes as long as the number of modules says, whatever the machine does."""
    code = "import sys; before = {*sys.modules}; import mpo; print(*{*sys.modules} - before)"
    names = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())
    own = {name for name in names if name.split(".")[0] == "mpo"}
    assert own == {"mpo", "mpo.models", "mpo.models.lazily"}
    assert {name.split(".")[0] for name in names - own} <= sys.stdlib_module_names


def test_an_unknown_name_is_an_attribute_error():
    import mpo.models

    with pytest.raises(AttributeError, match="MPOTrainer"):
        _ = mpo.MPOTrainr
    with pytest.raises(AttributeError, match="load_internvl"):
        _ = mpo.models.load_intern


@pytest.mark.slow
def test_the_readmes_python_runs(files, monkeypatch):
    """With the model's name replaced by a small model's folder."""
    (training,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert "OpenGVLab/InternVL3-1B-Instruct" in training
    script = files / "readme.py"
    script.write_text(training.replace("OpenGVLab/InternVL3-1B-Instruct", str(files / "model")))
    monkeypatch.chdir(files)
    runpy.run_path(str(script), run_name="__main__")
    assert (files / "runs" / "python" / "model.safetensors").is_file()


def test_the_layout_names_every_file_and_folder():
    """The tree under Layout: the top level and mpo/, which are what a newcomer sees first."""
    layout = (ROOT / "CONTRIBUTING.md").read_text().split("## ")[1]
    assert layout.startswith("Layout")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    parts = [file.split("/") for file in files]
    names = {first + "/" * bool(rest) for first, *rest in parts} | {
        second + "/" * bool(rest) for first, second, *rest in (part for part in parts if len(part) > 1) if first == "mpo"
    }
    if not files:
        pytest.skip("not a git checkout")
    assert not [name for name in sorted(names) if not re.search(rf"(^|\s){re.escape(name)}(\s|;|$)", layout, flags=re.MULTILINE)]


def test_the_oldest_python_is_one_that_every_requirement_takes():
    """TRL 1.16 needs Python 3.11: with an older one, the installation would fail later."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    oldest = re.fullmatch(r">=(\d\.\d+)", project["project"]["requires-python"])[1]
    for line in project["project"]["dependencies"]:
        name = Requirement(line).name
        asked = metadata(name)["Requires-Python"]
        assert SpecifierSet(asked or "").contains(oldest), f"{name} needs Python {asked}"
    assert project["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert project["tool"]["mypy"]["python_version"] == oldest
    listed = [one.split()[-1] for one in project["project"]["classifiers"] if re.search(r":: Python :: 3\.\d", one)]
    assert listed[0] == oldest and len(listed) > 1 and platform.python_version().rpartition(".")[0] in listed
    for file in ("README.md", "Makefile"):
        assert re.findall(r"Python >= (\d\.\d+)", (ROOT / file).read_text()) == [oldest]


def test_every_package_is_in_the_wheel():
    """setup.cfg lists them by hand."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "mpo").rglob("__init__.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"mpo.losses", "mpo.recipes"}
    assert set(settings["options"]["packages"].split()) == expected
