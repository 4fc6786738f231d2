"""Records by index, with padding records marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from mpo.batching.streams import in_epoch
from mpo.io import RECORD_ERRORS, BadRecord, bad_record
from mpo.schema import BAD, COUNTED, PADDING

if TYPE_CHECKING:
    from mpo.batching.sampler import PairBatchSampler


@dataclass(eq=False, repr=False)
class IndexedRecords(Dataset[dict[str, Any]]):
    """A data set that also returns record ``i`` for the index ``-1 - i``, marked as padding.

    A record that the data set cannot return, for example since it decodes a damaged image, is an error of that record alone.

    >>> IndexedRecords([{"id": "a"}, {"id": "b"}])[-2]
    {'id': 'b', 'PADDING': True}

    Args:
        sampler: its epoch is set together with the data set's. With several ranks, the data loader of a resumed epoch does not
            reach it (accelerate wraps it in SkipBatchSampler and BatchSamplerShard), but reaches the data set.
        epoch: shape (), in memory shared with data loader workers; for records that are to be augmented.
        counted: for each record, the tokens of its prompt, by which its batch was planned.
        beyond: indices of records that exceed a batch, and why; they are bad records.
    """

    dataset: Any
    sampler: PairBatchSampler | None = None
    epoch: Tensor | None = None
    counted: Any = None
    beyond: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several records at once, as data loaders request them."""
        places = [-1 - index if index < 0 else index for index in indices]
        many = getattr(self.dataset, "__getitems__", None)
        try:
            records = many(places) if many else [self.dataset[place] for place in places]
        except RECORD_ERRORS:  # of one of them
            records = list(map(self._one, places))
        if self.epoch is not None:
            records = [in_epoch(record, int(self.epoch)) for record in records]
        for at, place in enumerate(places):
            if place in self.beyond:
                name = records[at].get("id")
                name = place if name is None else name
                records[at] = {**records[at], "id": name, BAD: BadRecord(f"record {name!r}", self.beyond[place])}
        if self.counted is not None:
            records = [{**record, COUNTED: int(self.counted[place])} for place, record in zip(places, records, strict=True)]
        return [{**record, PADDING: True} if index < 0 else record for index, record in zip(indices, records, strict=True)]

    def _one(self, place: int) -> dict[str, Any]:
        try:
            with bad_record(f"record {place}"):
                return dict(self.dataset[place])
        except BadRecord as bad:
            return {"id": place, BAD: bad}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler, and of the data set if it has one."""
        for listener in (self.sampler, self.dataset):
            tell = getattr(listener, "set_epoch", None)
            if tell is not None:
                tell(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sampler": None}  # workers do not need it
