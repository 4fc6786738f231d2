"""Records by index, padding among them marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from mpo.packing.streams import PADDING, in_epoch

if TYPE_CHECKING:
    from mpo.packing.sampler import PairBatchSampler


class IndexedRecords(Dataset[dict[str, Any]]):
    """A data set that gives record ``i`` for the index ``-1 - i`` too, marked as padding.

    >>> IndexedRecords([{"id": "a"}, {"id": "b"}])[-2]
    {'id': 'b', 'is_padding': True}

    Args:
        dataset: records by index.
        sampler: is told the epoch when this is told. With several ranks, the data loader of a resumed epoch does not reach it
            (accelerate's SkipBatchSampler and BatchSamplerShard stand before it), but reaches the data set.
        epoch: in memory that data loader workers share, shape (); for the records that are to be augmented.
    """

    def __init__(self, dataset: Any, sampler: PairBatchSampler | None = None, epoch: Tensor | None = None) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several records at once, as data loaders ask."""
        places = [-1 - index if index < 0 else index for index in indices]
        many = getattr(self.dataset, "__getitems__", None)
        records = many(places) if many else [self.dataset[place] for place in places]
        if self.epoch is not None:
            records = [in_epoch(record, int(self.epoch)) for record in records]
        return [{**record, PADDING: True} if index < 0 else record for index, record in zip(indices, records, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Tell the sampler, and the data set if it wants to know."""
        for listener in (self.sampler, self.dataset):
            tell = getattr(listener, "set_epoch", None)
            if tell is not None:
                tell(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sampler": None}  # workers need no plan
