"""Images of a batch whose vision features are known: they are neither decoded nor processed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mpo.data.images import open_image
from mpo.data.paths import regular_file
from mpo.encoding.keys import image_key
from mpo.encoding.movable import Movable

VISION_FEATURES = "vision_features"
"""The model input that takes the place of ``pixel_values``: a tensor, or `ImageFeatures` that are to be completed."""


@dataclass(frozen=True)
class OneImage:
    """A distinct image of a batch: its key in the cache, the key of its pixels, its size in pixels and its number of tiles."""

    key: bytes
    image: bytes
    size: tuple[int, int]
    tiles: int
    known: bool


@dataclass(frozen=True, eq=False)
class ImageFeatures(Movable):
    """Features of the images that a cache has, and tiles of the others.

    Attributes:
        images: the distinct images.
        index: the distinct tile at each position, in the order of the batch's prompts, shape (T,).
        known: features of the known images' tiles, in order, shape (K, tokens, channels); None for none.
        pixels: tiles of the other images, in order, shape (M, 3, height, width); None for none.
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
    """Takes the place of an image that is not decoded, with its size and the key of its pixels."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found
        self.content_key: bytes = found.image

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        size: tuple[int, int] = self.found.size
        return size

    @property
    def mode(self) -> str:
        """Always RGB, as `open_image` returns."""
        return "RGB"

    def load(self) -> Any:
        """Refuse to decode it."""
        raise AssertionError("an image whose features are cached is not decoded")


class Opening(dict[str | bytes, Image.Image]):
    """Opened images of a batch by path or content, that are opened with the same tile limits.

    Args:
        features: a `mpo.training.features.cache.FeatureCache`.
        limits: tile limits that differ from the processor's (`mpo.encoding.tiles.tile_limits`).
    """

    def __init__(self, features: Any, limits: Mapping[str, Any]) -> None:
        super().__init__()
        self.features, self.limits = features, limits

    def open(self, image: Any, *, where: str = "") -> Image.Image:
        """Open an image as `open_image` does, unless the cache has the features of this content."""
        content = image.get("bytes") if isinstance(image, Mapping) else image
        path = image.get("path") if isinstance(image, Mapping) else image
        if not isinstance(content, (bytes, bytearray, memoryview)):
            if not isinstance(path, (str, Path)) or not path:
                return open_image(image, where=where)
            try:
                content = Path(regular_file(str(path), f"{where}: {path}" if where else str(path), "image")).read_bytes()
            except OSError:
                return open_image(image, where=where)  # which says why it cannot be opened
        key = self.features.key(image_key(content), self.limits)
        found = self.features.find(key)
        if found is not None:
            return StoredImage(found)
        opened = open_image({"bytes": bytes(content), "path": path if isinstance(path, (str, Path)) else None}, where=where)
        opened.entry_key = key  # type: ignore[attr-defined]  # of this content; a copy of the image has none
        return opened


def stored(image: Any, features: Any, limits: Mapping[str, Any]) -> tuple[bytes, Any]:
    """Return the key of an image in the cache, and what was found there, or None."""
    if isinstance(image, StoredImage):
        return image.found.key, image.found
    key = getattr(image, "entry_key", None) or features.key(image_key(image), limits)
    return key, features.find(key)
