"""A checkpoint has the tensors of its model, or it is refused: transformers warns and draws what is missing at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from mpo.models.official.expected import listing


def load_strictly(load: Callable[..., Any], name_or_path: str, *, mend: str | None = None, **options: Any) -> Any:
    """Load a model as a whole, from tensors that are all its own.

    Args:
        load: `from_pretrained`, or a function that hands its arguments on to it.
        name_or_path: of a checkpoint.
        mend: what to do about tensors that do not fit.
        options: of `load`.

    Returns:
        the model.

    Raises:
        ValueError: for a file that is missing or cut, or listing the tensors that are missing, too much, or of another shape. A
            tied head that is left out and tensors that a model is known to drop are none of these.
    """
    try:
        model, report = load(name_or_path, **{**options, "output_loading_info": True, "ignore_mismatched_sizes": True})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"A file of {name_or_path} is missing or cannot be read ({error}). Download it again.") from error
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
            + f". {mend or 'Download the checkpoint again, all its files, or mend its config.json.'}"
        )
    return model
