"""The notebooks of examples/: each runs and shows its pictures, and script and notebook of a pair are the same."""

import base64
import importlib.util
import json
import re
from pathlib import Path

import pytest
from test_docs import check_job, commands, trains

from mpo.commands import command_line

ROOT = Path(__file__).parents[1]
KERNEL = """
import matplotlib
from ipykernel.kernelapp import IPKernelApp
from matplotlib_inline.backend_inline import configure_inline_support

kernel = IPKernelApp.instance()
kernel.initialize()
matplotlib.use("module://matplotlib_inline.backend_inline")
configure_inline_support(kernel.shell, "inline")  # which importing pyplot does, and that is done
kernel.start()
"""
SCRIPTS = sorted((ROOT / "examples" / "notebooks").glob("*.py"))

pytestmark = pytest.mark.skipif(not SCRIPTS, reason="the examples are not here")
nbformat, *_ = (pytest.importorskip(name) for name in ("nbformat", "nbclient", "jupytext", "ipykernel", "skimage"))


@pytest.fixture(scope="module")
def tool():
    """The script that writes the notebooks."""
    spec = importlib.util.spec_from_file_location("write_notebooks", ROOT / ".ci" / "notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def pictures(notebook):
    """The PNG files that a notebook shows."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def test_there_are_seven():
    assert [path.stem[0] for path in SCRIPTS] == list("1234567")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_pair_has_the_same_cells(script, tool):
    cells = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (tool.read(script), written(script))]
    assert cells[0] == cells[1], f"run python .ci/notebooks.py {script.stem}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_is_kept_is_small_and_names_no_machine(script):
    notebook = written(script)
    assert len(pictures(notebook)) >= 3
    assert max(map(len, pictures(notebook))) < 150_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = " ".join(re.sub(r"base64,[\w+/=]+", "", str(o.get("text") or o.data.get("text/html"))) for o in outputs)
    assert not re.search(r"(?<![\w.])/(work|home|tmp|root|usr)/", text)
    assert {o.output_type for o in outputs} <= {"display_data", "execute_result"}  # no prints, no warnings, no errors


def test_all_are_small():
    assert sum(script.with_suffix(".ipynb").stat().st_size for script in SCRIPTS) < 1_500_000


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_command_parses_and_every_link_leads_somewhere(script):
    for words in commands(script):
        if trains(words):
            check_job(words[0], *words[1:])
        elif len(words) > 2:
            command_line().parse_args(words)
    assert all((script.parent / name).exists() for name in re.findall(r"\]\(([\w/.-]+\.ipynb)\)", script.read_text()))


@pytest.fixture
def forked_kernels(tmp_path, monkeypatch, interpreter):
    """Kernels that begin with everything imported."""
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    words = [interpreter, "-c", KERNEL, "-f", "{connection_file}"]
    spec.write_text(json.dumps({"argv": words, "display_name": "Python 3", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_it_runs(script, tool, tmp_path, monkeypatch, request):
    """From an empty folder; it shows as many pictures as are kept, and does not warn, but of other packages' old names.

    The first two import all, as a user's do: losses alone, and a training run with its images.
    """
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    if script not in SCRIPTS[:2]:
        request.getfixturevalue("forked_kernels")
    (tmp_path / "here").mkdir()
    notebook = tool.read(script)
    said = tool.run(notebook, tmp_path / "here")
    assert len(pictures(notebook)) == len(pictures(written(script)))
    assert not [line for line in said.splitlines() if "Warning: " in line and "will be removed in v6" not in line]
