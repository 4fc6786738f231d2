"""The interface of text generators: sample responses to questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Question:
    """A question, with the images it is about.

    Attributes:
        text: the question as the user would type it.
        images: images or paths of image files, in the order they are shown; they come before the text.
    """

    text: str
    images: tuple[str | Path | Image, ...] = ()


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Attributes:
        text: its text, special tokens included, without the token that ends it.
        ids: its tokens, without the token that ends it.
        finished: whether it ended before the token limit.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool

    @property
    def tokens(self) -> int:
        """Number of sampled tokens, with the token that ends it."""
        return len(self.ids) + self.finished


class Generator(Protocol):
    """A model that responds to questions, in this process or on a server."""

    def generate(
        self,
        questions: Sequence[Question],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
    ) -> list[list[str]]:
        """Sample `n` responses to every question.

        Args:
            questions: what to ask.
            n: responses per question.
            temperature: 0 is greedy, 1 samples from the model's own distribution.
            max_new_tokens: the longest response, in tokens; a longer one is truncated.
            seed: random seed of the sampling. The same questions, arguments and seed give the same responses.

        Returns:
            For each question, in order, its `n` responses without special tokens.

        Raises:
            ValueError: for invalid arguments, or an image that cannot be opened.
        """
        ...
