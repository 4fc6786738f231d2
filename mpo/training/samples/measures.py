"""Measures of degeneration of sampled responses."""

from __future__ import annotations

from collections.abc import Sequence

from mpo.generation.local import Sample


def repeated_fraction(tokens: Sequence[int], size: int = 4) -> float:
    """The fraction of n-grams of `size` tokens that occur earlier in the same text; 0 for a text shorter than `size`.

    >>> repeated_fraction([7, 7, 7, 7, 7, 7, 7, 7])  # five equal 4-grams
    0.8
    >>> repeated_fraction([1, 2, 3, 4, 1, 2, 3, 5])
    0.0
    """
    grams = [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(responses: Sequence[Sample]) -> dict[str, float]:
    """The logged numbers of some responses: mean length in tokens, fraction of truncated ones, and mean repetition."""
    count = len(responses)
    return {
        "samples/length": sum(response.tokens for response in responses) / count,
        "samples/unfinished": sum(not response.finished for response in responses) / count,
        "samples/repetition": sum(repeated_fraction(response.ids) for response in responses) / count,
    }
