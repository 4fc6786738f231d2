"""LiveCurves: what is logged is drawn; in a notebook one picture is updated."""

import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from mpo.training.curves import LiveCurves

pytest.importorskip("matplotlib")
LOGS = [{"loss": 3.0, "loss/sft": 2.0}, {"loss": 2.0, "loss/sft": 1.5}, {"eval_loss": 2.5}]


def log(curves, state, step, line):
    """As a trainer does."""
    state.global_step = step
    state.log_history.append({**line, "step": step})
    curves.on_log(None, state, TrainerControl(), logs=line)


def logged(curves, logs=LOGS, before=()):
    state = TrainerState(max_steps=30, log_history=list(before))
    for step, line in enumerate(logs, start=len(before) + 1):
        log(curves, state, step, line)
    return curves


def line_of(curves):
    (axes,) = curves.figure().axes
    return axes.lines[0].get_xydata().tolist()


def test_every_logged_metric_is_a_line():
    """The panels without metrics are left out, and eval_loss has its own steps."""
    figure = logged(LiveCurves()).figure()
    lines = {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.lines}
    assert [axes.get_title() for axes in figure.axes] == ["loss", "terms of the loss"]
    assert lines == {"loss": [[1, 3], [2, 2]], "eval_loss": [[3, 2.5]], "loss/sft": [[1, 2], [2, 1.5]]}
    assert figure.get_suptitle() == "step 3 of 30"


def test_a_second_run_starts_anew():
    curves = logged(logged(LiveCurves({"loss": ["loss"]})), [{"loss": 1.0}])
    assert line_of(curves) == [[1, 1]]


def test_a_resumed_run_shows_what_it_logged_before():
    assert line_of(logged(LiveCurves({"loss": ["loss"]}), [{"loss": 1.0}], before=[{"loss": 2.0, "step": 1}])) == [[1, 2], [2, 1]]


def test_two_trainers_do_not_mix():
    """The second one logs between two lines of the first."""
    curves, first, second = LiveCurves({"loss": ["loss"]}), TrainerState(), TrainerState()
    for step, state in enumerate((first, second, first), start=1):
        log(curves, state, step, {"loss": float(step)})
    assert line_of(curves) == [[1, 1], [3, 3]]


def test_a_trainer_of_transformers(tmp_path):
    """Evaluated before, trained, and resumed by another trainer: each figure is that of its run."""

    def trainer(steps):
        class Model(torch.nn.Linear):
            def forward(self, labels):
                return {"loss": super().forward(labels).square().mean()}

        torch.manual_seed(0)
        data = [{"labels": torch.ones(2)}] * 4
        args = TrainingArguments(
            str(tmp_path), report_to="none", max_steps=steps, save_steps=2, logging_steps=1, use_cpu=True, disable_tqdm=True
        )
        return Trainer(Model(2, 1), args, train_dataset=data, eval_dataset=data, callbacks=[curves])

    curves = LiveCurves({"loss": ["eval_loss", "loss"]})
    first = trainer(2)
    first.evaluate()
    assert [step for step, _ in line_of(curves)] == [0] and curves.figure().get_suptitle() == "step 0"
    first.train()
    before = line_of(curves)
    trainer(4).train(resume_from_checkpoint=True)
    assert [step for step, _ in line_of(curves)] == [1, 2, 3, 4] and line_of(curves)[:2] == before
    first.evaluate()
    (axes,) = curves.figure().axes
    assert [[step for step, _ in line.get_xydata().tolist()] for line in axes.lines] == [[2], [1, 2]]


def test_it_is_drawn_within_a_tenth_of_the_time(monkeypatch):
    """A log a second, and a drawing takes half a second: it is drawn at the first log, every five seconds, and at the end."""
    pytest.importorskip("IPython")
    now, drawn = [100.0], []

    class Handle:
        def update(self, image):
            now[0] += 0.5
            drawn.append(state.global_step)

    def display(image, display_id):
        handle = Handle()
        handle.update(image)
        return handle

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("IPython.get_ipython", lambda: type("Shell", (), {"kernel": True}))
    monkeypatch.setattr("IPython.display.display", display)
    curves, state = LiveCurves(), TrainerState(max_steps=12)
    for step in range(1, 13):
        now[0] += 1
        log(curves, state, step, {"loss": 1.0})
    assert drawn == [1, 6, 11]
    curves.on_train_end(None, state, TrainerControl())
    assert drawn == [1, 6, 11, 12]
    log(curves, state, 12, {"eval_loss": 1.0})
    curves.on_evaluate(None, state, TrainerControl())
    assert len(drawn) == 5


def test_metrics_that_are_no_list():
    with pytest.raises(ValueError, match="'gap'; got 'margins'"):
        LiveCurves({"gap": "margins"})


def test_nothing_is_logged_yet():
    assert LiveCurves().figure()._repr_png_()[:4] == b"\x89PNG"


NOTEBOOK = """
from transformers import TrainerControl, TrainerState
from mpo.training.curves import LiveCurves
curves, state = LiveCurves(), TrainerState(max_steps=3)
for state.global_step in (1, 2, 3):
    state.log_history.append({"loss": 1.0 / state.global_step, "step": state.global_step})
    curves.on_log(None, state, None)
curves.on_train_end(None, state, None)
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
