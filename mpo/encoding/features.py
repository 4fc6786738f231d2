"""Images of a batch whose vision features are known: they are neither decoded nor processed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mpo.data.images import open_image
from mpo.data.paths import regular_file
from mpo.encoding.keys import image_key
from mpo.encoding.movable import Movable

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
