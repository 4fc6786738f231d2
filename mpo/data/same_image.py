"""Compare the pixels of two images, to find copies that were made smaller or compressed again, and only those.

Compression and resizing change an image slightly wherever it has detail. A different label, colour or bar changes one place more
than all others, or changes the brightness or colour of whole areas. Both are checked, block by block.

How the limits were chosen. Copies: 20 images (of scikit-image, scikit-learn and matplotlib: photographs, scans, pages of text)
as JPEG of quality 75, 85 and 95, as WebP of quality 80, and at 0.8, 0.9 and 0.97 of their size by Lanczos, bicubic and bilinear
filters, with and without JPEG after it: 380. Changed: 420 drawings of 224 to 2,400 pixels with one different digit or letter of
8 to 16 pixels, bar height (by 1 to 5 pixels) or colour; and 120 photographs with a different label.

                                                                       copies: median, max    changed drawings: min
    largest block difference over the usual difference (`ISOLATED`)                1.1   2.2    3.7, or SHIFT is exceeded
    difference in brightness or colour of most blocks (`SHIFT`)                    0.5   1.9    2.5, or ISOLATED is exceeded

All copies are found. No changed drawing or photograph is taken for a copy; if both are JPEG of quality 75, one is (bars of red 255
and 235). Copies of drawings are often missed, and so are sharp photographs made smaller by a box filter (14 of 60): a remaining
duplicate does less harm than a lost pair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLOCK = 8
"""Pixels of a block's side: the size of a small digit, and of JPEG's blocks."""
LONGEST = 2048
"""Maximum pixels of the longer side in a comparison; a label that is lost at this size is lost in a model's tiles too."""
SMALLEST = 0.75
"""Minimum width and height of a copy, relative to the other image: smaller copies lose small labels."""
USUAL = 0.95
"""Quantile of the blocks that defines the usual difference: in pages and drawings, most blocks are empty and do not change."""
ISOLATED = 2.5
"""Maximum difference of a block, as a multiple of the usual difference plus `ROUNDING`."""
ROUNDING = 2.0
"""Difference (of 255 levels) that is always allowed in a block."""
SHIFT = 2.0
"""Maximum shift in brightness or colour (of 255 levels) of 95 % of the blocks."""
GLIMPSE = 32
"""Pixels of a glimpse's side."""
GLIMPSE_APART = 20
"""Maximum difference (of 255 levels) of a glimpse's pixels: the maximum of the copies above, including those by box filters."""


def glimpse(image: Image.Image) -> NDArray[np.int16]:
    """Shrink an RGB image to shape (GLIMPSE, GLIMPSE, 3), by which most different images are told apart at little cost."""
    return np.asarray(image.resize((GLIMPSE, GLIMPSE), Image.Resampling.BOX), dtype=np.int16)


def may_be_same(one: NDArray[np.int16], other: NDArray[np.int16]) -> bool:
    """Whether two glimpses may be those of the same image."""
    return int(np.abs(one - other).max()) <= GLIMPSE_APART


def same_image(one: Image.Image, other: Image.Image) -> bool:
    """Whether two RGB images are equal, or one is a copy that was compressed again or made slightly smaller."""
    if not _same_shape(one.size, other.size):
        return False
    width, height = min(one.width, other.width), min(one.height, other.height)
    scale = min(LONGEST / max(width, height), 1)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    first, second = (
        np.asarray(image.resize(size, Image.Resampling.LANCZOS).convert("YCbCr"), dtype=np.uint8) for image in (one, other)
    )
    return all(_same_channel(first[..., channel], second[..., channel]) for channel in range(3))


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have the same proportions, up to rounding, and no side is much shorter."""
    if any(min(sides) < SMALLEST * max(sides) for sides in zip(one, other, strict=True)):
        return False
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def _same_channel(one: NDArray[Any], other: NDArray[Any]) -> bool:
    apart = one.astype(np.float32) - other
    differences = np.sqrt(_block_means(apart**2))
    shifts = np.abs(_block_means(apart))
    usual = float(np.quantile(differences, USUAL))
    return float(differences.max()) <= ISOLATED * (usual + ROUNDING) and float(np.quantile(shifts, USUAL)) <= SHIFT


def _block_means(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average over blocks, repeating the last rows and columns: (height, width) -> sides divided by BLOCK, rounded up."""
    height, width = values.shape
    padded = np.pad(values, ((0, -height % BLOCK), (0, -width % BLOCK)), mode="edge")
    means: NDArray[np.float32] = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK).mean(axis=(1, 3))
    return means
