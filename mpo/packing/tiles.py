"""How many tiles a prompt's images may be cut into: the processor's limits, the record's own, a budget for all its images."""

from collections.abc import Mapping
from typing import Any

from transformers import InternVLProcessor

from mpo.packing.streams import EPOCH

BUDGETS = ("prompt", "image")
"""Whose the processor's ``max_patches`` is: shared by a prompt's images, or each image's own."""
LIMITS = {"min": "min_patches", "max": "max_patches", "thumbnail": "use_thumbnail"}
"""Keys of a record's ``tiles``, and what the image processor calls them."""

AUGMENTED_AND_CACHED = (
    "Images of records with 'augment' are others in every epoch, and reference='cached' keeps log-probs by what images are. "
    "Use reference='live', or set 'augment' to false."
)


def splits_into_tiles(processing_class: Any) -> bool:
    """Whether a processor cuts images as InternVL's does."""
    return isinstance(processing_class, InternVLProcessor)


def tile_limits(
    record: Mapping[str, Any], images: int, processing_class: Any, where: str, *, budget: str = "prompt"
) -> dict[str, Any]:
    """What a prompt's images are to be cut with, where it is not what the processor does anyway.

    Args:
        record: may have ``tiles``, a dict with ``min``, ``max`` and ``thumbnail``, each of which may be missing or None.
        images: how many the prompt has.
        processing_class: a processor or tokenizer.
        where: what errors call the record.
        budget: ``"prompt"``: each of N images gets at most max(1, most // N) tiles, as in the official InternVL code;
            ``"image"``: each gets as many as a single one, as transformers' processor and TRL have it.

    Returns:
        keyword arguments of the processor.

    Raises:
        ValueError: for limits that make no sense, or a processor that does not cut images.
    """
    own = {name: value for name, value in (record.get("tiles") or {}).items() if value is not None}
    if not images:
        return {}
    if not splits_into_tiles(processing_class):
        if own:
            raise ValueError(
                f"{where} says how its images are cut into tiles, and {type(processing_class).__name__} does not cut images. "
                "Drop the column 'tiles'."
            )
        return {}
    unknown = own.keys() - LIMITS
    if unknown:
        raise ValueError(f"{where}: 'tiles' has {', '.join(LIMITS)}, each optional; got {sorted(unknown)}.")
    image_processor = processing_class.image_processor
    if "thumbnail" in own and not hasattr(image_processor, "use_thumbnail"):
        raise ValueError(
            f"{where}: 'tiles' has a thumbnail setting, which transformers' own processor ignores. Load the processor with "
            "mpo.models.loading.load_processor."
        )
    most = int(own.get("max", image_processor.max_patches))
    least = int(own.get("min", min(image_processor.min_patches, most)))
    if not 1 <= least <= most:
        raise ValueError(f"{where}: an image is cut into 1 <= min <= max tiles; got min {least}, max {most}.")
    if budget == "prompt":
        most = max(1, most // images)
    asked = {"min_patches": min(least, most), "max_patches": most}
    if "thumbnail" in own:
        asked["use_thumbnail"] = bool(own["thumbnail"])
    return {name: value for name, value in asked.items() if value != getattr(image_processor, name)}


def jpeg_seed(record: Mapping[str, Any], images: int, processing_class: Any, where: str, *, seed: int) -> dict[str, Any]:
    """With what seed a prompt's tiles are compressed, if they are to be: in training, when the record's ``augment`` is true.

    Args:
        record: one that is to be augmented has the epoch (`mpo.packing.streams.EPOCH`).
        images: how many the prompt has.
        processing_class: a processor or tokenizer.
        where: what errors call the record.
        seed: of the run.

    Returns:
        ``jpeg_seed``, or nothing. It is that of the epoch: what is drawn for an image depends on the image beside it.

    Raises:
        ValueError: for a processor that does not cut images.
    """
    if not images or not record.get("augment") or EPOCH not in record:
        return {}
    if not splits_into_tiles(processing_class):
        raise ValueError(
            f"{where} is to be augmented, tile by tile, and {type(processing_class).__name__} does not cut images into tiles. "
            "Drop the column 'augment'."
        )
    return {"jpeg_seed": (seed, int(record[EPOCH]))}
