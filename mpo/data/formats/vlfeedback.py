"""Read VLFeedback: pairs, with a margin, from the completions of several models to a prompt, each rated in three aspects.

The rating of a completion is the mean over the aspects. Of two completions, the one with the higher rating is chosen, and the
margin is the difference. Completions with equal ratings or equal texts make no pair. Lines without a pair, and pairs beyond
`MAX_PAIRS`, are counted and reported. (Silkie, arXiv 2312.10665.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from mpo.data.pairs import FoundPair, one_of, rest
from mpo.io import BadRecord, json_kind

NAME = "vlfeedback"
NEEDS = "prompt, completions (each with response and annotations), img_path or image"
ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
MAX_PAIRS = 6
"""Maximum pairs per prompt: all pairs of four completions; of more completions, the pairs with the largest margins."""
MAX_RESPONSES = 64
_USED = ("prompt", "completions", "img_path", "image", "system", "id", "models")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line is in this format."""
    return "completions" in line


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """Read the pairs of a line, those with the largest margin first."""
    completions = _completions(line.get("completions"))
    ratings = [_rating(completion, place) for place, completion in enumerate(completions)]
    texts = [completion.get("response") for completion in completions]
    ranked = [
        (abs(ratings[one] - ratings[other]), *((one, other) if ratings[one] > ratings[other] else (other, one)))
        for one, other in combinations(range(len(completions)), 2)
        if ratings[one] != ratings[other] and texts[one] != texts[other]
    ]
    ranked.sort(key=lambda pair: -pair[0])
    image = one_of(line, "img_path", "image")
    taken = ranked[:MAX_PAIRS]
    for place, (margin, better, worse) in enumerate(taken, start=1):
        models = {f"{side}_model": completions[at].get("model") for side, at in (("chosen", better), ("rejected", worse))}
        yield FoundPair(
            prompt=line.get("prompt"),
            chosen=texts[better],
            rejected=texts[worse],
            images=image,
            system=line.get("system"),
            id=None if line.get("id") is None else f"{line['id']}/{better}-{worse}",
            margin=margin,
            metadata={**rest(line, _USED), **models, "chosen_rating": ratings[better], "rejected_rating": ratings[worse]},
            dropped=len(ranked) - len(taken) if place == len(taken) else 0,
        )


def _completions(given: Any) -> list[Mapping[str, Any]]:
    """Check the completions: a list of objects or, as datasets may store it, an object of lists."""
    if isinstance(given, Mapping):
        columns = {name: value for name, value in given.items() if isinstance(value, list)}
        lengths = {len(value) for value in columns.values()}
        if len(columns) < len(given) or len(lengths) != 1:
            raise BadRecord(
                "",
                "'completions' is an object whose fields are not lists of one length. Give a list of objects, one per completion.",
            )
        given = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise BadRecord("", f"'completions' must be a list, each an object; got {json_kind(given)}.")
    if not 2 <= len(given) <= MAX_RESPONSES:
        raise BadRecord("", f"'completions' has {len(given)} entries; expected 2 to {MAX_RESPONSES}.")
    return given


def _rating(completion: Mapping[str, Any], place: int) -> float:
    annotations = completion.get("annotations")
    if not isinstance(annotations, Mapping):
        raise BadRecord("", f"entry {place + 1} of 'completions' has no object 'annotations'.")
    total = 0.0
    for aspect in ASPECTS:
        given = annotations.get(aspect)
        rating = given.get("Rating") if isinstance(given, Mapping) else given
        try:
            value = float(rating) if isinstance(rating, (str, int, float)) and not isinstance(rating, bool) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise BadRecord(
                "", f"entry {place + 1} of 'completions' has no number as its rating of {aspect!r}. Fix it or leave the record out."
            )
        total += value
    return total / len(ASPECTS)
