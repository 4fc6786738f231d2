"""Split each distinct image of a batch into tiles once, and encode its tiles once, unless its features are known."""

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images

from mpo.data.images import open_image
from mpo.data.paths import regular_file
from mpo.encoding.keys import image_key
from mpo.encoding.movable import Movable
from mpo.encoding.tiles import splits_into_tiles, tile_size
from mpo.models.family import known_family

VISION_FEATURES = "vision_features"
"""The model input that takes the place of ``pixel_values``: a tensor, or `ImageFeatures` that are to be completed."""


class OneImage(NamedTuple):
    """A distinct image of a batch."""

    key: bytes  # in the cache
    image: bytes  # key of its pixels
    size: tuple[int, int]  # width and height
    tiles: int
    known: bool


@dataclass(frozen=True, eq=False)
class ImageFeatures(Movable):
    """Features of the images that a cache has, shape (K tiles, tokens, channels), and tiles of the others, (M, 3, height, width).

    ``index`` (T,): the distinct tile at each position, in the order of the batch's prompts.
    """

    images: tuple[OneImage, ...]
    index: Tensor
    known: Tensor | None
    pixels: Tensor | None

    @property
    def shape(self) -> torch.Size:
        """Shape of `index`."""
        return self.index.shape

    def repeated(self, times: int) -> ImageFeatures:
        """The features of a batch whose prompts are repeated."""
        return replace(self, index=self.index.repeat(times))


class StoredImage(Image.Image):
    """Takes the place of an image that is not decoded: it has a size, and the key of its pixels, and no pixels."""

    mode = "RGB"  # as `open_image` returns
    size: Any = None

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found, self.size, self.content_key = found, found.size, found.image


class Opening(dict[str | bytes, Image.Image]):
    """Opened images of a batch by path or content, which have the same tile limits (`mpo.encoding.tiles.tile_limits`).

    `features` is a `mpo.training.features.cache.FeatureCache`.
    """

    def __init__(self, features: Any, limits: Mapping[str, Any]) -> None:
        super().__init__()
        self.features, self.limits = features, limits

    def open(self, image: Any, *, where: str = "") -> Image.Image:
        """Open an image as `open_image` does, unless the cache has the features of this file."""
        content, path = (image.get("bytes"), image.get("path")) if isinstance(image, Mapping) else (image, image)
        if isinstance(content, (bytearray, memoryview)):
            content = bytes(content)
        if not isinstance(content, bytes) and isinstance(path, (str, Path)):
            with suppress(OSError):  # `open_image` says why it cannot be opened
                content = Path(regular_file(str(path), f"{where}: {path}", "image")).read_bytes()
        if not isinstance(content, bytes):
            return open_image(image, where=where)
        key = self.features.key(image_key(content), self.limits)
        if (found := self.features.find(key)) is not None:
            return StoredImage(found)
        opened = open_image({"bytes": content, "path": path if isinstance(path, (str, Path)) else None}, where=where)
        opened.entry_key = key  # type: ignore[attr-defined]  # of this content; a copy of the image has none
        return opened


def stored(image: Any, features: Any, limits: Mapping[str, Any]) -> tuple[bytes, Any]:
    """Return the key of an image in the cache, and what was found there, or None."""
    if isinstance(image, StoredImage):
        return image.found.key, image.found
    key = getattr(image, "entry_key", None) or features.key(image_key(image), limits)
    return key, features.find(key)


# Each distinct image once


def process(
    processing_class: Any,
    *,
    text: list[str],
    images: list[list[Any]],
    limits: Sequence[Mapping[str, Any]],
    cache: Any = None,
    **kwargs: Any,
) -> tuple[BatchFeature, Tensor | None]:
    """Run a processor on prompts with images.

    Args:
        text, images: those of each prompt.
        limits: for each prompt, keyword arguments for its images (`mpo.encoding.tiles.tile_limits`); and ``jpeg_seed``, if its
            tiles are to be compressed (`mpo.encoding.images`).
        cache: a `mpo.training.features.cache.FeatureCache`: images that it has are not processed.
        kwargs: further arguments of the processor.

    Returns:
        the processor's output, with the tiles of each distinct image once; and the index of each prompt's tiles among them,
        shape (tiles of all prompts,). None for processors that do not split images into tiles: their output is unchanged. With a
        `cache`, `ImageFeatures` take the place of tiles and index.
    """
    is_split = splits_into_tiles(processing_class)
    if cache is None and not is_split:
        return processing_class(images=images, text=text, **kwargs), None
    each = [limit for limit, own in zip(limits, images, strict=True) for _ in own]
    once = _OncePerImage(processing_class.image_processor, each, cache, None if is_split else tile_size(processing_class))
    processor = copy.copy(processing_class)
    processor.image_processor = once
    features = processor(images=images, text=text, **kwargs)
    if once.features is not None:
        del features["pixel_values"]
        features[VISION_FEATURES] = once.features
        return features, None
    features["pixel_values"] = once.tiles
    return features, once.order


def in_order(images: Mapping[str, Any], order: Tensor | None, tower: Any, device: torch.device) -> dict[str, Tensor]:
    """Return the image inputs of prompts, as of `process`, with the tiles, or their features, in the order of the prompts.

    `tower`: a `mpo.training.features.use.CachedTower`, which completes features on `device`; None without a cache.
    """
    found = dict(images)
    if order is not None:
        found["pixel_values"] = found["pixel_values"][order]
    if VISION_FEATURES in found:
        found[VISION_FEATURES] = tower.complete(found[VISION_FEATURES], device)
    return found


class _OncePerImage:
    """Replaces a processor's image processor: splits each distinct image once, with the tile limits of its prompt."""

    tiles: Tensor
    order: Tensor
    features: ImageFeatures | None = None

    def __init__(self, image_processor: Any, limits: Sequence[Mapping[str, Any]], cache: Any = None, size: Any = None) -> None:
        self._image_processor = image_processor
        self._shape = (0,) if size is None else (3, *size)
        self._cache = cache
        self._limits = [tuple(sorted(limit.items())) for limit in limits]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)  # copy and pickle look attributes up before there is an image processor
        return getattr(self._image_processor, name)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        flat = make_flat_list_of_images(images)
        firsts = _firsts(flat, self._limits)
        distinct = list(dict.fromkeys(firsts))
        keys: dict[int, tuple[bytes, Any]] = {}
        if self._cache is not None:
            keys = {place: stored(flat[place], self._cache, dict(self._limits[place])) for place in distinct}
        known = {place: found for place, (_, found) in keys.items() if found is not None}
        counts: dict[int, int] = {place: found.tiles for place, found in known.items()}
        tiles: dict[int, Tensor] = {}
        for limit in dict.fromkeys(self._limits):
            places = [place for place in distinct if self._limits[place] == limit and place not in known]
            if not places:
                continue
            settings = {**kwargs, **dict(limit), "return_tensors": "pt"}
            image_processor = _compressing(self._image_processor, settings.pop("jpeg_seed", None))
            found = image_processor([flat[place] for place in places], **settings)
            counts |= zip(places, map(int, found.get("num_patches", [1] * len(places))), strict=True)
            tiles |= zip(places, found["pixel_values"].split([counts[place] for place in places]), strict=True)
        numbers = torch.split(torch.arange(sum(counts.values())), [counts[place] for place in distinct])
        own = dict(zip(distinct, numbers, strict=True))
        if tiles:
            is_whole = len(found["pixel_values"]) == sum(counts.values())  # one call: no copy needed
            self.tiles = found["pixel_values"] if is_whole else torch.cat([tiles[place] for place in sorted(tiles)])
        self.order = torch.cat([own[first] for first in firsts])
        if keys:
            images = []
            for place in distinct:
                key, found = keys[place]
                image, size = (image_key(flat[place]), _size(flat[place])) if found is None else (found.image, found.size)
                images.append(OneImage(key, image, size, counts[place], found is not None))
            features = self._cache.read(list(known.values())) if known else None
            self.features = ImageFeatures(tuple(images), self.order, features, self.tiles if tiles else None)
        # A processor would only copy the tiles, or read their size, so it gets none, or views of one number.
        pixels = torch.zeros(1).expand(len(self.order), *self._shape)
        return BatchFeature({"pixel_values": pixels, "num_patches": [counts[first] for first in firsts]})


def _firsts(images: Sequence[Any], limits: Sequence[Hashable]) -> list[int]:
    """For each image, the index of the first equal one with the same limits. Only unlike objects of one shape are hashed, once."""
    outlines = [(_outline(image), limit) for image, limit in zip(images, limits, strict=True)]
    objects = {(id(image), outline): image for image, outline in zip(images, outlines, strict=True)}
    times = Counter(outline for _, outline in objects)
    unclear = {number: image for (number, outline), image in objects.items() if times[outline] > 1}
    keys = {number: image_key(image) for number, image in unclear.items()}
    alike = [(outline, keys.get(id(image))) for image, outline in zip(images, outlines, strict=True)]
    first = {one: place for place, one in reversed([*enumerate(alike)])}
    return [first[one] for one in alike]


def _compressing(image_processor: Any, seed: tuple[int, ...] | None) -> Any:
    """An image processor that compresses tiles with JPEG after splitting, before normalisation; unchanged without a seed."""
    if seed is None:
        return image_processor

    def crop(images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Shape (images, tiles, 3, height, width), uint8, as in `GotOcr2ImageProcessor.crop_image_to_patches`."""
        tiles = image_processor.crop_image_to_patches(images, *args, **kwargs)
        arrays = tiles.permute(0, 1, 3, 4, 2).cpu().numpy()
        compressed = torch.from_numpy(np.stack([compress_tiles(own, seed) for own in arrays]))
        return compressed.permute(0, 1, 4, 2, 3).contiguous().to(tiles.device)

    compressing = copy.copy(image_processor)
    compressing.crop_image_to_patches = crop
    return compressing


def _outline(image: Any) -> Any:
    return (image.mode, image.size) if isinstance(image, Image.Image) else getattr(image, "shape", None)


def _size(image: Any) -> tuple[int, int]:
    """Width and height of an image; of an array, whose key is never that of a file, its first two dimensions."""
    width, height = image.size if isinstance(image, Image.Image) else image.shape[:2]
    return int(width), int(height)


def add_tile_order(backbone: Any) -> None:
    """Let `backbone(..., tile_order=order)` put its vision tower's outputs, one per distinct tile, in the order of the prompts.

    `order`: shape (T,), int64, the distinct tile at each position. The backbone's hooks remove the keyword before its forward.
    Without the keyword nothing changes.
    """
    family = known_family(backbone.config)
    if not family.tiled or hasattr(tower := getattr(backbone, family.vision), "tile_order"):
        return
    tower.__dict__["tile_order"] = None  # a plain attribute, not a module or buffer
    backbone.register_forward_pre_hook(_take_keyword, with_kwargs=True)
    tower.register_forward_hook(_in_order)


def _take_keyword(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    tower = getattr(module, known_family(module.config).vision)  # of this module, which may be a copy
    tower.__dict__["tile_order"] = kwargs.pop("tile_order", None)
    return args, kwargs


def _in_order(module: nn.Module, args: Any, output: Any) -> Any:
    order, module.__dict__["tile_order"] = module.__dict__["tile_order"], None
    if order is None:
        return output

    def ordered(hidden: Tensor | None) -> Tensor | None:
        return None if hidden is None else hidden.index_select(0, order)

    layers = output.hidden_states  # used by models that read their features from another layer than the last
    return replace(
        output,
        last_hidden_state=ordered(output.last_hidden_state),
        hidden_states=None if layers is None else tuple(map(ordered, layers)),
    )


# Augmentation


QUALITIES = range(75, 101)


def compress_tiles(tiles: NDArray[np.uint8], seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """InternVL 2.5's augmentation: compress each tile of one image as JPEG once, at a random quality, and decode it again.

    Source: arXiv 2412.05271, section 4.2 (random JPEG compression, quality 75 to 100), and the official `build_transform`: the
    quality is drawn uniformly for each tile of `dynamic_preprocess`, including the thumbnail, before the tile is normalised.

    Args:
        tiles: shape (tiles, height, width, 3).
        seed: of the random qualities, which also depend on the tiles' pixels: an image has the same noise at any place in an
            epoch, and different images have different noise.

    Returns:
        the decoded tiles, in the same shape.
    """
    drawn = np.random.default_rng((*seed, zlib.crc32(tiles.tobytes())))
    qualities = drawn.integers(QUALITIES.start, QUALITIES.stop, size=len(tiles))
    return np.stack([compress(tile, int(quality)) for tile, quality in zip(tiles, qualities, strict=True)])


def compress(tile: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Encode a tile, shape (height, width, 3), RGB, as JPEG of Pillow's `quality` and default chroma subsampling, and decode it."""
    with BytesIO() as file:
        Image.fromarray(tile).save(file, format="JPEG", quality=quality)
        file.seek(0)
        with Image.open(file) as opened:
            return np.array(opened)
