"""Open a trained model for generation in this process, by the name or path that a user gives."""

from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME

from mpo.generation.local import LocalGenerator
from mpo.models.fit import check_fit
from mpo.models.loading import load_model, set_tiles


def open_local(
    name_or_path: str,
    *,
    base: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    max_tiles: int | None = None,
) -> LocalGenerator:
    """Load a model, or an adapter on its base, and its processor.

    The adapter of a QLoRA run is loaded on the base's original weights, as `mpo export` does.

    Args:
        name_or_path: a folder or a name on the Hub, in either format; the folder of an adapter; or of a run or its checkpoint.
        base: name or path of an adapter's base, if not as in its config.
        dtype: as in `mpo.models.loading.load_model`; of an adapter: of its base.
        device: such as ``"cpu"`` or ``"cuda:1"``; None for the first accelerator, if there is one.
        max_tiles: as in `load_model`.

    Raises:
        ValueError: for a model or a device that cannot be used.
    """
    where = usable_device(device)
    if is_adapter(name_or_path):
        from mpo.models.export.trained import open_trained  # loads the code of export

        trained = open_trained(Path(name_or_path), base=base)
        processor = trained.processor()
        set_tiles(processor, None, max_tiles)
        model: Any = trained.load(dtype)
    elif base is not None:
        raise ValueError(f"base={base} needs the folder of an adapter, and {name_or_path} is none. Leave it out.")
    else:
        loaded = load_model(name_or_path, dtype=dtype, max_tiles=max_tiles)
        model, processor = loaded.model, loaded.processor
    check_fit(model, processor)
    return LocalGenerator(model.to(where).eval(), processor)


def is_adapter(name_or_path: str) -> bool:
    """Whether it is the folder of an adapter, or of a run or a checkpoint that may hold one."""
    folder = Path(name_or_path)
    return folder.is_dir() and ((folder / CONFIG_NAME).exists() or not (folder / "config.json").exists())


def usable_device(name: str | None) -> torch.device:
    """The device of a name; without one, the first accelerator, or the CPU. Raises ValueError for one that is not here."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    usable = ["cpu"]
    if accelerator is not None:
        usable += [accelerator.type, *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in usable:
        raise ValueError(f"Expected the device to be one of {', '.join(usable)}; got {name!r}.")
    return torch.device(name)
