"""VLFeedback: the answers of several models to a prompt, each rated in three aspects -> pairs, with a margin.

An answer's rating is the mean over the aspects; of two answers the one with the higher rating is chosen, and the margin is the
difference. Two with the same rating, or the same text, make no pair; lines without a pair, and pairs beyond `MAX_PAIRS`, are
counted and told. (Silkie, arXiv 2312.10665.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from mpo.data.pairs import BadRecord, FoundPair, json_kind, one_of, rest

NAME = "vlfeedback"
NEEDS = "prompt, completions (each with response and annotations), img_path or image"
ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
MAX_PAIRS = 6
"""Of a prompt: all of four answers. Of more answers, those pairs with the largest margins."""
MAX_RESPONSES = 64
_USED = ("prompt", "completions", "img_path", "image", "system", "id", "models")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line looks like it."""
    return "completions" in line


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """The pairs of a line, those with the largest margin first."""
    answers = _answers(line.get("completions"))
    ratings = [_rating(answer, place) for place, answer in enumerate(answers)]
    texts = [answer.get("response") for answer in answers]
    ranked = [
        (abs(ratings[one] - ratings[other]), *((one, other) if ratings[one] > ratings[other] else (other, one)))
        for one, other in combinations(range(len(answers)), 2)
        if ratings[one] != ratings[other] and texts[one] != texts[other]
    ]
    ranked.sort(key=lambda pair: -pair[0])
    image = one_of(line, "img_path", "image")
    taken = ranked[:MAX_PAIRS]
    for place, (margin, better, worse) in enumerate(taken, start=1):
        models = {f"{side}_model": answers[at].get("model") for side, at in (("chosen", better), ("rejected", worse))}
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


def _answers(completions: Any) -> list[Mapping[str, Any]]:
    """The answers: a list of objects, or as datasets may hold it, an object of lists."""
    if isinstance(completions, Mapping):
        columns = {name: value for name, value in completions.items() if isinstance(value, list)}
        lengths = {len(value) for value in columns.values()}
        if len(columns) < len(completions) or len(lengths) != 1:
            raise BadRecord("", "'completions' is an object whose fields are not lists of one length.")
        completions = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(completions, list) or not all(isinstance(answer, Mapping) for answer in completions):
        raise BadRecord("", f"'completions' is a list of answers, each an object; got {json_kind(completions)}.")
    if not 2 <= len(completions) <= MAX_RESPONSES:
        raise BadRecord("", f"'completions' has {len(completions)} answers, and pairs are made of 2 to {MAX_RESPONSES}.")
    return completions


def _rating(answer: Mapping[str, Any], place: int) -> float:
    annotations = answer.get("annotations")
    if not isinstance(annotations, Mapping):
        raise BadRecord("", f"answer {place + 1} of 'completions' has no annotations.")
    total = 0.0
    for aspect in ASPECTS:
        given = annotations.get(aspect)
        rating = given.get("Rating") if isinstance(given, Mapping) else given
        try:
            value = float(rating) if isinstance(rating, (str, int, float)) and not isinstance(rating, bool) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise BadRecord("", f"answer {place + 1} of 'completions' has no number as its rating of {aspect!r}.")
        total += value
    return total / len(ASPECTS)
