"""A batch: what the model is given, and what the loss and the logs need to know about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpo.batching.layout import LabelledTokens, Segments, completion_sums, ld_weights
from mpo.batching.logits_to_keep import LogitsToKeep
from mpo.batching.skipping import BadEntry
from mpo.encoding.features import ImageFeatures
from mpo.encoding.images import TileOrder
from mpo.encoding.movable import Movable
from mpo.encoding.turns import Record

ModelInput = Tensor | Segments | TileOrder | ImageFeatures


@dataclass(frozen=True, eq=False)
class Batch(Movable):
    """P records with S completions each, side by side: the first side (chosen) of all records, then the second (rejected).

    Batches are indexed by the names of the model's inputs, as transformers does: ``batch["input_ids"]``.

    ``model_inputs``: arguments of the model's forward. ``input_ids``; for padded rows ``attention_mask``, both of shape (S P, T);
    for packed rows ``position_ids`` (1, N) and ``segments``; the processor's image tensors, in packed rows once per distinct image,
    with ``tile_order`` (`mpo.encoding.images`) if several prompts have the same image; or ``vision_features``
    (`mpo.encoding.features`).
    """

    model_inputs: dict[str, ModelInput]
    positions_to_keep: LogitsToKeep  # the M positions that predict a labelled token, to which the LM head is applied
    shift_labels: Tensor  # what they predict, shape (1, M)
    labelled: LabelledTokens  # of the S P completions
    tokens: int  # without padding
    names: tuple[str, ...] = ()  # the P records' names in error messages; empty if the collator does not know them
    sides: int = 2  # S; 2 for pairs
    counted: int | None = None  # records that count, the first ones: the others fill the batch up. None: not known yet
    bad: tuple[BadEntry, ...] = ()  # records that could not be collated (`mpo.batching.skipping.sort_out`)
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
