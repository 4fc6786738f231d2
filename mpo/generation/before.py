"""The interface of text generators: sample responses to questions about images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mpo.data.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

if TYPE_CHECKING:
    from PIL.Image import Image


OnText = Callable[[str], None]
"""Called with each new part of a response's text as it comes."""


@dataclass(frozen=True)
class Question:
    """A question, with the images it is about.

    Attributes:
        text: the question as the user would type it.
        images: images or paths of image files, in the order they are shown; they come before the text.
        system: the system prompt; None for that of the chat template.

    Raises:
        ValueError: for an empty text, and for one with a placeholder, which would be read as text.
    """

    text: str
    images: tuple[str | Path | Image, ...] = ()
    system: str | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise ValueError("The question is empty. Give it a text.")
        for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
            if placeholder in self.text:
                raise ValueError(
                    f"The question contains {placeholder}, which is not a placeholder here: images come before the text. Remove "
                    "it, and give the images apart from the text."
                )


@dataclass(frozen=True)
class Reply:
    """The response to one question, from a model in this process or on a server.

    Attributes:
        text: its text, without special tokens.
        finish_reason: ``"stop"`` if the model ended it, ``"length"`` if the token limit did, or what the server says.
        prompt_tokens: number of tokens of the prompt, with those of its images; None if the server does not say.
        completion_tokens: number of sampled tokens, with the one that ends it; None if the server does not say.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


@dataclass(frozen=True)
class Response:
    """A sampled response.

    Attributes:
        text: its text, special tokens included, without the token that ends it.
        ids: its tokens, without the token that ends it.
        finished: whether it ended before the token limit.
        prompt_tokens: number of tokens of its prompt, with those of the images.
    """

    text: str
    ids: tuple[int, ...]
    finished: bool
    prompt_tokens: int = 0

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


def check_decoding(*, n: Any = 1, temperature: Any, max_new_tokens: Any, seed: Any = 0, top_k: Any = 0, top_p: Any = 1.0) -> None:
    """Refuse settings of `Generator.generate` that have no meaning.

    Raises:
        ValueError: naming the setting, its value and what it may be; and for settings that have no effect together.
    """
    whole = {"n": (n, 1), "max_new_tokens": (max_new_tokens, 1), "seed": (seed, 0), "top_k": (top_k, 0)}
    for name, (value, least) in whole.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"Expected {name} to be a whole number of {least} or more; got {name}={value!r}.")
    for name, number in (("temperature", temperature), ("top_p", top_p)):
        real = isinstance(number, Real) and not isinstance(number, bool)
        if not real or not (0 <= number < math.inf if name == "temperature" else 0 < number <= 1):
            expected = "0 (greedy) or more" if name == "temperature" else "above 0, and 1 at most"
            raise ValueError(f"Expected {name} to be a number {expected}; got {name}={number!r}.")
    if temperature == 0 and n > 1:
        raise ValueError(f"temperature=0 gives the same response {n} times, with n={n}. Set n=1, or a temperature above 0.")
    if temperature == 0 and (top_p != 1 or top_k):
        raise ValueError(f"top_k={top_k} and top_p={top_p} have no effect at temperature=0. Leave them out, or sample.")
