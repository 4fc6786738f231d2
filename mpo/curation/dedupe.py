"""Find duplicate pairs: exact ones, and near ones (found by minhash and difference hash, then compared)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, List, Value
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from mpo.data import load_conversations, load_preferences, load_questions, similar
from mpo.data.eval_part import (
    asked_text,
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
from mpo.data.similar import glimpse, may_be_same, same_image

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
    compressed again or made slightly smaller (`mpo.data.similar`).

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
    exact = repeated(np.asarray(hashes.data.column("exact").to_numpy()))
    found = {index: Duplicate(index, same_as, "the same question, images and completions") for index, same_as in exact}
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


def repeated(keys: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The places of keys that were there before, each with the first place of its key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return [(place, int(earlier)) for place, earlier in enumerate(first[inverse]) if earlier != place]


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
    return f"texts that overlap by {least:.0%} or more{', images that look the same' if looks else ''}"


# Questions of a benchmark in training data


THRESHOLD = 0.8
"""Minimum overlap of the 5-grams of two questions that are near duplicates; their numbers are the same."""
BITS = similar.BLOCKS - 1
"""Maximum number of differing bits of the hashes of two images whose pixels are compared."""
COARSE_APART = 12
"""Maximum difference (of 255 levels) of the pixels of two images shrunk to 8 x 8 that count as one: of copies a fourth as wide it
is up to 9, of different pages with nearly equal hashes 17 or more."""
SHOWN = 20


def training_records(path: str | Path) -> Iterator[dict[str, Any]]:
    """Read training data of any kind for `find_contamination`: pairs, conversations (a record for each question), or questions.

    Raises:
        ValueError: for what is none of these; the message is that of the kind whose images were not found, or else that of pairs.
    """
    problems: list[str] = []
    data: Any = None
    for load in (load_preferences, load_conversations, _questions):
        try:
            data = load(path)
            break
        except ValueError as error:
            problems.append(str(error))
    else:
        of_images = [problem for problem in problems if "image_root" in problem]
        advice = " In --train, a mixture file (YAML) can give it for each source."
        raise ValueError(f"{of_images[0]}{advice}" if of_images else problems[0])
    for record in data:
        for turn in [record["prompt"]] if "prompt" in record else [[one] for one in record["messages"] if one["role"] == "user"]:
            yield {"id": record["id"], "prompt": turn, "images": record.get("images")}


def _questions(path: str | Path) -> list[dict[str, Any]]:
    return [{"id": one.id, "prompt": one.messages, "images": one.images} for one in load_questions(path)]


def find_contamination(pairs: Iterable[Mapping[str, Any]], questions: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Find questions of a benchmark that training data have: the text, an image, or both.

    Images are compared when shrunk to a few pixels, so that smaller and compressed copies are found, and charts that differ in a
    label alone: unlike in removing duplicates, it is a missed one that does harm.

    Args:
        pairs: training records: ``prompt`` and ``images``, as `mpo.data.load_preferences` gives them, or `training_records`.
        questions: the questions as records: ``id``, ``messages`` and ``images``.

    Returns:
        ``questions`` and ``images``: how many of the benchmark's questions have an equal or near-equal text, or image, in training;
        ``both``: in the same training record; ``total``; ``found``: the first 20 of these, with the ids of both sides.

    Raises:
        ValueError: for an image that cannot be decoded.
    """
    asked: list[tuple[str, Any, list[str]]] = []
    bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    looks: dict[tuple[int, int], list[tuple[int, int, Any]]] = defaultdict(list)
    names: list[str] = []
    for place, record in enumerate(questions):
        words = similar.normalised(asked_text(record["messages"]))
        asked.append((words, similar.ngrams(words), similar.numbers(words)))
        names.append(record["id"])
        for band in _bands(words):
            bands[band].append(place)
        for image in record.get("images") or ():
            opened = open_image(image, where=f"question {record['id']!r}")
            look, seen = similar.difference_hash(opened), _coarse(opened)
            for block in _blocks(look):
                looks[block].append((place, look, seen))
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for record in tqdm(pairs, desc="Comparing with training data", unit="record", disable=None):
        words = similar.normalised(asked_text(record["prompt"]))
        own, numbers, same = similar.ngrams(words), similar.numbers(words), set[int]()
        for place in {place for band in _bands(words) for place in bands.get(band, ())}:
            text, ngrams, others = asked[place]
            if text == words or (others == numbers and similar.overlap(ngrams, own) >= THRESHOLD):
                same.add(place)
        shown: set[int] = set()
        for image in images_of(record) if looks else ():
            look, seen = similar.difference_hash(image), _coarse(image)
            near = [one for block in _blocks(look) for one in looks.get(block, ()) if similar.differing_bits(look, one[1]) <= BITS]
            shown.update(place for place, _, other in near if np.abs(seen - other).max() <= COARSE_APART)
        for kind, places in (("question", same), ("image", shown), ("both", same & shown)):
            for place in places:
                found[place].setdefault(kind, str(record.get("id")))
    kinds = {"questions": "question", "images": "image", "both": "both"}
    counts = {name: sum(kind in one for one in found.values()) for name, kind in kinds.items()}
    first = sorted(found, key=lambda place: ("both" not in found[place], place))[:SHOWN]
    return {**counts, "total": len(names), "found": [{"id": names[place], **found[place]} for place in first]}


def _coarse(image: Image.Image) -> NDArray[np.float64]:
    side = similar.GLIMPSE // 8
    return np.asarray(glimpse(image).reshape(8, side, 8, side, 3).mean((1, 3)))


def _bands(words: str) -> Iterator[tuple[int, bytes]]:
    values = np.asarray(similar.signature(words)).reshape(similar.BANDS, similar.ROWS)
    return ((band, row.tobytes()) for band, row in enumerate(values))


def _blocks(look: int) -> Iterator[tuple[int, int]]:
    return ((block, (look >> (16 * block)) & 0xFFFF) for block in range(similar.BLOCKS))
