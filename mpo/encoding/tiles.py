"""Tile limits of a prompt's images: the processor's, the record's own, shared or not; and the tokens and tiles of an image."""

import copy
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any

from mpo.data.records import checked_tiles
from mpo.encoding.chat import check_processor
from mpo.models.family import family_of_processor
from mpo.schema import EPOCH

Limits = tuple[tuple[str, Any], ...]
BUDGETS = ("prompt", "image")
"""Whether the processor's ``max_patches`` is shared by a prompt's images or applies to each image."""
LIMITS = {"min": "min_patches", "max": "max_patches", "thumbnail": "use_thumbnail"}
"""Keys of a record's ``tiles`` -> the image processor's names."""

_AUGMENTED = (
    "Images of records with 'augment' change every epoch, and {}='cached' stores {} by the content of images. "
    "Use {}='live', or set 'augment' to false."
)
AUGMENTED_AND_CACHED = _AUGMENTED.format("reference", "log-probs", "reference")
AUGMENTED_FEATURES = _AUGMENTED.format("vision_features", "features", "vision_features")


def splits_into_tiles(processing_class: Any) -> bool:
    """Whether a processor splits images into tiles as InternVL's does."""
    return family_of_processor(processing_class).tiled


def tile_size(processing_class: Any) -> tuple[int, int] | None:
    """Height and width, in pixels, of all tiles, or of all images if these are not split; None if they vary or are not known."""
    if not family_of_processor(processing_class).one_size:
        return None
    images = processing_class.image_processor
    size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
    return (size["height"], size["width"]) if size and size.get("height") and size.get("width") else None


def tile_limits(
    record: Mapping[str, Any], images: int, processing_class: Any, where: str, *, budget: str = "prompt"
) -> dict[str, Any]:
    """The tile limits of a prompt's images that differ from the processor's, as keyword arguments for it.

    Args:
        record: may have ``tiles``, a dict with ``min``, ``max`` and ``thumbnail``, each of which may be missing or None.
        images: number of images of the prompt.
        budget: ``"prompt"``: each of N images gets at most max(1, max_patches // N) tiles, as in the official InternVL code;
            ``"image"``: each gets as many as a single one, as in transformers' processor and TRL.

    Raises:
        ValueError: for invalid limits, or a processor that does not split images into tiles.
    """
    try:
        own = {name: value for name, value in (checked_tiles(record.get("tiles")) or {}).items() if value is not None}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not images:
        return {}
    if not splits_into_tiles(processing_class):
        if own:
            raise ValueError(_unsplit(where, "tiles", processing_class))
        return {}
    image_processor = processing_class.image_processor
    if "thumbnail" in own and not hasattr(image_processor, "use_thumbnail"):
        found = "'tiles' has a thumbnail setting, which transformers' own processor ignores"
        raise ValueError(f"{where}: {found}. Load the processor with mpo.models.loading.load_processor.")
    most = int(own.get("max", image_processor.max_patches))
    least = int(own.get("min", min(image_processor.min_patches, most)))
    if not 1 <= least <= most:
        raise ValueError(f"{where}: expected 1 <= min <= max tiles per image; got min {least}, max {most}.")
    if budget == "prompt":
        most = max(1, most // images)
    asked = {"min_patches": min(least, most), "max_patches": most}
    if "thumbnail" in own:
        asked["use_thumbnail"] = bool(own["thumbnail"])
    return {name: value for name, value in asked.items() if value != getattr(image_processor, name)}


def _unsplit(where: str, column: str, processing_class: Any) -> str:
    kind = type(processing_class).__name__
    return f"{where} sets {column!r}, but {kind} does not split images into tiles. Drop the column {column!r}."


def jpeg_seed(record: Mapping[str, Any], images: int, processing_class: Any, where: str, *, seed: int) -> dict[str, Any]:
    """``jpeg_seed`` for compressing a prompt's tiles: in training, for records whose ``augment`` is true; else an empty dict.

    A record that is to be augmented has the epoch (`mpo.batching.streams.in_epoch`), which the seed includes; what is drawn depends
    on the image. A processor that does not split images into tiles is an error.
    """
    if not isinstance(record.get("augment"), bool | None):
        raise ValueError(f"{where}: 'augment' must be true or false; got {record['augment']!r:.50}. Rename the column.")
    if not images or not record.get("augment") or EPOCH not in record:
        return {}
    if not splits_into_tiles(processing_class):
        raise ValueError(_unsplit(where, "augment", processing_class))
    return {"jpeg_seed": (seed, int(record[EPOCH]))}


@lru_cache(maxsize=8)
def image_rule(processing_class: Any) -> Callable[[int, int, Limits], tuple[int, int]]:
    """A function of an image's height and width, in pixels, and its prompt's tile limits that returns its tokens and tiles."""
    check_processor(processing_class)
    # Private, but meant for serving engines that need the same: it applies the image processor's own rule and settings, and
    # counts the tokens around an image. Checked with transformers 5.23.
    if not hasattr(processing_class, "_get_num_multimodal_tokens"):
        found = f"{type(processing_class).__name__} cannot count the tokens of an image without encoding it"
        raise ValueError(f"{found}. Use batching='pairs' (of conversations: 'conversations').")

    @cache
    def limited(limits: Limits) -> Any:
        # Not as keyword arguments: transformers 5.17 would then keep them for every processor.
        processor = copy.copy(processing_class)
        if limits:
            processor.image_processor = copy.copy(processor.image_processor)
            for name, value in limits:
                setattr(processor.image_processor, name, value)
        if (merge := getattr(processor, "_merge_kwargs", None)) is not None:  # takes milliseconds, with the same result every time
            merged = cache(merge)
            processor._merge_kwargs = lambda *args, **kwargs: merge(*args, **kwargs) if args or kwargs else copy.copy(merged())
        return processor

    @lru_cache(maxsize=2**18)
    def tokens_and_tiles(height: int, width: int, limits: Limits) -> tuple[int, int]:
        found = limited(limits)._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return int(found["num_image_tokens"][0]), int(found["num_image_patches"][0])

    return tokens_and_tiles
