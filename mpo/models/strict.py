"""Refuse checkpoints whose tensors differ from the model's; transformers only warns and initializes missing ones at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError
from transformers.utils import find_adapter_config_file

from mpo.io import read_json_object
from mpo.models.official.expected import listing


def load_strictly(load: Callable[..., Any], name_or_path: str, *, fix: str | None = None, **options: Any) -> Any:
    """Load a model, and refuse missing, unexpected or differently shaped tensors.

    Args:
        load: `from_pretrained`, or a function that passes its arguments to it.
        name_or_path: name or path of a checkpoint.
        fix: the remedy to name in the error message.
        options: arguments of `load`.

    Returns:
        the model.

    Raises:
        ValueError: for an adapter, for a missing or truncated file, or listing the missing, unexpected and differently shaped
            tensors. A missing tied head and tensors that a model is known to ignore are allowed.
    """
    refuse_adapter(name_or_path)
    try:
        model, report = load(name_or_path, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True})
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"A file of {name_or_path} is missing or cannot be read ({error}). Download the checkpoint again."
        ) from error
    differing = [f"{name}: {tuple(found)}, expected {tuple(expected)}" for name, found, expected in report["mismatched_keys"]]
    problems = [
        listing("missing", sorted(report["missing_keys"])),
        listing("not of this model", sorted(report["unexpected_keys"])),
        listing("of another shape", sorted(differing)),
    ]
    if any(problems):
        raise ValueError(
            f"The weights in {name_or_path} do not fit {type(model).__name__} as its config.json describes it: "
            + "; ".join(filter(None, problems))
            + f". {fix or 'Download the checkpoint again, all its files, or fix its config.json.'}"
        )
    return model


def refuse_adapter(name_or_path: Any) -> None:
    """Refuse an adapter where a model is expected; transformers would load it into its base, neither trained nor saved.

    Args:
        name_or_path: name or path of a checkpoint; a folder with ``adapter_config.json`` holds an adapter.

    Raises:
        ValueError: naming its base, and how to merge it or continue its training.
    """
    try:
        found = find_adapter_config_file(str(name_or_path))
    except OSError:  # neither a folder nor a name on the Hub: the loader reports it
        return
    if found is None:
        return
    base = read_json_object(found).get("base_model_name_or_path")
    raise ValueError(
        f"{name_or_path} is an adapter of {base or 'a base that its adapter_config.json does not name'}, not a model. To train "
        f"the two as one model, merge them and give the new folder: mpo export {name_or_path} NEW_FOLDER. To continue training "
        f"the adapter, pass MPOTrainer as model: PeftModel.from_pretrained(load_internvl({str(base or 'BASE')!r}), "
        f"{str(name_or_path)!r}, is_trainable=True). For a tokenizer or processor alone give {base or 'the base'}."
    )
