"""Write and read what a checkpoint holds beyond transformers' files, and load its weights strictly."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerState

from mpo.io import flush, replacing, write_text
from mpo.models.strict import load_strictly

STATE_FILE = "mpo_state.json"
MARKER = "trainer_state.json"
"""Last file of a checkpoint: a folder that has it is complete."""


def load_weights(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Load all weights saved in `folder` into `model`.

    transformers' Trainer loads the saved names unchanged and not strictly. For models whose names on disk differ from those in
    memory (InternVL's `language_model.model.*`) it would load nothing and continue with the current weights.

    Raises:
        ValueError: for a missing or unexpected tensor, or one of another shape.
    """
    if not (Path(folder) / "config.json").exists():  # transformers would build a model of a default config
        raise ValueError(f"{folder} has no config.json, so it holds no model. Resume from another checkpoint.")
    dtypes = {value.dtype for value in model.state_dict().values() if value.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32  # float32 holds bfloat16 and float16 exactly
    fix = "Resume with the model this run started from."
    loaded = load_strictly(type(model).from_pretrained, str(folder), fix=fix, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), strict=True)


def check_adapter(model: PeftModel, folder: str | os.PathLike[str]) -> None:
    """Check that the adapters saved in `folder` have exactly the tensors of `model`'s. peft loads those that match.

    Raises ValueError for a missing or unexpected tensor, or one of another shape.
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
                f"The adapter in {place} does not match this run's: only one of them has "
                f"{wrong[:4]}{' ...' if len(wrong) > 4 else ''}. "
                "Resume with the adapter configuration (rank, target modules) of the saved run."
            )


def begin_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Make a folder incomplete, on disk too, before a checkpoint is written into it: it may hold an earlier one."""
    marker = Path(folder, MARKER)
    if marker.exists():
        marker.unlink()
        flush(marker.parent)


def finish_checkpoint(state: TrainerState, path: str | os.PathLike[str]) -> None:
    """Write `state` to `path`, the last file of a checkpoint, once all other files are on disk, and flush it."""
    marker = Path(path)
    flush_to_disk(marker.parent)
    with replacing(marker) as temporary:
        type(state).save_to_json(state, str(temporary))
        flush(temporary)
    for folder in (marker.parent, marker.parent.parent):
        flush(folder)


def flush_to_disk(folder: str | os.PathLike[str]) -> None:
    """Flush all files under a folder to disk, so that they survive a power failure."""
    for place in (*Path(folder).rglob("*"), Path(folder)):
        flush(place)


def save_state(folder: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` into a checkpoint folder atomically."""
    write_text(Path(folder) / STATE_FILE, json.dumps(state, indent=2))


def load_state(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote. Raises ValueError when the folder is not a checkpoint of this trainer."""
    path = Path(folder) / STATE_FILE
    if not path.exists():
        raise ValueError(
            f"{folder} has no {STATE_FILE}, so it is not a checkpoint of MPOTrainer and its reward shift is unknown. "
            "To train from its weights, pass the folder as the model instead of resuming from it."
        )
    try:
        state: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path, error) from error
    return state


def _damaged(path: Path, error: object) -> ValueError:
    return ValueError(f"{path} is damaged ({error}), so {path.parent} cannot be resumed from. Resume from another checkpoint.")


def _check_files(folder: str) -> None:
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):  # torch.save writes zip files
            raise _damaged(path, "not the whole of what torch.save wrote")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                raise _damaged(path, error) from error


def complete_checkpoint(run_dir: str | os.PathLike[str], asked: str | os.PathLike[str] | None = None) -> str:
    """Return the checkpoint to resume from: `asked`, or the newest complete one in `run_dir`.

    Raises ValueError when there is none, or it is incomplete, a file is truncated, or the optimizer, scheduler or random states are
    missing.
    """
    folder = latest_checkpoint(run_dir) if asked is None else str(asked)
    if folder is None:
        raise ValueError(f"There is no complete checkpoint in {run_dir}. Leave resume_from_checkpoint out to start a new run.")
    if not _is_complete(Path(folder)):
        newest = latest_checkpoint(Path(folder).parent)
        raise ValueError(
            f"{folder} is not a complete checkpoint (trainer_state.json is missing or damaged). "
            + (f"The newest complete one is {newest}." if newest else "There is no complete one in its folder.")
        )
    load_state(folder)
    # transformers would silently continue without these. DeepSpeed keeps the first two in files of its own.
    needed = ("rng_state*",) if any(Path(folder).glob("global_step*")) else ("optimizer*", "scheduler.pt", "rng_state*")
    missing = [pattern for pattern in needed if not any(Path(folder).glob(pattern))]
    if missing:
        raise ValueError(
            f"{folder} has weights but no {', '.join(missing)} (save_only_model=True writes none), so the run cannot be "
            "continued. Resume from another checkpoint, or pass the folder as the model of a new run."
        )
    _check_files(folder)
    return folder


def latest_checkpoint(run_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest complete checkpoint in `run_dir`, or None.

    A folder whose `MARKER` is missing or damaged was interrupted.
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
