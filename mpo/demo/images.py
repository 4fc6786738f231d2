"""Images of handwritten digits side by side, with disjoint sources in every split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SPLITS = ("worked", "questions", "eval")


@dataclass(frozen=True)
class Handwriting:
    """Single handwritten digits.

    Attributes:
        images: shape `(sources, 8, 8)`, ink from 0 to 16.
        labels: shape `(sources,)`, 0 to 9.
    """

    images: NDArray[np.float64]
    labels: NDArray[np.int64]


def load_handwriting() -> Handwriting:
    """Load the 1,797 scanned digits of scikit-learn (UCI Optical Recognition of Handwritten Digits, test part)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return Handwriting(images=digits.images, labels=digits.target)


def split_sources(
    labels: NDArray[np.int64], *, worked: int, questions: int, rng: np.random.Generator
) -> dict[str, NDArray[np.int64]]:
    """Assign every source digit to exactly one split, with each digit equally often in `worked` and `questions`.

    Args:
        labels: shape `(sources,)`, 0 to 9.
        worked: sources for the worked examples; a multiple of ten.
        questions: sources for the questions; a multiple of ten. The rest is for evaluation.
        rng: random generator of the shuffling.

    Returns:
        Source indices by split name, sorted.

    Raises:
        ValueError: for numbers that are not multiples of ten, or that leave no source for evaluation.
    """
    if worked % 10 or questions % 10:
        raise ValueError(f"Expected multiples of ten, as there are ten digits; got worked={worked}, questions={questions}.")
    assigned: dict[str, list[int]] = {name: [] for name in SPLITS}
    for digit in range(10):
        sources = rng.permutation(np.flatnonzero(labels == digit))
        first, second = worked // 10, (worked + questions) // 10
        if second >= len(sources):
            raise ValueError(
                f"worked={worked}, questions={questions} need {second} of the {len(sources)} sources of the digit {digit}, and at "
                "least one must remain for evaluation. Set fewer worked or question sources."
            )
        assigned["worked"] += sources[:first].tolist()
        assigned["questions"] += sources[first:second].tolist()
        assigned["eval"] += sources[second:].tolist()
    return {name: np.array(sorted(sources)) for name, sources in assigned.items()}


def draw(handwriting: Handwriting, sources: Sequence[int], *, digit_size: int) -> Image.Image:
    """Draw digits side by side, black ink on white paper.

    Args:
        handwriting: the scanned digits.
        sources: indices of the digits, from left to right.
        digit_size: width and height of each digit in pixels.

    Returns:
        An RGB image of `digit_size * len(sources)` by `digit_size` pixels.
    """
    ink = np.concatenate([handwriting.images[source] for source in sources], axis=1)
    paper = Image.fromarray((255 - ink * (255 / 16)).round().astype(np.uint8))
    return paper.resize((digit_size * len(sources), digit_size), Image.Resampling.BICUBIC).convert("RGB")
