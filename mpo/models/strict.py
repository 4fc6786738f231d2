"""Refuse checkpoints whose files contradict each other; transformers chooses one, or only warns and initializes at random."""

import codecs
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, find_adapter_config_file

from mpo.io import BadRecord, read_json_object

Shape = tuple[int, ...]
ROPE = {
    "rope_theta",
    "partial_rotary_factor",
    *(f"{kind}factor" for kind in ("", "low_freq_", "high_freq_", "attention_", "short_", "long_")),
}
"""Settings of rotary embeddings that are positive numbers, or lists of them."""


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of a checkpoint; one that is cut off, has a byte order mark, or is not an object is a ValueError."""
    try:
        if Path(path).read_bytes().startswith(codecs.BOM_UTF8):  # transformers does not read it
            raise BadRecord(str(path), "it has a byte order mark.")
        return read_json_object(path)
    except BadRecord as error:
        raise ValueError(f"{error} Copy the file from the original again; it must be UTF-8 without a byte order mark.") from None


def read_config_json(path: str | Path) -> dict[str, Any]:
    """Read config.json of a checkpoint in either format.

    Raises ValueError as `read_json`; for two values of rope_theta in a part of it, and rope settings that are not above 0.
    """
    config = read_json(path)
    _check_rope(config, str(path))
    return config


def _check_rope(part: Mapping[str, Any], where: str) -> None:
    for name in ROPE & part.keys():
        for value in part[name] if isinstance(part[name], list) else [part[name]]:
            if isinstance(value, (int, float)) and not 0 < value < math.inf:  # NaN is not
                raise ValueError(f"{where}: expected {name} to be a number above 0; got {value}. Correct it.")
    ropes = [rope for rope in map(part.get, ("rope_scaling", "rope_parameters")) if isinstance(rope, Mapping)]
    thetas = [found["rope_theta"] for found in (part, *ropes) if isinstance(found.get("rope_theta"), (int, float))]
    if len(set(thetas)) > 1:
        raise ValueError(f"{where}: rope_theta is {' and '.join(map(str, thetas))}. Keep the value of the training.")
    kinds = [{"rope_type": rope.get("type", "default"), **rope, "type": None, "rope_theta": None} for rope in ropes]
    if kinds and kinds[0] != kinds[-1]:
        raise ValueError(f"{where}: rope_scaling={ropes[0]} and rope_parameters={ropes[1]} differ. Keep the one of the training.")
    for found in part.values():
        if isinstance(found, Mapping):
            _check_rope(found, where)


def read_index(path: Path) -> dict[str, str]:
    """Read which file of a checkpoint holds each tensor.

    Refused are a ``weight_map`` that is missing or does not name files of its folder, and an index beside a file with all tensors:
    readers choose differently.
    """
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) and Path(name).name == name for name in where.values()):
        raise ValueError(
            f"{path}: expected weight_map to map tensors to file names; got {shorten(repr(where), 60)}. Copy the file again."
        )
    if (whole := path.with_name(SAFE_WEIGHTS_NAME)).exists() and SAFE_WEIGHTS_NAME not in where.values():
        raise ValueError(f"{path} and {whole} hold the weights twice. Remove the one that is not of this model.")
    return where


def read_hf_config(name_or_path: str | Path, **options: Any) -> Any:
    """`AutoConfig.from_pretrained`; a ValueError names the file of values that transformers or `read_config_json` refuses."""
    if (path := cached_file(name_or_path, "config.json")) is not None:
        read_config_json(path)
    elif Path(name_or_path).is_dir():
        started = sorted(Path(name_or_path).glob("checkpoint-*/config.json"))
        advice = f"a checkpoint of its run, such as {started[-1].parent}" if started else "the folder of a checkpoint"
        raise ValueError(f"{name_or_path} has no config.json: it is not a model. Give {advice}, or finish the run that writes it.")
    try:
        config = AutoConfig.from_pretrained(name_or_path, **options)
        if config.model_type == "internvl":  # transformers notices in the forward pass
            layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
            if layer not in (*range(-layers, 0), *range(1, layers + 1)):
                raise ValueError(f"vision_feature_layer={layer} is not one of {layers} layers")
        return config
    except OSError:
        raise
    except Exception as error:  # of any kind: a config class runs on whatever the file holds
        found = read_json(str(cached_file(name_or_path, "config.json")))
        dtypes = re.findall(r"'(?:torch_)?dtype': '(?!float|bfloat)[^']*'", str(found))
        reason = f"{dtypes[0]} is not the name of a dtype" if dtypes else f"transformers cannot read it: {error!r}"
        raise ValueError(f"{name_or_path}, config.json: {reason}. Copy the file from the original, or correct it.") from error


def load_strictly(load: Callable[..., Any], name_or_path: str, *, fix: str | None = None, **options: Any) -> Any:
    """Load a model by `load` (`from_pretrained`), and refuse missing, unexpected or differently shaped tensors, which are listed.

    A missing tied head and tensors that a model is known to ignore are allowed. Raises ValueError also for an adapter, a missing or
    truncated file, and a tied tensor with values of its own.
    """
    refuse_adapter(name_or_path)
    if (index := Path(name_or_path) / SAFE_WEIGHTS_INDEX_NAME).is_file():
        read_index(index)
    try:
        model, report = load(name_or_path, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"A file of {name_or_path} is missing or cannot be read ({error}). Download it again.") from error
    except (AttributeError, KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(f"The config.json of {name_or_path} does not describe a model: {error!r}. Correct its values.") from error
    problems = _problems(report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])
    if problems:
        raise ValueError(
            f"The weights in {name_or_path} do not fit {type(model).__name__} as its config.json describes it: {problems}. "
            f"{fix or 'Download the checkpoint again, all its files, or fix its config.json.'}"
        )
    for head, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(head) is not model.get_parameter_or_buffer(source):  # transformers only warns
            raise ValueError(
                f"{name_or_path} holds {head} and {source}, which differ, but its config.json ties the two. To keep both set "
                "tie_word_embeddings to false, in text_config too; otherwise remove the first from the weights."
            )
    return model


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Refuse a checkpoint that has not exactly the tensors of its config, with their shapes; those that differ are listed."""
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

    The error names its base, and how to merge it or continue its training.
    """
    try:
        found = find_adapter_config_file(str(name_or_path))
    except OSError:  # neither a folder nor a name on the Hub: the loader reports it
        return
    if found is None:
        return
    base = read_json(found).get("base_model_name_or_path")
    raise ValueError(
        f"{name_or_path} is an adapter of {base or 'a base that its adapter_config.json does not name'}, not a model. To train "
        f"the two as one model, merge them and give the new folder: mpo export {name_or_path} NEW_FOLDER. To continue training "
        f"the adapter in Python, give the trainer as model: PeftModel.from_pretrained(load_internvl({str(base or 'BASE')!r}), "
        f"{str(name_or_path)!r}, is_trainable=True). For a tokenizer or processor alone give {base or 'the base'}."
    )
