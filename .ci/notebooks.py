"""Run examples/notebooks/*.py and write them, with what they show, as .ipynb beside.

    python .ci/notebooks.py [NAME ...]

Progress bars and what goes to stderr are left out, as they name this machine; stderr is printed here. Pictures get 256 colours.
"""

import base64
import os
import sys
import tempfile
from io import BytesIO
from pathlib import Path

import jupytext
import nbclient
import nbformat
from PIL import Image

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
BAR = "application/vnd.jupyter.widget-view+json"


def read(path: Path) -> nbformat.NotebookNode:
    """The notebook of a py:percent file, the same in every call."""
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"
        cell.metadata = {}
    return notebook


def run(notebook: nbformat.NotebookNode, folder: Path) -> str:
    """Run a notebook with this Python in `folder`; its cells get their outputs. Returns what went to stderr."""
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, store_widget_state=False)
    client.execute()
    said = []
    for cell in notebook.cells:
        cell.metadata = {}  # times of day
        outputs = cell.get("outputs", [])
        said += [one.text for one in outputs if one.output_type == "stream" and one.name == "stderr"]
        kept = [one for one in outputs if one.get("name") != "stderr" and BAR not in one.get("data", {})]
        for data in (one["data"] for one in kept if "image/png" in one.get("data", {})):
            data["image/png"] = with_256_colours(data["image/png"])
        if cell.cell_type == "code":
            cell.outputs = kept
    return "".join(said)


def with_256_colours(png: str) -> str:
    """A PNG in Base64, a third as large."""
    small = BytesIO()
    Image.open(BytesIO(base64.b64decode(png))).convert("RGB").quantize(256).save(small, format="png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in sys.argv[1:] or sorted(path.stem for path in FOLDER.glob("*.py")):
        notebook = read(FOLDER / f"{name}.py")
        before = sum(os.times()[2:4])
        with tempfile.TemporaryDirectory() as folder:
            said = run(notebook, Path(folder))
        print(f"{name}: {sum(os.times()[2:4]) - before:.0f} CPU seconds\n{said}", file=sys.stderr)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
