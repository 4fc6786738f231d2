"""Which tensors a checkpoint of a config has, with their shapes."""

from collections.abc import Mapping

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration
from transformers.modeling_utils import set_zero3_state

Shape = tuple[int, ...]


def expected_shapes(config: InternVLConfig) -> dict[str, Shape]:
    """Names and shapes in transformers' files for a model of this config; nothing is allocated."""
    with torch.device("meta"), set_zero3_state():  # or its parts would be shared out when the run has ZeRO-3
        model = InternVLForConditionalGeneration(config)
    shapes: dict[str, Shape] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shapes |= _experts(_on_disk(name), tuple(tensor.shape))
    return shapes


def check_shapes(found: Mapping[str, Shape], expected: Mapping[str, Shape], where: str) -> None:
    """Check that a checkpoint has the tensors of its config, no others, in their shapes.

    Raises:
        ValueError: listing what is missing, too much, or of another shape.
    """
    problems = misfits(found, expected)
    if problems:
        raise ValueError(f"{where} and its config.json do not fit: {problems}.")


def misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> str:
    """Which tensors are missing, too much, or of another shape, in words; empty when they are as expected."""
    differing = [name for name in sorted(found.keys() & expected) if found[name] != expected[name]]
    problems = [
        listing("missing", sorted(expected.keys() - found.keys())),
        listing("not of this model", sorted(found.keys() - expected.keys())),
        listing("of another shape", [f"{name}: {found[name]}, expected {expected[name]}" for name in differing]),
    ]
    return "; ".join(filter(None, problems))


def listing(what: str, names: list[str], most: int = 8) -> str:
    """How many tensors, what is wrong with them, and the first names; empty without any."""
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
    """In memory the experts of a layer are one tensor, on disk each has its own."""
    if name.endswith(".experts.gate_up_proj"):
        stem, half = name.removesuffix("gate_up_proj"), (shape[1] // 2, shape[2])
        return {f"{stem}{expert}.{part}_proj.weight": half for expert in range(shape[0]) for part in ("gate", "up")}
    if name.endswith(".experts.down_proj"):
        stem = name.removesuffix("down_proj")
        return {f"{stem}{expert}.down_proj.weight": shape[1:] for expert in range(shape[0])}
    return {name: shape}
