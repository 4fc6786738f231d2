"""The interface of text generators: requests in, responses out, from a model in this process or on a server."""

import math
import re
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from numbers import Integral, Real
from typing import Any, Protocol, Self

from mpo.data.messages import IMAGE_PLACEHOLDER, PLACES, VIDEO_PLACEHOLDER, checked_text, prompt_messages
from mpo.schema import Message

OnText = Callable[[str], None]
"""Called with each new part of a response's text as it comes."""


@dataclass(frozen=True)
class Request:
    """What a model is asked.

    Attributes:
        messages: chat messages that end with a turn of the user (or a tool); a content is text, or parts, among which images and
            videos are placeholders, ``{"type": "image"}``, in order. They are read as a record's prompt is
            (`mpo.data.messages.prompt_messages`): ``<image>`` in a text is a placeholder too, and without any, images come first.
            Afterwards all contents are parts.
        images: PIL images, paths of image files, or encoded bytes, one per placeholder.
        prefix: the start of the assistant's response, which the model goes on from; None or empty for no prefix.
        metadata: carried along untouched.
        videos: paths of videos, one per placeholder.

    Raises:
        ValueError: for messages without a turn to respond to, for placeholders that do not match the images, and for URLs.
    """

    messages: Sequence[Message]
    images: Sequence[Any] = ()
    prefix: str | None = None
    metadata: Any = None
    videos: Sequence[Any] = ()

    def __post_init__(self) -> None:
        for name in ("images", "videos"):
            given = getattr(self, name)
            if isinstance(given, str | bytes) or not isinstance(given, Sequence):
                raise ValueError(f"Expected a list of {name}; got {given!r:.60}. Give a list, also of one.")
            for place, one in enumerate(given, start=1):
                path = one.get("path") if isinstance(one, Mapping) else one
                if isinstance(path, str) and (found := re.match(r"data:|[a-zA-Z][\w+.-]*://", path)):
                    shown = path if found[0] != "data:" else path[:30] + "..."
                    raise ValueError(
                        f"{name[:-1]} {place} of {len(given)} is a URL, {shown:.200}, and nothing is downloaded. Give the path of "
                        "its file, or an image's bytes."
                    )
        if self.prefix and not checked_text(self.prefix, "prefix").strip():
            raise ValueError(f"Expected the prefix to be text that is not all white space, or None; got prefix={self.prefix!r}.")
        messages = self.messages if isinstance(self.messages, str) else list(self.messages)
        if not messages:
            raise ValueError("The request has no messages. Give it one of the user.")
        checked = prompt_messages(messages, "the request", {"image": len(self.images), "video": len(self.videos)})
        if (last := checked[-1]["role"]) not in PLACES:
            remedy = "Leave it out; to continue its text, give that as prefix=." if last == "assistant" else "Add the user's."
            raise ValueError(f"The request ends with a message of the {last}, not the user. {remedy}")
        object.__setattr__(self, "messages", checked)

    @classmethod
    def ask(
        cls,
        text: str,
        *,
        images: Sequence[Any] = (),
        system: str | None = None,
        prefix: str | None = None,
        videos: Sequence[Any] = (),
    ) -> Self:
        """Make a request of one question, with its images and videos before its text.

        Args:
            text: the question as a user would type it.
            images, prefix, videos: as in `Request`.
            system: the system prompt; None for that of the chat template.

        Raises:
            ValueError: for an empty text, and one with a placeholder.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError("The question is empty. Give it text.")
        if found := next((one for one in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if one in text), None):
            raise ValueError(
                f"The question contains {found}, which is not a placeholder here: images come before the text. Remove it, and give "
                "the images apart from the text."
            )
        content = [*[{"type": "image"}] * len(images), *[{"type": "video"}] * len(videos), {"type": "text", "text": text}]
        first = [] if system is None else [{"role": "system", "content": system}]
        return cls([*first, {"role": "user", "content": content}], images, prefix, videos=videos)


@dataclass(frozen=True)
class Response:
    """The response to a request.

    Attributes:
        text: its text, without special tokens and without the request's prefix.
        finish_reason: ``"stop"`` if the model ended it, ``"length"`` if the token limit did, or what the server says.
        prompt_tokens: number of tokens of the prompt, with those of its images; None if the server does not say.
        completion_tokens: number of sampled tokens, with the one that ends it; None if the server does not say, as for one of
            several samples that did not reach the token limit.
        logprobs: log-probs of the sampled tokens, on demand.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    logprobs: tuple[float, ...] | None = None


class GenerationError(ValueError):
    """A request that got no response, and will get none if it is asked again, for this `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


Item = Request | tuple[Request, Sequence[int]]
"""A request of a stream, alone or with the numbers of its samples that are wanted; alone it means 0 to n - 1."""
_COUNTING = threading.Lock()


class Generator(Protocol):
    """A model that responds to requests, in this process or on a server."""

    def generate(self, requests: Sequence[Request], **settings: Any) -> list[list[Response]]:
        """Sample `n` responses to every request.

        Args:
            requests: what to ask.
            settings: those of `Decoding`, which says what each means: n, temperature, top_p, top_k, max_new_tokens, stop, seed,
                logprobs.

        Returns:
            For each request, in order, its `n` responses.

        Raises:
            ValueError: for invalid arguments, and for a request that cannot be asked, such as for an image that is gone.
            GenerationError: for a request that the server refuses.
            ConnectionError: for a server that cannot be reached or used at all.
        """
        ...

    def stream(
        self, requests: Iterable[Item] | AsyncIterable[Item], *, concurrency: int | None = None, **settings: Any
    ) -> AsyncIterator[tuple[int, int, Response | GenerationError]]:
        """Sample responses to requests that are taken one by one, a bounded number ahead.

        Args:
            requests: what to ask. One may come with the numbers of its samples that are wanted, as ``(request, (1, 3))``, where
                the others are there already; otherwise they are 0 to `n` - 1.
            concurrency: the largest number of requests of the generator at the same time, those of other calls included; None for
                its own.
            settings: those of `generate`.

        Yields:
            the number of the request (from 0), that of the sample, and the response, each as it comes, in any order. A request that
            fails for good yields its `GenerationError` for every sample that is missing, and the others go on.

        Raises:
            ValueError: for invalid arguments.
            ConnectionError: for a server that cannot be reached or used at all: no server, another model, a wrong key.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """What identifies the model in a ledger: its name or a fingerprint of its weights; no keys, no addresses."""
        ...


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """The settings of `Generator.generate`, checked.

    Raises ValueError naming the setting, its value and what it may be; and for settings that have no effect together.
    """

    n: int = 1  # responses per request
    temperature: float = 1.0  # 0 is greedy, 1 samples from the model's own distribution
    top_p: float = 1.0  # sample from the smallest set of most likely tokens with this total probability
    top_k: int = 0  # sample from the `top_k` most likely tokens; 0 for all
    max_new_tokens: int = 1024  # the longest response, in tokens; a longer one is truncated
    stop: Sequence[str] = ()  # texts that end a response; they are not part of it
    seed: int = 0  # random seed of the sampling
    logprobs: bool = False  # return the log-probs of the sampled tokens

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_new_tokens", 1), ("seed", 0), ("top_k", 0)):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name in ("temperature", "top_p"):
            number = getattr(self, name)
            real = isinstance(number, Real) and not isinstance(number, bool)
            if not real or not (0 <= number < math.inf if name == "temperature" else 0 < number <= 1):
                expected = "0 (greedy) or more" if name == "temperature" else "above 0, and 1 at most"
                raise ValueError(f"Expected {name} to be a number {expected}; got {name}={number!r}.")
            object.__setattr__(self, name, float(number))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"Expected stop to be texts that end a response, none of them empty; got stop={self.stop!r}.")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.logprobs, bool):
            raise ValueError(f"Expected logprobs to be True or False; got logprobs={self.logprobs!r}.")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(
                f"temperature=0 gives the same response {self.n} times, with n={self.n}. Set n=1, or a temperature above 0."
            )
        if self.temperature == 0 and (self.top_p != 1 or self.top_k):
            raise ValueError(
                f"top_k={self.top_k} and top_p={self.top_p} have no effect at temperature=0. Leave them out, or sample."
            )

    def before_stop(self, text: str) -> str:
        """The text up to the first of the texts that end it."""
        return text[: min((place for stop in self.stop if (place := text.find(stop)) >= 0), default=len(text))]

    def samples_of(self, item: Item) -> tuple[Request, tuple[int, ...]]:
        """The request of a stream's item, and the numbers of its samples that are wanted. Raises ValueError for anything else."""
        if isinstance(item, Request):
            return item, tuple(range(self.n))
        request, samples = item if isinstance(item, tuple) and len(item) == 2 else (item, ())
        if not isinstance(request, Request):
            raise ValueError(f"Expected a Request, alone or as (request, sample numbers); got {item!r:.80}.")
        numbers = tuple(samples) if isinstance(samples, Iterable) else (None,)
        whole = all(isinstance(one, Integral) and not isinstance(one, bool) and one >= 0 for one in numbers)
        if not whole or len({*numbers}) < len(numbers):
            raise ValueError(f"Expected different sample numbers from 0 on; got {samples!r:.80}.")
        return request, numbers


@dataclass
class Usage:
    """What a generator has used so far.

    A request for several samples of a prompt counts once, as does one that finds out what a server can do. Attempts are `lost`
    whose response did not come or was broken (timeouts, connections, interruptions): servers may charge for them, and their tokens
    are in none of the numbers.
    """

    prices: tuple[float, float] | None = None  # of a million prompt and a million completion tokens; None if nothing is charged
    requests: int = 0  # that were answered
    responses: int = 0
    prompt_tokens: int = 0  # of all requests, as the generator counts them
    completion_tokens: int = 0
    unknown: int = 0  # requests whose tokens the server did not say
    lost: int = 0

    @property
    def cost(self) -> float | None:
        """The price of all tokens so far; None without prices."""
        if self.prices is None:
            return None
        return (self.prompt_tokens * self.prices[0] + self.completion_tokens * self.prices[1]) / 1e6

    def add(self, responses: int, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """Count a request that was answered."""
        with _COUNTING:
            self.requests += 1
            self.responses += responses
            self.prompt_tokens += prompt_tokens or 0
            self.completion_tokens += completion_tokens or 0
            self.unknown += prompt_tokens is None or completion_tokens is None


def checked_requests(requests: Any) -> list[Request]:
    """The requests of `Generator.generate` as a list. Raises ValueError for anything but several requests."""
    given = list(requests) if isinstance(requests, Iterable) and not isinstance(requests, str | bytes) else None
    if given is None or not all(isinstance(one, Request) for one in given):
        wrong = requests if given is None else next(one for one in given if not isinstance(one, Request))
        raise ValueError(f"Expected a list of requests, such as [Request.ask('What is it?')]; got {wrong!r:.80}.")
    return given


async def numbered(items: Iterable[Item] | AsyncIterable[Item]) -> AsyncIterator[tuple[int, Item]]:
    """Number the items of a stream from 0, as they are taken."""
    numbers = count()
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield next(numbers), item
    else:
        for item in items:
            yield next(numbers), item


def whole_number(name: str, value: Any, least: int = 1, *, optional: bool = False) -> Any:
    """A setting that is a whole number, or None where that is allowed. Raises ValueError naming it, its value and the least."""
    if optional and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"Expected {name} to be a whole number of {least} or more; got {name}={value!r}.")
    return int(value)


def is_server(model: str) -> bool:
    """Whether a model is at a server's address."""
    return re.match("https?://", model, re.IGNORECASE) is not None


def first_error(group: BaseException) -> BaseException:
    """The first error of a group, also of groups in it; an error alone is itself."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group
