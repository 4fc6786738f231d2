"""Several responses to one question: what they agree on, and how good the best of k of them are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mpo.schema import Question
from mpo.verification import final_answer, match
from mpo.verification.matching import detect_kind

MAX_SUBSETS = 5000
"""More subsets than these are drawn at random instead of all taken."""


def answer_classes(responses: Sequence[str], question: Question) -> list[int | None]:
    """Number the classes of equal final answers, as the verifier of the question's kind compares them, in the order of their first.

    The question's ground truths only tell the kind of its answer, where it names none. A response without a final answer has None.

    >>> answer_classes(["Answer: 0.5", "Answer: 1/2", "I cannot tell.", "Answer: 2"], Question([], ground_truths=["3"]))
    [0, 0, None, 1]
    """
    kind = question.kind
    if kind is None and question.ground_truths:
        kind = detect_kind(question.ground_truths[0], question.choices)
    first: list[str] = []
    found: list[int | None] = []
    rules: dict[str, Any] = {"choices": question.choices, "unit": question.unit}
    for response in responses:
        answer = final_answer(response, question, kind=kind).answer
        if answer is None or not answer.strip():
            found.append(None)
            continue
        same = (place for place, known in enumerate(first) if match(answer, known, kind, **rules).correct)
        place = next(same, len(first))
        if place == len(first):
            first.append(answer)
        found.append(place)
    return found


def majority_at(k: int, classes: Sequence[int | None], scores: Sequence[float], *, seed: int = 0) -> float:
    """Expected score of the majority of k of n responses: the mean over all subsets of k, or over 5,000 random ones.

    Args:
        k: size of a subset.
        classes: as `answer_classes` returns them.
        scores: of each response; a subset without answers has the score 0.
        seed: of the random subsets.

    Raises:
        ValueError: for a k that is not from 1 to n.

    >>> round(majority_at(1, [0, 0, 1], [1, 1, 0]), 3), majority_at(3, [0, 0, 1], [1, 1, 0])
    (0.667, 1.0)
    """
    n = _checked(k, scores, classes)
    if math.comb(n, k) <= MAX_SUBSETS:
        subsets = np.array(list(combinations(range(n), k)))
    else:
        keys = np.random.default_rng(seed).random((MAX_SUBSETS, n))
        subsets = np.sort(np.argpartition(keys, k - 1, axis=1)[:, :k], axis=1)
    drawn = np.array([-1 if one is None else one for one in classes])[subsets]
    votes = ((drawn[:, :, None] == drawn[:, None, :]).sum(2) - 0.5 * (np.arange(k) / k)) * (drawn >= 0)
    winners = subsets[np.arange(len(subsets)), votes.argmax(1)]
    return float((np.asarray(scores, float)[winners] * (votes.max(1) > 0)).mean())


def best_at(k: int, ranks: Sequence[float], scores: Sequence[float]) -> float:
    """Expected score of the response that is ranked highest among k of n: the mean over all subsets of k.

    Args:
        k: size of a subset.
        ranks: what a scorer gives each response; of equal ones the first is taken.
        scores: of each response. With `ranks` equal to `scores` this is pass@k (M. Chen et al., arXiv 2107.03374).

    Raises:
        ValueError: for a k that is not from 1 to n, and ranks that are no number each.

    >>> round(best_at(2, [1, 0, 0], [1, 0, 0]), 4)
    0.6667
    """
    n = _checked(k, scores, ranks)
    if any(math.isnan(rank) for rank in ranks):
        raise ValueError(f"Expected a number as the rank of each response; got {ranks!r:.80}.")
    order = sorted(range(n), key=lambda place: -ranks[place])
    chances = [math.comb(n - 1 - place, k - 1) / math.comb(n, k) for place in range(n)]
    return math.fsum(chance * scores[place] for chance, place in zip(chances, order, strict=True))


def _checked(k: int, scores: Sequence[float], others: Sequence[Any]) -> int:
    if len(others) != len(scores):
        raise ValueError(f"Expected one for each of the {len(scores)} responses; got {len(others)}: {others!r:.80}.")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(scores):
        raise ValueError(f"Expected k to be from 1 to the number of responses, {len(scores)}; got k={k!r}.")
    return len(scores)
