"""Find similar texts and images: minhash signatures of texts, difference hashes of images."""

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
    selects the images to compare (`mpo.data.same_image`).
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    bits = (grey[:, :-1] > grey[:, 1:]).reshape(-1)
    return int.from_bytes(np.packbits(bits).tobytes(), "big", signed=True)


def differing_bits(first: int, second: int) -> int:
    """Count the bits in which two 64-bit hashes differ."""
    return ((first ^ second) % 2**64).bit_count()
