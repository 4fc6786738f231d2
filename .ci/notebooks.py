"""Run examples/notebooks/*.py and write them, with what they show, as .ipynb beside.

    python .ci/notebooks.py [NAME ...]
"""

import os
import sys
import tempfile
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """A notebook of a py:percent file with its outputs, run by this Python in `folder`."""
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"  # the same in every run
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return notebook


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    names = sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.py"))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            notebook = executed(FOLDER / f"{name}.py", Path(folder))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
