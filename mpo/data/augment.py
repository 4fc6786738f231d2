"""InternVL 2.5's augmentation: compress each tile as JPEG once, at a random quality.

Source: arXiv 2412.05271, section 4.2 (random JPEG compression, quality 75 to 100), and the official `build_transform`: the quality
is drawn uniformly for each tile of `dynamic_preprocess`, including the thumbnail, before the tile is resized to its own size (which
changes nothing) and normalised.
"""

from __future__ import annotations

import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITIES = range(75, 101)


def compress_tiles(tiles: NDArray[np.uint8], seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """Compress each tile of one image as JPEG and decode it again.

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
