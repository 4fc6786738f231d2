"""What a checkpoint holds beyond transformers' own, and how its weights are read back: strictly."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel, TrainerState

from mpo.models.strict import load_strictly

STATE_FILE = "mpo_state.json"
MARKER = "trainer_state.json"
"""The last file of a checkpoint: it is complete where this is."""


def load_weights(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Put the weights saved in `folder` into `model`, every one of them.

    transformers' Trainer loads the saved names as they stand and not strictly. Models whose names on disk differ from
    those in memory (InternVL's `language_model.model.*`) then match nothing and go on with the weights they had.

    Raises:
        ValueError: when a tensor is missing, left over or of another shape.
    """
    if not (Path(folder) / "config.json").exists():  # transformers would build a model of a default config, of any size
        raise ValueError(f"{folder} has no config.json, so no model was saved there. Resume from another checkpoint.")
    dtypes = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # float32 holds bfloat16 and float16 exactly
    fix = "Resume with the model this run started from."
    loaded = load_strictly(type(model).from_pretrained, str(folder), fix=fix, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), strict=True)


def check_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Check that the adapters saved in `folder` have exactly the tensors of `model`'s. peft itself takes what fits.

    Raises:
        ValueError: when a tensor is missing, left over or of another shape.
    """
    for name in model.peft_config:
        place = Path(folder) if name == "default" else Path(folder, name)
        if not (place / SAFETENSORS_WEIGHTS_NAME).exists():
            if name == "default":
                raise ValueError(f"{folder} holds no adapter ({SAFETENSORS_WEIGHTS_NAME}), and this run trains one.")
            continue
        with safe_open(place / SAFETENSORS_WEIGHTS_NAME, "pt") as saved:
            found = {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
        expected = {key: tuple(value.shape) for key, value in get_peft_model_state_dict(model, adapter_name=name).items()}
        if found != expected:
            wrong = sorted(found.items() ^ expected.items())
            raise ValueError(
                f"The adapter in {place} does not fit this run's: {wrong[:4]}{' ...' if len(wrong) > 4 else ''} are on one side "
                "only. Resume with the adapter configuration (rank, target modules) that the run started with."
            )


def begin_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Make a folder that is about to be written not count as a checkpoint, on disk too. One that is written anew may hold one."""
    marker = Path(folder, MARKER)
    if marker.exists():
        marker.unlink()
        _flush(marker.parent)


def finish_checkpoint(state: TrainerState, path: str | os.PathLike[str]) -> None:
    """Write `state` as the marker of the checkpoint at `path`, after all else there is on disk, and itself to disk."""
    marker = Path(path)
    flush_to_disk(marker.parent)
    aside = marker.with_suffix(".tmp")
    type(state).save_to_json(state, str(aside))
    _flush(aside)
    aside.replace(marker)
    for folder in (marker.parent, marker.parent.parent):
        _flush(folder)


def flush_to_disk(folder: str | os.PathLike[str]) -> None:
    """Have the system write all files under a folder to disk, so that a power cut takes none of them away."""
    for place in (*Path(folder).rglob("*"), Path(folder)):
        _flush(place)


def _flush(place: Path) -> None:
    if os.name == "nt":  # opens no folders, and flushes no file that was opened for reading
        return
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def complete_checkpoint(run_dir: str | os.PathLike[str], asked: str | os.PathLike[str] | None = None) -> str:
    """The checkpoint to resume from: the one asked for, or the newest in `run_dir`.

    Raises:
        ValueError: when there is none, or it was not written to its end, or holds no optimiser.
    """
    folder = latest_checkpoint(run_dir) if asked is None else str(asked)
    if folder is None:
        raise ValueError(
            f"There is no complete checkpoint in {run_dir} to resume from. Train without resume_from_checkpoint to start afresh."
        )
    if not _is_complete(Path(folder)):
        newest = latest_checkpoint(Path(folder).parent)
        raise ValueError(
            f"{folder} is not a checkpoint that was written to its end (trainer_state.json is missing or cut). "
            + (f"The newest complete one there is {newest}." if newest else "There is no complete one beside it.")
        )
    load_state(folder)
    # transformers would go on without any of these, and say nothing. DeepSpeed has its own place for the first two.
    needed = ("rng_state*",) if any(Path(folder).glob("global_step*")) else ("optimizer*", "scheduler.pt", "rng_state*")
    missing = [pattern for pattern in needed if not any(Path(folder).glob(pattern))]
    if missing:
        raise ValueError(
            f"{folder} has weights but no {', '.join(missing)} (save_only_model=True writes none), so the run cannot go on as it "
            "was. Resume from another checkpoint, or pass the folder as the model to begin a new run from its weights."
        )
    return folder


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in `run_dir` that was written to its end, or None.

    `MARKER` is the last file of a checkpoint; a folder in which it is missing or cut was interrupted.
    """
    folders = [folder for folder in Path(run_dir).glob("checkpoint-*") if folder.name.split("-")[-1].isdigit()]
    newest_first = sorted(folders, key=lambda folder: int(folder.name.split("-")[-1]), reverse=True)
    return next((str(folder) for folder in newest_first if _is_complete(folder)), None)


def _is_complete(folder: Path) -> bool:
    try:
        json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return True
