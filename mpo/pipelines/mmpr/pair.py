"""Pair right with wrong responses to the same question."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from mpo.generation.generator import Response, whole_number
from mpo.pipelines.step import Dropped, Record, Step

MAX_PAIRS = 15
ABOUT = ("model", "verdict", "answer", "method", "reason", "sample", "seed", "finish_reason")
"""What a pair says about each of its responses (``chosen_meta``, ``rejected_meta``)."""


class Pair(Step):
    """Turn a question with verdicts into pairs, as InternVL's pipeline does.

    Every right response is paired with every wrong one, except where the right answer is contained in the wrong one (``7`` in
    ``7 or 8``), as the two may differ in format alone; of all these, `max_pairs` at random. The same text counts once; empty
    responses, and right ones that were truncated, are in no pair.

    Args:
        max_pairs: maximum number of pairs of a question.
        accuracy: smallest and largest fraction of right responses of a question that gets pairs; 0.2 to 0.8 in InternVL 3.5.
        rewrite: put the ground truth in the place of a right answer that contains it; ``rewritten`` keeps the answer.
        seed: random seed of the choice, which does not depend on other questions.

    Raises:
        ValueError: for impossible limits.
    """

    verb, many = "pair", True

    def __init__(
        self, *, max_pairs: int = MAX_PAIRS, accuracy: Sequence[float] = (0, 1), rewrite: bool = False, seed: int = 0
    ) -> None:
        max_pairs = whole_number("max_pairs", max_pairs)
        if len(accuracy) != 2 or not 0 <= accuracy[0] <= accuracy[1] <= 1:
            raise ValueError(f"Expected accuracy to be two numbers, 0 <= low <= high <= 1; got accuracy={accuracy!r}.")
        self.max_pairs, self.accuracy, self.rewrite, self.seed = max_pairs, list(accuracy), rewrite, seed

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> list[Record]:
        """The pairs of a question, in the order of their responses."""
        if "accuracy" not in record or "responses" not in record:
            raise ValueError("it has no verdicts. Verify it first (mpo mmpr verify).")
        distinct = list({one["text"]: one for one in record["responses"] if one["text"].strip()}.values())
        right, wrong = ([one for one in distinct if (one["verdict"] == "correct") is side] for side in (True, False))
        low, high = self.accuracy
        if not wrong:
            raise Dropped("all responses are right" if right else "all responses are empty")
        if not right:
            parsed = any(one["answer"] is not None for one in wrong)
            raise Dropped("all responses are wrong" if parsed else "no response has an answer in the format")
        if not low <= record["accuracy"] <= high:
            raise Dropped(f"the accuracy is outside {low} to {high}: {record['accuracy']:.2f}")
        right = [self._rewritten(one, record["ground_truths"]) for one in right if one.get("finish_reason") != "length"]
        if not right:
            raise Dropped("all right responses are truncated")
        found = [(one, other) for one in right for other in wrong if not _contains(other["answer"], one["answer"])]
        found = list({(one["text"], other["text"]): (one, other) for one, other in found}.values())
        if not found:
            raise Dropped("every wrong answer contains the right one")
        if len(found) > self.max_pairs:
            taken = random.Random(f"{self.seed}/{record['id']}").sample(range(len(found)), self.max_pairs)
            found = [found[place] for place in sorted(taken)]
        return [pair_of(record, one, other, other["verdict"]) for one, other in found]

    def _rewritten(self, response: dict[str, Any], truths: Sequence[str]) -> dict[str, Any]:
        answer = response["answer"] or ""
        truth = next((truth for truth in truths if truth != answer and truth.lower() in answer.lower()), None)
        if not self.rewrite or truth is None or answer in truths:
            return response
        before, found, after = response["text"].rpartition(answer)
        return {**response, "text": before + truth + after, "answer": truth, "rewritten": answer} if found else response


def _contains(negative: str | None, positive: str | None) -> bool:
    return negative is not None and positive is not None and positive.lower() in negative.lower()


def pair_of(record: Record, chosen: Mapping[str, Any], rejected: Mapping[str, Any], negative: str) -> Record:
    """Make a pair of two responses to a question that `Sample` has asked, with all that its line in an MMPR file holds.

    What the worse one is (`negative`): ``wrong_answer``, ``wrong_format``, or how it was made.
    """
    if "asked" not in record:
        raise ValueError("it is not known how it was asked ('asked'). Sample it with mpo mmpr sample.")
    kept = {name: record[name] for name in ("id", "source", "images", "videos") if record.get(name)} | record["asked"]
    known = {"answer_gt": record["ground_truths"][0]} if record.get("ground_truths") else {}
    known |= {"accuracy": record["accuracy"]} if "accuracy" in record else {}
    metas = [{name: one.get(name) for name in ABOUT} for one in (chosen, rejected)]
    metas = [metas[0] | {"rewritten": chosen.get("rewritten")}, metas[1] | {"negative": negative}]
    sides = {"chosen": chosen["text"], "rejected": rejected["text"]}
    return {**kept, **sides, **known, "chosen_meta": metas[0], "rejected_meta": metas[1]}
