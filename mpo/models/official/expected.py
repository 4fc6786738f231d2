"""The expected tensors of a config and their shapes."""

from collections.abc import Mapping

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.modeling_utils import set_zero3_state

Shape = tuple[int, ...]


def expected_shapes(config: InternVLConfig) -> dict[str, Shape]:
    """Names on disk in transformers' format and shapes for a model of this config; nothing is allocated."""
    with torch.device("meta"), set_zero3_state():  # or ZeRO-3 would shard the parameters
        model = InternVLForConditionalGeneration(config)
    shapes: dict[str, Shape] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shapes |= _experts(_on_disk(name), tuple(tensor.shape))
    return shapes


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Check that a checkpoint has exactly the tensors of its config, with their shapes.

    Raises:
        ValueError: listing missing, unexpected and differently shaped tensors.
    """
    problems = misfits(found, expected)
    if problems:
        raise ValueError(f"{where} does not match its config.json: {problems}.")


def misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Describe missing, unexpected and differently shaped tensors; empty when there are none."""
    differing = [name for name in sorted(found.keys() & expected) if found[name] != expected[name]]
    problems = [
        listing("missing", sorted(expected.keys() - found.keys())),
        listing("not of this model", sorted(found.keys() - expected.keys())),
        listing("of another shape", [f"{name}: {found[name]}, expected {expected[name]}" for name in differing]),
    ]
    return "; ".join(filter(None, problems))


def listing(what: str, names: list[str], most: int = 8) -> str:
    """Describe the number of tensors, their problem and the first names; empty without names."""
    if not names:
        return ""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} {what} ({', '.join(names[:most])}{more})"


def _on_disk(name: str) -> str:
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    return name.replace("language_model.", "language_model.model.", 1) if name.startswith("language_model.") else name


def _experts(name: str, shape: Shape) -> dict[str, Shape]:
    """The experts of a layer: one tensor in memory, one per expert on disk."""
    if name.endswith(".experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), (shape[1] // 2, shape[2])
        return {f"{stem}{expert}.{part}_proj.weight": half for expert in range(shape[0]) for part in ("gate", "up")}
    if name.endswith(".experts.down_proj"):
        stem = name.removesuffix("down_proj")
        return {f"{stem}{expert}.down_proj.weight": shape[1:] for expert in range(shape[0])}
    return {name: shape}
