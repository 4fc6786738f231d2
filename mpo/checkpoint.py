"""What a checkpoint holds beyond transformers' own, and how its weights are read back: strictly."""

import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

STATE_FILE = "mpo_state.json"


def load_weights(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Put the weights saved in `folder` into `model`, every one of them.

    transformers' Trainer loads the saved names as they stand and not strictly. Models whose names on disk differ from
    those in memory (InternVL's `language_model.model.*`) then match nothing and go on with the weights they had.

    Raises:
        ValueError: when a tensor is missing, left over or of another shape.
    """
    loaded, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    wrong = {name: sorted(map(str, keys)) for name, keys in report.items() if keys}
    if wrong:
        raise ValueError(
            f"The weights in {folder} do not fit {type(model).__name__}: "
            + "; ".join(f"{name} {keys[:5]}{' ...' if len(keys) > 5 else ''}" for name, keys in wrong.items())
            + ". Resume with the model this run started from."
        )
    model.load_state_dict(loaded.state_dict(), strict=True)


def save_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` into a checkpoint folder, aside first and renamed whole."""
    path = Path(folder) / STATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(state, indent=2))
    aside.replace(path)


def load_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: when the folder has no such file: it is not a checkpoint of this trainer.
    """
    path = Path(folder) / STATE_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} has no {STATE_FILE}, so it is not a checkpoint of MPOTrainer and its reward shift is unknown. "
            "To start from its weights, pass the folder as the model instead of resuming from it."
        )
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in `run_dir` that was written to its end, or None.

    `trainer_state.json` is the last file of a checkpoint; a folder in which it is missing or cut was interrupted.
    """
    folders = [folder for folder in Path(run_dir).glob("checkpoint-*") if folder.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name.split("-")[-1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return str(folder)
    return None
