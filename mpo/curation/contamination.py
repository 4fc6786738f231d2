"""Whether training data contain the questions or images of a benchmark, equal or nearly so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from mpo.curation.dedupe import images_of
from mpo.data import load_conversations, load_preferences, load_questions, similar
from mpo.data.eval_part import asked_text
from mpo.data.images import open_image
from mpo.data.same_image import same_image

THRESHOLD = 0.8
"""Minimum overlap of the 5-grams of two questions that are near duplicates; their numbers are the same."""
BITS = similar.BLOCKS - 1
"""Maximum number of differing bits of the hashes of two images whose pixels are compared."""
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

    Args:
        pairs: training records: ``prompt`` and ``images``, as `mpo.data.load_preferences` gives them, or `training_records`.
        questions: the questions as records: ``id``, ``messages`` and ``images``.

    Returns:
        ``questions`` and ``images``: how many of the benchmark's questions have an equal or near-equal text, or image, in training;
        ``both``: in the same training record; ``total``; ``found``: the first 20 of these, with the ids of both sides.

    Raises:
        ValueError: for an image that cannot be decoded.
    """
    texts: list[tuple[str, Any, list[str]]] = []
    bands: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    looks: dict[tuple[int, int], list[tuple[int, int, Any]]] = defaultdict(list)
    names: list[str] = []
    for place, record in enumerate(questions):
        words = similar.normalised(asked_text(record["messages"]))
        texts.append((words, similar.ngrams(words), similar.numbers(words)))
        names.append(record["id"])
        for band in _bands(words):
            bands[band].append(place)
        for image in record.get("images") or ():
            look = similar.difference_hash(open_image(image, where=f"question {record['id']!r}"))
            for block in _blocks(look):
                looks[block].append((place, look, image))
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for record in tqdm(pairs, desc="Comparing with training data", unit="record", disable=None):
        words = similar.normalised(asked_text(record["prompt"]))
        own = similar.ngrams(words)
        asked = {place for band in _bands(words) for place in bands.get(band, ())}
        same = {
            place
            for place in asked
            if texts[place][0] == words
            or (texts[place][2] == similar.numbers(words) and similar.overlap(texts[place][1], own) >= THRESHOLD)
        }
        shown: set[int] = set()
        for image in images_of(record) if looks else ():
            look = similar.difference_hash(image)
            near = [one for block in _blocks(look) for one in looks.get(block, ()) if similar.differing_bits(look, one[1]) <= BITS]
            for place, _, other in near:
                if place not in shown and same_image(image, open_image(other)):
                    shown.add(place)
        for kind, places in (("question", same), ("image", shown), ("both", same & shown)):
            for place in places:
                found[place].setdefault(kind, str(record.get("id")))
    counts = {
        f"{kind}s" if kind != "both" else kind: sum(kind in one for one in found.values()) for kind in ("question", "image", "both")
    }
    listed = [
        {"id": names[place], **found[place]} for place in sorted(found, key=lambda place: ("both" not in found[place], place))
    ]
    return {**counts, "total": len(names), "found": listed[:SHOWN]}


def _bands(words: str) -> Iterator[tuple[int, bytes]]:
    values = np.asarray(similar.signature(words)).reshape(similar.BANDS, similar.ROWS)
    return ((band, row.tobytes()) for band, row in enumerate(values))


def _blocks(look: int) -> Iterator[tuple[int, int]]:
    return ((block, (look >> (16 * block)) & 0xFFFF) for block in range(similar.BLOCKS))
