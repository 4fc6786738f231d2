"""Find similar texts and images: minhash signatures of texts, difference hashes of images, and a comparison of pixels.

The comparison finds copies that were made smaller or compressed again, and only those. Compression and resizing change an image
slightly wherever it has detail. A different label, colour or bar changes one place more than others, or the brightness or colour
of whole areas. Both are checked, block by block. The limits were chosen by 380 copies and 540 changed images, see
tests/curation/test_same_image.py: all copies are found, and nearly no changed image is taken for one. Copies of drawings are often
missed: a remaining duplicate does less harm than a lost pair.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NGRAM = 5
"""Number of characters of an n-gram."""
BANDS, ROWS = 8, 4
"""A signature has BANDS x ROWS minima. Texts whose n-grams overlap by 0.9 (Jaccard) share a band in 9,998 of 10,000 cases."""
SIGNATURE = BANDS * ROWS
BLOCKS = 4
"""Blocks of 16 bits in an image's 64: images that differ in fewer bits than there are blocks share a block."""

_RNG = np.random.default_rng(2411_10442)
_FACTORS = _RNG.integers(1, 2**63, SIGNATURE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_TERMS = _RNG.integers(0, 2**63, SIGNATURE, dtype=np.uint64)
_BASE = np.uint64(0x9E3779B97F4A7C15)


def normalised(text: str) -> str:
    """Normalise a text: remove case, line breaks and punctuation except arithmetic signs.

    >>> normalised("What's  the ANSWER?")
    'what s the answer'
    """
    return re.sub(r"[^\w+\-*/=<>^%]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def numbers(text: str) -> list[str]:
    """Extract numbers and arithmetic signs. Texts that differ in these have different meanings, however similar they are.

    >>> numbers("17 apples at 2.50 each, x < 3")
    ['17', '2.50', '<', '3']
    """
    return re.findall(r"\d+(?:[.,]\d+)*|[-+*/=<>^]", text)


def ngrams(text: str) -> NDArray[np.uint64]:
    """Hash the distinct n-grams of a normalised text, sorted; a text shorter than an n-gram is one n-gram."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    length = max(len(codes) - NGRAM + 1, 1)
    found = np.zeros(length, dtype=np.uint64)
    for place in range(min(NGRAM, len(codes))):
        found = found * _BASE + codes[place : place + length]
    return np.unique(found ^ (found >> np.uint64(29)))


def signature(text: str) -> NDArray[np.uint32]:
    """Compute the minhash of a normalised text, shape (SIGNATURE,)."""
    hashed = ngrams(text)[None, :] * _FACTORS[:, None] + _TERMS[:, None]
    minima: NDArray[np.uint32] = (hashed.min(axis=1) >> np.uint64(32)).astype(np.uint32)
    return minima


def overlap(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Compute the Jaccard overlap of two sorted arrays of distinct values: intersection over union.

    >>> overlap(np.array([1, 2, 3]), np.array([2, 3, 4]))
    0.5
    """
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(len(first) + len(second) - shared, 1)


def difference_hash(image: Image.Image) -> int:
    """Hash an image to 64 bits: whether each of 8 x 8 pixels of the shrunken grey image is brighter than its right neighbour.

    Resized and recompressed copies have nearly the same hash, but so have drawings that differ only in colour or small details: it
    selects the images to compare (`mpo.data.similar`).
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)


def differing_bits(first: int, second: int) -> int:
    """Count the bits in which two 64-bit hashes differ."""
    return ((first ^ second) % 2**64).bit_count()


# Pixels


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
