"""Show one record as the model sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from mpo.encoding.costs import RecordMeasure
from mpo.encoding.encoder import Encoder
from mpo.encoding.turns import SIDES, as_completion

OPEN, CLOSE = "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}", "\N{RIGHT-POINTING DOUBLE ANGLE QUOTATION MARK}"
"""Delimiters of labelled tokens."""


def decode_record(
    record: Mapping[str, Any], processor: Any, *, max_length: int | None = None, truncation_mode: str = "keep_start", **rules: Any
) -> list[tuple[str, str]]:
    """Decode the tokens of a record's prompt and completions, each after a heading with their number.

    Image tokens are collapsed, labelled tokens between angle quotation marks. `max_length` and `truncation_mode` are those of
    `MPOConfig`; `rules` the other arguments of `mpo.encoding.costs.RecordMeasure`, such as a configuration's ``encoding_rules``.
    """
    measure = RecordMeasure(processor, **rules)
    record, sides = measure.fitted(dict(record)), measure.sides
    encode = Encoder(processor, max_length, truncation_mode, measure.completion_end, measure.tile_budget)
    (found,), _, _ = encode([dict(record) if sides == SIDES else as_completion(dict(record), measure.train_on)], sides=sides)
    image = getattr(processor, "image_token_id", None)
    kept = None if max_length is None else max_length - len(found.prompt_ids)
    parts = [(f"prompt, {len(found.prompt_ids):,} tokens", decoded(found.prompt_ids, None, encode.tokenizer, image))]
    for side, completion in zip(sides, found.completions, strict=True):
        ids, labelled = completion.ids[:kept], completion.loss_mask[:kept]
        truncated = f", truncated from {len(completion.ids):,} by max_length" if len(ids) < len(completion.ids) else ""
        heading = f"{side}, {len(ids):,} tokens{truncated}, {sum(labelled):,} labelled (between {OPEN} and {CLOSE})"
        parts.append((heading, decoded(ids, labelled, encode.tokenizer, image)))
    return parts


def decoded(ids: Sequence[int], labelled: Sequence[bool] | None, tokenizer: Any, image: int | None) -> str:
    """Decode tokens to text; consecutive ones of the id `image` are written once, with their number.

    `labelled`: whether each token is labelled; None: no delimiters.
    """
    flags = [False] * len(ids) if labelled is None else labelled
    parts = []
    for is_labelled, run in groupby(zip(flags, ids, strict=True), key=lambda pair: pair[0]):
        text = ""
        for token, same in groupby((token for _, token in run), key=lambda token: token if token == image else None):
            tokens = list(same)
            text += f"{tokenizer.decode(image)} x {len(tokens)}" if token is not None else tokenizer.decode(tokens)
        parts.append(f"{OPEN}{text}{CLOSE}" if is_labelled else text)
    return "".join(parts)
