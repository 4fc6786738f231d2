"""Whether two images are one: the pixels compared, so that a copy made smaller or compressed again is known, and nothing else.

Compression and resizing change an image a little wherever it has detail. Another label, colour or bar changes it in one place, and
more than anywhere else, or changes how bright or coloured whole stretches are. Both are looked for, block by block.

How the limits were chosen. Copies: 20 images (of scikit-image, scikit-learn and matplotlib: photographs, scans, pages of text)
as JPEG of quality 75, 85 and 95, as WebP of quality 80, and at 0.8, 0.9 and 0.97 of their size by Lanczos, bicubic and bilinear
filters, with and without JPEG after it: 380. Changed: drawings of 224 to 2,400 pixels of which one digit or letter of 8 to 16
pixels, one bar's height (by 1 to 5 pixels) or one colour is another: 420; and 120 photographs with another label written on them.

                                                                    copies: median, most    changed drawings: least
    the most that a block differs, over what is usual (`ISOLATED`)             1.1   2.2       3.7, unless the other is
    how far most blocks are brighter or more coloured (`SHIFT`)                0.5   1.9       2.5, unless the other is

All copies are known. No changed drawing or photograph is taken for the same; both made JPEG of quality 75, one is (bars of red 255
and 235). Copies of drawings are often not known, nor those of sharp photographs made smaller by a box filter (14 of 60): a pair
too many does less harm than one too few.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BLOCK = 8
"""Pixels of a block's side: as large as a small digit, and as JPEG's blocks."""
LONGEST = 2048
"""Pixels of the longer side that larger images are compared at; a label that is lost there is lost in a model's tiles too."""
SMALLEST = 0.75
"""A copy has at least this share of the other's width and height: smaller ones lose small labels."""
USUAL = 0.95
"""The quantile of the blocks that says what is usual: in pages and drawings, most blocks are empty and do not change."""
ISOLATED = 2.5
"""How often what is usual, and `ROUNDING`, a block may differ."""
ROUNDING = 2.0
"""Levels of 255 by which a block may always differ."""
SHIFT = 2.0
"""Levels of 255 by which all but a twentieth of the blocks may be brighter or more coloured."""
GLIMPSE = 32
"""Pixels of the side of a glimpse."""
GLIMPSE_APART = 20
"""Levels of 255 by which a place of a glimpse may differ: the most of the copies above, those by box filters among them."""


def glimpse(image: Image.Image) -> NDArray[np.int16]:
    """An RGB image made very small, shape (GLIMPSE, GLIMPSE, 3): most images can be told apart by it, at little cost."""
    return np.asarray(image.resize((GLIMPSE, GLIMPSE), Image.Resampling.BOX), dtype=np.int16)


def may_be_same(one: NDArray[np.int16], other: NDArray[np.int16]) -> bool:
    """Whether two glimpses may be of the same image."""
    return int(np.abs(one - other).max()) <= GLIMPSE_APART


def same_image(one: Image.Image, other: Image.Image) -> bool:
    """Whether an RGB image is another one, or a copy of it that was compressed again or made a little smaller."""
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
    """The same proportions, as far as sides are whole numbers, and no side much shorter."""
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
    """Means over blocks, the last rows and columns filling up theirs: (height, width) -> sides divided by BLOCK, rounded up."""
    height, width = values.shape
    filled = np.pad(values, ((0, -height % BLOCK), (0, -width % BLOCK)), mode="edge")
    means: NDArray[np.float32] = filled.reshape(filled.shape[0] // BLOCK, BLOCK, -1, BLOCK).mean(axis=(1, 3))
    return means
