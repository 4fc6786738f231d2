"""One record exactly as the model will see it, in a form that a person can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mpo.packing.encode import PairEncoder

OPEN, CLOSE = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"
"""Around what is scored."""


def show_record(record: Mapping[str, Any], processor: Any, args: Any) -> str:
    """The decoded tokens of a prompt and its answers: image tokens collapsed, scored tokens between angle quotation marks.

    Args:
        record: a preference record.
        processor: of the run.
        args: the run's `MPOConfig`: ``max_length``, ``truncation_mode``, ``completion_end`` and ``tile_budget`` decide what is cut
            and scored.
    """
    encode = PairEncoder(processor, args.max_length, args.truncation_mode, args.completion_end, args.tile_budget)
    (pair,), _, _ = encode([dict(record)])
    image = getattr(processor, "image_token_id", None)
    kept = None if args.max_length is None else args.max_length - len(pair.prompt_ids)
    lines = [f"prompt, {len(pair.prompt_ids):,} tokens", _indented(decoded(pair.prompt_ids, None, encode.tokenizer, image))]
    for side in ("chosen", "rejected"):
        answer = getattr(pair, side)
        ids, scored = answer.ids[:kept], answer.loss_mask[:kept]
        cut = f", cut from {len(answer.ids):,} by max_length" if len(ids) < len(answer.ids) else ""
        lines += [
            f"{side}, {len(ids):,} tokens{cut}, {sum(scored):,} scored (between {OPEN} and {CLOSE})",
            _indented(decoded(ids, scored, encode.tokenizer, image)),
        ]
    return "\n".join(lines)


def decoded(ids: Sequence[int], scored: Sequence[bool] | None, tokenizer: Any, image: int | None) -> str:
    """Tokens as text.

    Args:
        ids: of the tokens.
        scored: whether each is, or None.
        tokenizer: that made them.
        image: the token that stands for an image's features; a run of it is written once, with its length.
    """
    marks = [False] * len(ids) if scored is None else scored
    parts = []
    for counts, run in groupby(zip(marks, ids, strict=True), key=lambda pair: pair[0]):
        text = ""
        for token, same in groupby((token for _, token in run), key=lambda token: token if token == image else None):
            tokens = list(same)
            text += f"{tokenizer.decode(image)} x {len(tokens)}" if token is not None else tokenizer.decode(tokens)
        parts.append(f"{OPEN}{text}{CLOSE}" if counts else text)
    return "".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))
