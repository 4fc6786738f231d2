"""A batch: what the model is given, and what the loss and the logs need to know about it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from mpo.batching.layout import LabelledTokens, Row, Segments, completion_sums, concatenate, ld_weights
from mpo.batching.logits_to_keep import LogitsToKeep, label_padded_rows
from mpo.encoding.encoder import Encoded
from mpo.encoding.images import ImageFeatures
from mpo.encoding.labels import Completion
from mpo.encoding.movable import Movable
from mpo.encoding.turns import SIDES, Record, describe
from mpo.io import BadRecord, bad_record
from mpo.schema import CONVERSATION_COLUMNS, IMAGE_COLUMNS, PADDING

ModelInput = Tensor | Segments | ImageFeatures


@dataclass(frozen=True, eq=False)
class Batch(Movable):
    """P records with S completions each, side by side: the first side (chosen) of all records, then the second (rejected).

    Batches are indexed by the names of the model's inputs, as transformers does: ``batch["input_ids"]``.

    ``model_inputs``: arguments of the model's forward. ``input_ids``; for padded rows ``attention_mask``, both of shape (S P, T);
    for packed rows ``position_ids`` (1, N) and ``segments``; the processor's image tensors, in packed rows once per distinct image,
    with ``tile_order`` (`mpo.encoding.images`) if several prompts have the same image; or ``vision_features``
    (`mpo.encoding.images`).
    """

    model_inputs: dict[str, ModelInput]
    positions_to_keep: LogitsToKeep  # the M positions that predict a labelled token, to which the LM head is applied
    shift_labels: Tensor  # what they predict, shape (1, M)
    labelled: LabelledTokens  # of the S P completions
    tokens: int  # without padding
    names: tuple[str, ...] = ()  # the P records' names in error messages; empty if the collator does not know them
    sides: int = 2  # S; 2 for pairs
    counted: int | None = None  # records that count, the first ones: the others fill the batch up. None: not known yet
    bad: tuple[BadEntry, ...] = ()  # records that could not be collated (`mpo.batching.batch.sort_out`)
    kept: tuple[int, ...] | None = None  # with bad records, the indices of the others among the P records
    is_truncated: Tensor | None = None  # with a max_length, whether a completion was truncated, shape (S P,)
    completion_keys: tuple[bytes, ...] | None = None  # of their contents (`mpo.encoding.keys`), for a cache
    records: tuple[Record, ...] | None = None  # while they are kept for `verify_first_batch`

    @property
    def size(self) -> int:
        """P, the number of records, with those that do not count."""
        return len(self.labelled.lengths) // self.sides

    @property
    def lengths(self) -> Tensor:
        """The number of labelled tokens of each completion, shape (S, P)."""
        return self.by_side(self.labelled.lengths)

    def by_side(self, values: Tensor) -> Tensor:
        """Values of the S P completions, as shape (S, P)."""
        return values.view(self.sides, self.size)

    def sums(self, values: Tensor, ld_alpha: float | None = None) -> Tensor:
        """Sum values over each completion's labelled tokens; shape (S, P), float32.

        `values`: one at each position kept, shape (1, M), such as the log-prob of its label. `ld_alpha`: LD-DPO's weight of the
        tokens beyond the record's shortest completion (`ld_weights`).
        """
        weights = None if ld_alpha is None else ld_weights(self.labelled, ld_alpha, self.sides)
        return self.by_side(completion_sums(values, self.labelled, weights))

    def __getitem__(self, name: str) -> Any:
        return self.model_inputs[name]

    def __contains__(self, name: str) -> bool:
        return name in self.model_inputs


def packed_batch(rows: Sequence[Row], completions: Sequence[int] | None = None) -> Batch:
    """The batch of packed rows, without images; `completions`: which of the rows' completions it has, in which order."""
    packed = concatenate(rows)
    kept, width = packed.labelled_positions, packed.input_ids.size(1)
    labelled = packed.labelled if completions is None else packed.labelled.select(completions)
    return Batch(
        {"input_ids": packed.input_ids, "position_ids": packed.position_ids, "segments": packed.segments},
        LogitsToKeep(kept, width, packed.labelled_segments),
        packed.shift_labels[:, kept],
        replace(labelled, node=torch.searchsorted(kept, labelled.node)),
        width,
    )


def padded_batch(
    rows: Sequence[tuple[Encoded, Completion]],
    padding: int,
    *,
    blank: Sequence[Encoded] = (),
    kept: slice = slice(None),
    multiple: int = 1,
) -> Batch:
    """The batch of rows of a prompt and one completion, padded on the right, without images.

    Args:
        rows: the prompts, each with its completion.
        padding: the token that rows are padded with.
        blank: prompts of rows after these in which nothing is labelled.
        kept: the part of each row that is kept.
        multiple: rows have a multiple of this many tokens.
    """
    ids = [(pair.prompt_ids + completion.ids)[kept] for pair, completion in rows]
    loss_masks = [([False] * len(pair.prompt_ids) + completion.loss_mask)[kept] for pair, completion in rows]
    tokens = sum(map(len, ids))
    ids += [pair.prompt_ids for pair in blank]
    length = -(-max(map(len, ids)) // multiple) * multiple

    def padded(values: Sequence[list[Any]], fill: int = 0) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in values], dtype=torch.long)

    input_ids = padded(ids, padding)
    inputs: dict[str, ModelInput] = {"input_ids": input_ids, "attention_mask": padded([[1] * len(row) for row in ids])}
    heads = [*(pair for pair, _ in rows), *blank]
    for name in {name for pair in heads for name in pair.extra}:
        values = [pair.extra[name].tolist() if name in pair.extra else [0] * len(pair.prompt_ids) for pair in heads]
        inputs[name] = padded([(row + [0] * length)[kept][:length] for row in values])
    return Batch(inputs, *label_padded_rows(input_ids[: len(rows)], padded(loss_masks)), tokens)


def compare(
    sums: Callable[[Batch], Tensor],
    packed: Batch,
    padded: Batch,
    parameters: Sequence[nn.Parameter],
    usual: Callable[[], AbstractContextManager[None]],
) -> str:
    """Describe the difference of log-prob sums and gradients between packed and padded rows.

    Args:
        sums: a function from a batch to its log-prob sums, shape (completions,), for a model that attends by segments.
        packed, padded: the same records in packed and in padded rows.
        parameters: parameters whose gradients (of the mean of the sums) are compared; may be empty. Needs twice their memory.
        usual: a context manager that restores the model's usual attention.
    """
    first, first_gradients = _with_gradients(sums, packed, parameters)
    with usual():
        second, second_gradients = _with_gradients(sums, padded, parameters)
    lines = [
        f"verify_first_batch: log-probs of {len(first)} completions in packed and in padded rows differ by at most "
        f"{(first - second).abs().max():.2e} (sums of up to {second.abs().max():.1f}; "
        f"{((first - second).abs() / second.abs().clamp_min(1e-6)).max():.1e} relative)"
    ]
    if parameters:
        apart = _norm([a - b for a, b in zip(first_gradients, second_gradients, strict=True)])
        lines.append(f"gradients by {apart / _norm(second_gradients):.1e} of their norm")
    return ", ".join(lines) + "."


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt()


def _with_gradients(
    sums: Callable[[Batch], Tensor], batch: Batch, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, list[Tensor]]:
    with torch.set_grad_enabled(bool(parameters)):
        values = sums(batch)
    if not parameters:
        return values, []
    pairs = zip(torch.autograd.grad(values.mean(), parameters, allow_unused=True), parameters, strict=True)
    return values.detach(), [torch.zeros_like(p) if g is None else g for g, p in pairs]


# Bad records, which are excluded from the loss. None is replaced by another record


ON_BAD_RECORD = ("raise", "skip")
BLANK: Record = {"id": "a blank record", "prompt": "?", "chosen": ".", "rejected": ",", "completion": ".", PADDING: True}
"""Replaces a bad record, so that the batch keeps its number of records; it has a few tokens and does not count."""


class BadEntry(TypedDict):
    """A bad record: its id, its name in errors, what is wrong, and a key that identifies the same record later."""

    id: Any
    where: str
    reason: str
    key: str


def sort_out(records: Sequence[Record], collate: Callable[[list[Record]], Any]) -> tuple[list[int], list[BadEntry]]:
    """Collate the records of a batch one by one: the indices of those that `collate` takes, and the others that would count."""
    kept, bad = [], []
    for place, record in enumerate(records):
        try:
            with bad_record(describe(record)):
                collate([record])
        except BadRecord as error:
            if PADDING not in record:
                bad.append(_entry(record, error.reason))
        else:
            kept.append(place)
    return kept, bad


def _entry(record: Record, reason: str) -> BadEntry:
    given = [record.get(name) for name in IMAGE_COLUMNS]
    files = [image for one in given for image in (one if isinstance(one, list) else [one]) if isinstance(image, Mapping)]
    images = [(image.get("path"), zlib.crc32(data) if isinstance(data := image.get("bytes"), bytes) else 0) for image in files]
    texts = [record.get(name) for name in ("id", "prompt", *SIDES)]
    texts += [record[name] for name in CONVERSATION_COLUMNS if name in record]
    content = repr([*texts, images])
    return {
        "id": record.get("id"),
        "where": describe(record),
        "reason": reason,
        "key": hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest(),
    }
