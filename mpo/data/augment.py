"""InternVL 2.5's augmentation: each tile goes through JPEG once, at a random quality.

Source: arXiv 2412.05271, section 4.2 (random JPEG compression, quality 75 to 100), and the official `build_transform`: quality is
drawn uniformly for each tile that `dynamic_preprocess` has cut from the resized image, its thumbnail among them, before the tile
is resized to its own size (which then changes nothing) and normalised.
"""

from __future__ import annotations

import zlib
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITIES = range(75, 101)


def compress_tiles(tiles: NDArray[np.uint8], seed: tuple[int, ...]) -> NDArray[np.uint8]:
    """The tiles of one image, each through JPEG.

    Args:
        tiles: shape (tiles, height, width, 3).
        seed: of the draw. Beside it, the draw depends on the tiles themselves, so that an image has the same noise wherever it
            stands in an epoch, and other images have other noise.

    Returns:
        the same shape.
    """
    drawn = np.random.default_rng((*seed, zlib.crc32(tiles.tobytes())))
    qualities = drawn.integers(QUALITIES.start, QUALITIES.stop, size=len(tiles))
    return np.stack([compress(tile, int(quality)) for tile, quality in zip(tiles, qualities, strict=True)])


def compress(tile: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Encode as JPEG and decode.

    Args:
        tile: shape (height, width, 3), RGB.
        quality: Pillow's, from 1 to 100, with its chroma subsampling.
    """
    with BytesIO() as file:
        Image.fromarray(tile).save(file, format="JPEG", quality=quality)
        file.seek(0)
        with Image.open(file) as opened:
            return np.array(opened)
