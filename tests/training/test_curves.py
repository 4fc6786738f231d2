"""LiveCurves: what is logged is drawn; in a notebook one picture is updated."""

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from mpo.training.curves import LiveCurves

pytest.importorskip("matplotlib")
LOGS = [{"loss": 3.0, "loss/sft": 2.0}, {"loss": 2.0, "loss/sft": 1.5}, {"eval_loss": 2.5}]


def logged(curves, tmp_path, logs=LOGS):
    args, state = TrainingArguments(str(tmp_path), report_to="none"), TrainerState(max_steps=30)
    curves.on_train_begin(args, state, TrainerControl())
    for step, line in enumerate(logs, start=1):
        state.global_step = step
        curves.on_log(args, state, TrainerControl(), logs=line)
    return curves


def test_every_logged_metric_is_a_line(tmp_path):
    """The panels without metrics are left out, and eval_loss has its own steps."""
    figure = logged(LiveCurves(), tmp_path).figure()
    lines = {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.lines}
    assert [axes.get_title() for axes in figure.axes] == ["loss", "terms of the loss"]
    assert lines == {"loss": [[1, 3], [2, 2]], "eval_loss": [[3, 2.5]], "loss/sft": [[1, 2], [2, 1.5]]}
    assert figure.get_suptitle() == "step 3 of 30"


def test_a_second_run_starts_anew(tmp_path):
    curves = logged(logged(LiveCurves({"loss": ["loss"]}), tmp_path), tmp_path, [{"loss": 1.0}])
    (axes,) = curves.figure().axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 1]]


def test_nothing_is_logged_yet():
    assert LiveCurves().figure()._repr_png_()[:4] == b"\x89PNG"


NOTEBOOK = """
from transformers import TrainerControl, TrainerState
from mpo.training.curves import LiveCurves
curves, state = LiveCurves(), TrainerState(max_steps=3)
curves.on_train_begin(None, state, None)
for state.global_step in (1, 2, 3):
    curves.on_log(None, state, None, logs={"loss": 1.0 / state.global_step})
"""
FIGURE = "from mpo.figure import new_figure\nfigure = new_figure(2, 2)\nfigure.subplots().plot([1, 2])\nfigure"


@pytest.mark.slow
def test_in_a_notebook(tmp_path):
    """Three logs are one output; a figure that is the value of a cell is shown, also where nobody imported pyplot."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = [nbformat.v4.new_code_cell(code) for code in (FIGURE, NOTEBOOK)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    for cell in notebook.cells:
        assert ["image/png" in one.data for one in cell.outputs if one.output_type != "stream"] == [True]
