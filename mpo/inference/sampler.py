"""What every source of generated text can do: answer questions about images, several times each."""

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
        images: images or paths of image files, in the order they are shown; they stand before the text.
    """

    text: str
    images: tuple[str | Path | Image, ...] = ()


class Sampler(Protocol):
    """A model, wherever it runs, that answers questions."""

    def generate(
        self,
        questions: Sequence[Question],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
    ) -> list[list[str]]:
        """Answers every question `n` times.

        Args:
            questions: what to ask.
            n: answers per question.
            temperature: 0 is greedy, 1 samples from the model's own distribution.
            max_new_tokens: the longest answer, in tokens; a longer one is cut.
            seed: of the sampling. The same questions, arguments and seed give the same answers.

        Returns:
            For each question, in order, its `n` answers without special tokens.

        Raises:
            ValueError: for arguments that make no sense, or an image that cannot be opened.
        """
        ...
