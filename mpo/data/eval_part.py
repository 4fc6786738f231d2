"""Split off an evaluation part that shares no question and no image with the training part."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from mpo.data.encoded import file_state, with_encoded_images
from mpo.data.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

By = Literal["both", "image", "question"]
"""What connects two pairs, which then stay in the same part: the same question or image, the same image, the same question."""


def split_eval(
    pairs: Dataset, amount: float | int, *, seed: int = 0, by: By = "both", num_proc: int | None = None
) -> tuple[Dataset, Dataset]:
    """Split pairs into a training and an evaluation part, each in its original order, without copying them.

    `amount` is the size of the evaluation part: a fraction of the pairs below 1, or a number of pairs. Pairs that are connected
    (`By`), also through other pairs, are never split, so the part may be smaller. `num_proc` processes read images.

    Raises ValueError for an invalid amount, or when every connected component is larger than the evaluation part.
    """
    in_eval = choose_eval(pairs, amount, seed=seed, by=by, num_proc=num_proc)
    return pairs.select(np.flatnonzero(~in_eval)), pairs.select(np.flatnonzero(in_eval))


def choose_eval(
    pairs: Dataset, amount: float | int, *, seed: int = 0, by: By = "both", num_proc: int | None = None
) -> NDArray[np.bool_]:
    """Choose the evaluation pairs: a mask of shape (N,). Arguments and errors as in `split_eval`."""
    check_eval(amount, by)
    count = int(amount * len(pairs)) if 0 < amount < 1 else int(amount)
    if not 0 < count < len(pairs):
        found = f"eval_size={amount} of {len(pairs):,} records is {count:,}, but both parts need at least one"
        raise ValueError(f"{found}. Set it to a fraction below 1, or to a number that leaves some to train on.")
    keys = content_keys(pairs, num_proc=num_proc).data
    linked: list[list[Hashable]] = []
    for question, own in zip(keys.column("question").to_pylist(), keys.column("images").to_pylist(), strict=True):
        links: list[Hashable] = [("image", key) for key in own] if by != "question" else []
        if by != "image" or not links:  # without images, only the question can connect pairs
            links.append(("question", question))
        linked.append(links)
    component = components(linked)
    sizes = np.bincount(component)
    in_eval = np.zeros(len(sizes), dtype=bool)
    left = count
    for candidate in np.random.default_rng(seed).permutation(len(sizes)):
        if sizes[candidate] <= left:
            in_eval[candidate] = True
            left -= sizes[candidate]
    if left == count:
        raise ValueError(_too_large(pairs, linked, sizes, count, by))
    chosen: NDArray[np.bool_] = in_eval[component]
    return chosen


def check_eval(amount: Any, by: Any) -> None:
    """Refuse an invalid size of an evaluation part, and an unknown way to connect its pairs."""
    if by not in get_args(By):
        raise ValueError(f"Evaluation records are chosen by 'both', 'image' or 'question'; got {by!r}.")
    is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
    if not is_number or not (0 < amount < 1 or (amount >= 0 and amount % 1 == 0)):
        raise ValueError(f"eval_size must be a fraction between 0 and 1 or a whole number of records; got {amount!r}.")


def content_keys(pairs: Dataset, *, num_proc: int | None = None) -> Dataset:
    """Hash each record's question and its images and videos into int64 columns ``question`` and ``images`` (a list).

    The question of a conversation is its first. Images are read but not decoded. The result is in datasets' cache: the same records
    are read once.
    """
    features = {"question": Value("int64"), "images": List(Value("int64"))}
    title = "Reading questions and images"
    return per_record(pairs, ["prompt", "messages", "images", "videos"], _keys, features, ("content keys", 3), title, num_proc)


def per_record(
    pairs: Dataset, columns: Iterable[str], compute: Any, features: dict[str, Any], key: Any, title: str, num_proc: int | None
) -> Dataset:
    """Compute values of each record from some of its columns; ``key`` and the state of its files name the result in the cache."""
    bare = encoded(pairs, columns)
    fingerprint = Hasher.hash([bare._fingerprint, *key, file_state(bare)])
    settings = {"remove_columns": bare.column_names, "new_fingerprint": fingerprint, "num_proc": num_proc, "desc": title}
    return bare.map(compute, features=Features(features), **settings)


def encoded(pairs: Dataset, columns: Iterable[str]) -> Dataset:
    """Select the columns of records that exist, with images as dicts with ``bytes`` or ``path``."""
    there = [name for name in columns if name in pairs.column_names]
    bare: Dataset = with_encoded_images(pairs.with_format(None).select_columns(there))
    return bare


def question_text(prompt: str | Sequence[Mapping[str, Any]], between: str = "\n") -> str:
    """Render a prompt as one text: images as placeholders, and roles if there are several turns, with `between` between them.

    >>> question_text([{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "A cat?"}]}])
    '<image>A cat?'
    >>> question_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A cat?"}], " | ")
    'system: Be brief. | user: A cat?'
    """
    if isinstance(prompt, str):
        return prompt
    turns = [(message["role"], content_text(message["content"])) for message in prompt]
    return turns[0][1] if len(turns) == 1 else between.join(f"{role}: {text}" for role, text in turns)


def asked_text(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """Extract the question of a prompt: the text of the user's turns, without images and with white space normalised.

    >>> asked_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<image> A  cat? "}])
    'A cat?'
    """
    turns = [prompt] if isinstance(prompt, str) else [content_text(turn["content"]) for turn in prompt if turn["role"] == "user"]
    return " ".join("\n".join(turns).replace(IMAGE_PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").split())


def content_text(content: Any) -> str:
    """Render a message's content as text, with images as placeholders."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text") or "") if part["type"] == "text" else f"<{part['type']}>" for part in content or ())


def key_of(content: str | bytes) -> int:
    """Hash a text or the bytes of a file to a 64-bit integer."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def image_bytes(image: Mapping[str, Any]) -> bytes:
    """Return the encoded bytes of an undecoded image."""
    data = image.get("bytes")
    return Path(image["path"]).read_bytes() if data is None else bytes(data)


def shown_keys(record: Mapping[str, Any]) -> list[int]:
    """Hash the undecoded images of a record, and its videos."""
    return [key_of(image_bytes(one)) for one in record.get("images") or ()] + [video_key(one) for one in record.get("videos") or ()]


def video_key(path: str) -> int:
    """Hash a video's size and its first and last mebibyte: reading whole videos would take too long."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        first = file.read(2**20)
        file.seek(max(size - 2**20, 0))
        return key_of(b"%d:" % size + first + file.read(2**20))


def _keys(record: dict[str, Any]) -> dict[str, Any]:
    return {"question": key_of(asked_text(first_question(record))), "images": shown_keys(record)}


def first_question(record: Mapping[str, Any]) -> Any:
    """The prompt of a pair; of a conversation, all before the assistant's first turn."""
    if "prompt" in record:
        return record["prompt"]
    return list(takewhile(lambda message: message["role"] != "assistant", record["messages"]))


def components(linked: Sequence[Sequence[Hashable]]) -> NDArray[np.int64]:
    """Number the connected components of items that share a link, directly or through other items.

    >>> components([["a"], ["b"], ["a", "c"], ["c"]]).tolist()
    [0, 1, 0, 0]
    """
    from networkx.utils import UnionFind

    sets = UnionFind()
    for place, links in enumerate(linked):
        sets.union(place, *(("link", link) for link in links))
    number: dict[Any, int] = {}
    return np.array([number.setdefault(sets[place], len(number)) for place in range(len(linked))], dtype=np.int64)


def _too_large(pairs: Dataset, linked: Sequence[Sequence[Hashable]], sizes: Any, count: int, by: By) -> str:
    common, times = Counter(link for links in linked for link in links).most_common(1)[0]
    place = next(place for place, links in enumerate(linked) if common in links)
    is_question = common[0] == "question"  # type: ignore[index]  # a pair of its kind and its key
    what = f"the question {question_text(first_question(pairs[place]))[:80]!r}" if is_question else "one image"
    found = f"An evaluation part of {count:,} of {len(pairs):,} records is too small: those of one question or image stay together"
    smallest = f"and the smallest such group has {int(sizes.min()):,} records ({what} is in {times:,} records)"
    other = " Compared by images alone (by='image', --eval-by image; in a mixture eval_by: image), they may be apart."
    other = other if by == "both" and is_question else ""
    return f"{found}, {smallest}. Set a larger eval_size, or use a separate file of evaluation records.{other}"
