"""Pairs held out for evaluation, with no question and no image on both sides."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from mpo.data.encoded import with_encoded_images
from mpo.data.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

By = Literal["both", "image", "question"]
"""What keeps pairs on one side: the same question or image, the same image, the same question."""


def split_eval(
    pairs: Dataset, amount: float | int, *, seed: int = 0, by: By = "both", num_proc: int | None = None
) -> tuple[Dataset, Dataset]:
    """Split pairs into those to train on and those to evaluate on, neither copied.

    Args:
        pairs: records.
        amount: of pairs to hold out: a share below 1, or a number. What hangs together is never split, so there may be fewer.
        seed: of the choice.
        by: which pairs hang together: those with the same question or the same image (``"both"``, through other pairs too), or
            by one of the two alone.
        num_proc: processes that read images.

    Returns:
        the pairs to train on, and those held out, each in their order.

    Raises:
        ValueError: for an amount that is none, or when nothing can be held out because too much hangs together.
    """
    held = choose_eval(pairs, amount, seed=seed, by=by, num_proc=num_proc)
    return pairs.select(np.flatnonzero(~held)), pairs.select(np.flatnonzero(held))


def choose_eval(
    pairs: Dataset, amount: float | int, *, seed: int = 0, by: By = "both", num_proc: int | None = None
) -> NDArray[np.bool_]:
    """Which pairs to hold out, shape (N,); arguments and errors as of `split_eval`."""
    check_eval(amount, by)
    count = int(amount * len(pairs)) if 0 < amount < 1 else int(amount)
    if not 0 < count < len(pairs):
        raise ValueError(
            f"eval_size={amount} of {len(pairs):,} pairs is {count:,}. Give a share between 0 and 1 or a number of pairs, so that "
            "some are held out and some are left to train on."
        )
    keys = content_keys(pairs, num_proc=num_proc)
    questions = keys.data.column("question").to_pylist()
    images = keys.data.column("images").to_pylist()
    linked: list[list[Hashable]] = []
    for question, own in zip(questions, images, strict=True):
        links: list[Hashable] = [("image", key) for key in own] if by != "question" else []
        if by != "image" or not links:  # without an image, the question is all there is to know a pair by
            links.append(("question", question))
        linked.append(links)
    part = components(linked)
    sizes = np.bincount(part)
    held = np.zeros(len(sizes), dtype=bool)
    left = count
    for candidate in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[candidate] <= left:
            held[candidate] = True
            left -= sizes[candidate]
    if left == count:
        raise ValueError(_too_large(pairs, linked, sizes, count, by))
    chosen: NDArray[np.bool_] = held[part]
    return chosen


def check_eval(amount: Any, by: Any) -> None:
    """Refuse what is no share or number of pairs, and nothing to hold them out by.

    Raises:
        ValueError: with what was expected.
    """
    if by not in ("both", "image", "question"):
        raise ValueError(f"Pairs are held out by 'both', 'image' or 'question', not {by!r}.")
    is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
    if not is_number or not (0 < amount < 1 or (amount >= 0 and amount % 1 == 0)):
        raise ValueError(f"eval_size is a share between 0 and 1 or a whole number of pairs; got {amount!r}.")


def content_keys(pairs: Dataset, *, num_proc: int | None = None) -> Dataset:
    """Keys of each record's question and of its images and videos: columns ``question`` and ``images`` (a list), int64.

    Images are read and not decoded. The result is in datasets' cache: the same records are read once.
    """
    bare = encoded(pairs, ["prompt", "images", "videos"])
    return bare.map(
        _keys,
        remove_columns=bare.column_names,
        features=Features({"question": Value("int64"), "images": List(Value("int64"))}),
        new_fingerprint=Hasher.hash([bare._fingerprint, "content keys", 2]),
        num_proc=num_proc,
        desc="Reading questions and images",
    )


def encoded(pairs: Dataset, columns: Iterable[str]) -> Dataset:
    """Some columns of records, those that there are, their images as dicts with ``bytes`` or ``path``."""
    bare: Dataset = with_encoded_images(
        pairs.with_format(None).select_columns([name for name in columns if name in pairs.column_names])
    )
    return bare


def question_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """A prompt as one text: images as marks, roles named where there are several turns.

    >>> question_text([{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "A cat?"}]}])
    '<image>A cat?'
    """
    if isinstance(prompt, str):
        return prompt
    turns = [(message["role"], content_text(message["content"])) for message in prompt]
    return turns[0][1] if len(turns) == 1 else "\n".join(f"{role}: {text}" for role, text in turns)


def asked_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """What makes two prompts the same question: the text of the user's turns, whatever its white space, images and other turns.

    >>> asked_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image> A  cat? "}])
    'A cat?'
    """
    turns = [prompt] if isinstance(prompt, str) else [content_text(turn["content"]) for turn in prompt if turn["role"] == "user"]
    return " ".join("\n".join(turns).replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").split())


def content_text(content: Any) -> str:
    """A message's content as text, images as marks."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") if part["type"] == "text" else f"<{part['type']}>" for part in content or ())


def key_of(content: str | bytes) -> int:
    """A number of 64 bits for a text or the bytes of a file."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def image_bytes(image: Mapping[str, Any]) -> bytes:
    """The file of an undecoded image."""
    data = image.get("bytes")
    return Path(image["path"]).read_bytes() if data is None else bytes(data)


def shown_keys(record: Mapping[str, Any]) -> list[int]:
    """Keys of the undecoded images of a record, and of its videos."""
    return [key_of(image_bytes(one)) for one in record.get("images") or ()] + [video_key(one) for one in record.get("videos") or ()]


def video_key(path: str) -> int:
    """A key of a video's size, first and last mebibyte: whole videos would take too long to read."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        first = file.read(2**20)
        file.seek(max(size - 2**20, 0))
        return key_of(b"%d:" % size + first + file.read(2**20))


def _keys(record: dict[str, Any]) -> dict[str, Any]:
    return {"question": key_of(asked_text(record["prompt"])), "images": shown_keys(record)}


def components(linked: Sequence[Sequence[Hashable]]) -> NDArray[np.int64]:
    """Number the groups of things that share a link, directly or through others.

    >>> components([["a"], ["b"], ["a", "c"], ["c"]]).tolist()
    [0, 1, 0, 0]
    """
    above = list(range(len(linked)))

    def top(place: int) -> int:
        while above[place] != place:
            above[place] = above[above[place]]
            place = above[place]
        return place

    first: dict[Hashable, int] = {}
    for place, links in enumerate(linked):
        for link in links:
            one, other = top(first.setdefault(link, place)), top(place)
            above[max(one, other)] = min(one, other)
    return np.unique([top(place) for place in range(len(linked))], return_inverse=True)[1]


def _too_large(pairs: Dataset, linked: Sequence[Sequence[Hashable]], sizes: Any, count: int, by: By) -> str:
    common, times = Counter(link for links in linked for link in links).most_common(1)[0]
    place = next(place for place, links in enumerate(linked) if common in links)
    kind: Callable[[Any], str] = lambda link: link[0]  # noqa: E731
    what = f"the question {question_text(pairs[place]['prompt'])[:80]!r}" if kind(common) == "question" else "one image"
    other = " by='image' looks at images alone." if by == "both" and kind(common) == "question" else ""
    return (
        f"{count:,} of {len(pairs):,} pairs cannot be held out: pairs with the same question or image stay together, and the "
        f"smallest group of them has {int(sizes.min()):,} ({what} is in {times:,} pairs). Hold out more, or give a file of other "
        f"pairs to evaluate on.{other}"
    )
