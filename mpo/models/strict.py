"""Refuse checkpoints whose tensors differ from the model's; transformers only warns and initializes missing ones at random."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from safetensors import SafetensorError
from transformers.utils import find_adapter_config_file

from mpo.io import read_json_object

Shape = tuple[int, ...]


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
        raise ValueError(f"A file of {name_or_path} is missing or cannot be read ({error}). Download it again.") from error
    problems = _problems(report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    if problems:
        raise ValueError(
            f"The weights in {name_or_path} do not fit {type(model).__name__} as its config.json describes it: {problems}. "
            f"{fix or 'Download the checkpoint again, all its files, or fix its config.json.'}"
        )
    return model


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Check that a checkpoint has exactly the tensors of its config, with their shapes.

    Raises:
        ValueError: listing missing, unexpected and differently shaped tensors.
    """
    if problems := misfits(found, expected):
        raise ValueError(f"{where} does not match its config.json: {problems}.")


def misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Describe missing, unexpected and differently shaped tensors; empty when there are none."""
    differing = [(name, found[name], expected[name]) for name in found.keys() & expected if found[name] != expected[name]]
    return _problems(expected.keys() - found, found.keys() - expected, differing)


def _problems(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[tuple[str, Any, Any]]) -> str:
    differing = [f"{name}: {tuple(found)}, expected {tuple(expected)}" for name, found, expected in mismatched]
    problems = []
    for what, names in (("missing", missing), ("not of this model", unexpected), ("of another shape", differing)):
        if names := sorted(names):
            problems.append(f"{len(names)} tensor{'s' * (len(names) > 1)} {what} ({shortened(names)})")
    return "; ".join(problems)


def shortened(names: list[str], most: int = 8) -> str:
    """The first names, and the number of others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


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
