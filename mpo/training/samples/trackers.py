"""Show sampled responses as text or tables in the trackers of a run (`report_to`); their numbers are logged by the trainer.

Checked against transformers 5.24: `TensorBoardCallback.tb_writer`, and that its callbacks for wandb, trackio and swanlab log to the
run that is open in the process.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import SwanLabCallback, TensorBoardCallback, TrackioCallback, WandbCallback

Rows = Sequence[Mapping[str, Any]]
NAME = "samples"


def show_in_trackers(callbacks: Iterable[TrainerCallback], step: int, rows: Rows) -> None:
    """Send a step's responses, rows of the same keys, to each tracker among a trainer's callbacks."""
    for callback in callbacks:
        for kind, show in _SHOW.items():
            if isinstance(callback, kind):
                show(callback, step, rows)


def markdown(rows: Rows) -> str:
    r"""Format rows as a Markdown table.

    >>> print(markdown([{"id": "a", "response": "one|two"}]))
    | id | response |
    |---|---|
    | a | one\|two |
    """
    names = list(rows[0])
    lines = [names, *([_cell(row[name]).replace("|", "\\|") for name in names] for row in rows)]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([table[0], "|" + "---|" * len(names), *table[1:]])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return " ".join(", ".join(value).split() if isinstance(value, list) else str(value).split())


def _tensorboard(callback: Any, step: int, rows: Rows) -> None:
    if callback.tb_writer is not None:
        callback.tb_writer.add_text(NAME, markdown(rows), step)


def _wandb(callback: Any, step: int, rows: Rows) -> None:
    import wandb  # type: ignore[import-not-found, unused-ignore]

    table = wandb.Table(columns=list(rows[0]), data=[[_plain(value) for value in row.values()] for row in rows])
    wandb.log({NAME: table, "train/global_step": step})


def _trackio(callback: Any, step: int, rows: Rows) -> None:
    import pandas  # type: ignore[import-untyped, unused-ignore]
    import trackio  # type: ignore[import-not-found, unused-ignore]

    table = trackio.Table(dataframe=pandas.DataFrame([{name: _plain(value) for name, value in row.items()} for row in rows]))
    trackio.log({NAME: table, "train/global_step": step})


def _swanlab(callback: Any, step: int, rows: Rows) -> None:
    import swanlab  # type: ignore[import-not-found, unused-ignore]

    swanlab.log({NAME: [swanlab.Text(row["response"], caption=str(row["id"])) for row in rows]}, step=step)


def _plain(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value


_SHOW = {TensorBoardCallback: _tensorboard, WandbCallback: _wandb, TrackioCallback: _trackio, SwanLabCallback: _swanlab}
