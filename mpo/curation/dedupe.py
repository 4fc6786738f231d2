"""Find duplicate pairs: exact ones, and near ones (found by minhash and difference hash, then compared)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from numpy.typing import NDArray
from PIL import Image

from mpo.data import similar
from mpo.data.eval_part import (
    content_text,
    encoded,
    first_question,
    image_bytes,
    key_of,
    per_record,
    question_text,
    shown_keys,
    video_key,
)
from mpo.data.images import open_image
from mpo.data.same_image import glimpse, may_be_same, same_image

VERSION = 3
"""Increase it when the same records get different signatures, so that cached ones of earlier versions are not used."""

MAX_COMPARED = 64
"""Maximum number of earlier records that a record is compared with in a group of candidates."""
SLACK = 12
"""Number of minima by which a signature may underestimate the overlap: more than six standard deviations."""


@dataclass(frozen=True)
class Duplicate:
    """Record ``index`` is a duplicate of the kept record ``same_as``; ``reason`` says why."""

    index: int
    same_as: int
    reason: str


def find_duplicates(
    pairs: Dataset, *, near: bool = True, threshold: float = 0.9, image_bits: int = 3, num_proc: int | None = None
) -> list[Duplicate]:
    """Find duplicate pairs, or conversations, in a data set; the first of each group is kept.

    Exact: the same question, images (bytes of the files), chosen and rejected completion; of a conversation, all that follows the
    first question is its completion, with equal turns, tools and calls of them. Near: the question and both completions overlap
    by `threshold`, ignoring case and punctuation, with the same numbers; and the images are the same, or copies that were
    compressed again or made slightly smaller (`mpo.data.same_image`).

    Args:
        near: whether to find near duplicates too.
        threshold: minimum Jaccard overlap of the n-grams of each of the three texts, above 0.5.
        image_bits: maximum number of the 64 bits in which the difference hashes of two images may differ, at most 3.
        num_proc: number of processes that read the records.

    Returns:
        the duplicates, sorted by index.

    Raises:
        ValueError: for a threshold or number of bits out of range, and for an image that cannot be decoded.
    """
    if not 0.5 < threshold <= 1:
        raise ValueError(f"threshold must be above 0.5 and at most 1; got {threshold}.")
    if not 0 <= image_bits < similar.BLOCKS:
        raise ValueError(f"image_bits must be from 0 to {similar.BLOCKS - 1}; got {image_bits}.")
    features = {
        "exact": Value("int64"),
        "numbers": Value("int64"),
        "looks": List(Value("int64")),
        "signature": List(Value("uint32")),
    }
    columns, title = ["id", "prompt", "chosen", "rejected", "messages", "tools", "images", "videos"], "Reading texts and images"
    signature = partial(_signature, near=near)
    hashes = per_record(pairs, columns, signature, features, ("duplicates", VERSION, near), title, num_proc)
    found = {one.index: one for one in _exact(np.asarray(hashes.data.column("exact").to_numpy()))}
    if near:
        found |= {one.index: one for one in _near(pairs, hashes, threshold, image_bits, set(found))}
    kept: dict[int, int] = {}
    for index in sorted(found):  # a duplicate of a duplicate is one of the record that is kept, which is earlier
        kept[index] = kept.get(found[index].same_as, found[index].same_as)
    return [Duplicate(index, same_as, found[index].reason) for index, same_as in kept.items()]


def without(pairs: Dataset, duplicates: list[Duplicate]) -> Dataset:
    """Select the pairs that are not duplicates, in their order, without copying them."""
    kept = np.ones(len(pairs), dtype=bool)
    kept[[one.index for one in duplicates]] = False
    return pairs.select(np.flatnonzero(kept))


def in_sides(record: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation with ``prompt``, up to the assistant's first turn, and ``completion``, the rest; a pair as it is."""
    if "messages" not in record:
        return dict(record)
    prompt = first_question(record)
    return {**record, "prompt": prompt, "completion": record["messages"][len(prompt) :]}


def texts(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the question, the chosen and the rejected completion of a pair; or the question and all else of a conversation."""
    record = in_sides(record)
    sides = [record[name] for name in ("chosen", "rejected", "completion") if name in record]
    completions = [
        side if isinstance(side, str) else "\n".join(content_text(message["content"]) for message in side) for side in sides
    ]
    return question_text(record["prompt"]), *completions


def structure(record: Mapping[str, Any]) -> str:
    """All of a conversation but texts and images, which is equal in duplicates: its turns, their calls of tools, and the tools."""
    turns = [[message["role"], message.get("tool_calls"), message.get("train")] for message in record.get("messages") or ()]
    return json.dumps([record.get("tools"), *turns])


def images_of(record: Mapping[str, Any]) -> Iterator[Image.Image]:
    """Open the images of a record, one by one. The error of one that cannot be decoded names the record and the file."""
    for place, image in enumerate(record.get("images") or (), start=1):
        yield open_image(image, where=f"record {record.get('id')!r}, image {place}")


def _signature(record: dict[str, Any], near: bool) -> dict[str, Any]:
    """Compute the exact key of one record and, for near duplicates, the signature of its texts and the hashes of its images."""
    words = texts(record)
    try:
        shown = shown_keys(record)
    except OSError as error:
        name = f"record {record.get('id')!r}: {str(error.filename)!r}"
        raise ValueError(f"{name} cannot be read ({error.strerror}). Restore the file or leave the record out.") from error
    turns = structure(record)
    exact = key_of("\0".join([*words, turns, *map(str, shown)]))
    if not near:
        return {"exact": exact, "numbers": 0, "signature": [], "looks": []}
    # Videos are compared by their files only; keys of different files differ in many bits.
    looks = [similar.difference_hash(image) for image in images_of(record)]
    looks += [video_key(video) for video in record.get("videos") or ()]
    numbers = key_of("\0".join([turns, *(" ".join(similar.numbers(text)) for text in words)]))
    signature = similar.signature(similar.normalised(" ".join(words)))
    return {"exact": exact, "numbers": numbers, "signature": signature, "looks": looks}


def _exact(keys: NDArray[np.int64]) -> Iterator[Duplicate]:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    for index in np.flatnonzero(first[inverse] != np.arange(len(keys))):
        yield Duplicate(int(index), int(first[inverse[index]]), "the same question, images and completions")


def _near(pairs: Dataset, hashes: Dataset, threshold: float, bits: int, dropped: set[int]) -> Iterator[Duplicate]:
    signatures = np.stack(hashes.with_format("numpy")[:]["signature"]).astype(np.uint64).reshape(-1, similar.SIGNATURE)
    looks = hashes.data.column("looks").to_pylist()
    first_look = np.array([own[0] if own else 0 for own in looks], dtype=np.int64).view(np.uint64)
    counts = np.array([len(own) for own in looks], dtype=np.uint64)
    same = _mixed(np.asarray(hashes.data.column("numbers").to_numpy()).view(np.uint64), counts)
    bare = encoded(pairs, ["id", "prompt", "chosen", "rejected", "messages", "images"])

    @lru_cache(maxsize=4096)
    def read(index: int) -> list[tuple[NDArray[np.uint64], list[str]]]:
        return [(similar.ngrams(similar.normalised(text)), similar.numbers(text)) for text in texts(bare[index])]

    @lru_cache(maxsize=4096)
    def glimpses(index: int) -> list[NDArray[np.int16]]:
        return [glimpse(image) for image in images_of(bare[index])]

    def same_images(one: int, other: int) -> bool:
        """Compare the pixels; called only for records that agree in all else."""
        if not all(map(may_be_same, glimpses(one), glimpses(other))):
            return False
        first, second = bare[one], bare[other]
        return _files(first) == _files(second) or all(map(same_image, images_of(first), images_of(second)))

    tried: set[tuple[int, int]] = set()
    for band in range(similar.BANDS):
        key = same
        for row in range(similar.ROWS):
            key = _mixed(key, signatures[:, band * similar.ROWS + row])
        for block in range(similar.BLOCKS):
            own = _mixed(key, (first_look >> np.uint64(16 * block)) & np.uint64(0xFFFF))
            for group in _groups(own):
                kept: list[int] = []
                for index in group:
                    if index in dropped:
                        continue
                    for other in kept[-MAX_COMPARED:]:
                        if (other, index) in tried:
                            continue
                        tried.add((other, index))
                        if int((signatures[other] == signatures[index]).sum()) < similar.SIGNATURE * threshold - SLACK:
                            continue
                        reason = _alike(read(other), read(index), looks[other], looks[index], threshold, bits)
                        if reason is not None and same_images(other, index):
                            dropped.add(index)
                            yield Duplicate(index, other, reason)
                            break
                    else:
                        kept.append(index)


def _files(record: Mapping[str, Any]) -> list[int]:
    return [key_of(image_bytes(image)) for image in record.get("images") or ()]


def _mixed(key: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mixed: NDArray[np.uint64] = (key * np.uint64(0x9E3779B97F4A7C15)) ^ (values + np.uint64(0x632BE59BD9B4E019))
    return mixed


def _groups(keys: NDArray[np.uint64]) -> Iterator[list[int]]:
    """Yield the sorted indices of each key that occurs more than once."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    ends = np.append(starts[1:], len(order))
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        yield [int(index) for index in order[start:end]]


def _alike(one: Any, other: Any, looks: list[int], other_looks: list[int], threshold: float, bits: int) -> str | None:
    if len(looks) != len(other_looks):
        return None
    apart = max((similar.differing_bits(a, b) for a, b in zip(looks, other_looks, strict=True)), default=0)
    if apart > bits or any(a[1] != b[1] for a, b in zip(one, other, strict=True)):
        return None
    least = min(similar.overlap(a[0], b[0]) for a, b in zip(one, other, strict=True))
    if least < threshold:
        return None
    seen = ", images that look the same" if looks else ""
    return f"texts that overlap by {least:.0%} or more{seen}"
