"""Records by index, with padding records marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Dataset

from mpo.batching.streams import in_epoch
from mpo.schema import PADDING

if TYPE_CHECKING:
    from mpo.batching.sampler import PairBatchSampler


class IndexedRecords(Dataset[dict[str, Any]]):
    """A data set that also returns record ``i`` for the index ``-1 - i``, marked as padding.

    >>> IndexedRecords([{"id": "a"}, {"id": "b"}])[-2]
    {'id': 'b', 'is_padding': True}

    Args:
        dataset: records by index.
        sampler: its epoch is set together with the data set's. With several ranks, the data loader of a resumed epoch does not
            reach it (accelerate wraps it in SkipBatchSampler and BatchSamplerShard), but reaches the data set.
        epoch: shape (), in memory shared with data loader workers; for records that are to be augmented.
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
        """Several records at once, as data loaders request them."""
        places = [-1 - index if index < 0 else index for index in indices]
        many = getattr(self.dataset, "__getitems__", None)
        records = many(places) if many else [self.dataset[place] for place in places]
        if self.epoch is not None:
            records = [in_epoch(record, int(self.epoch)) for record in records]
        return [{**record, PADDING: True} if index < 0 else record for index, record in zip(indices, records, strict=True)]

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the sampler, and of the data set if it has one."""
        for listener in (self.sampler, self.dataset):
            tell = getattr(listener, "set_epoch", None)
            if tell is not None:
                tell(epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sampler": None}  # workers do not need it
