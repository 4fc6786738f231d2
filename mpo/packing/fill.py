"""Fill a stream up so that every rank gets equally many batches, with records that do not count."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

FILLER = "is_filler"
"""Key of a record that stands only to fill a batch up."""


class FilledStream(IterableDataset[dict[str, Any]]):
    """The records of a stream, then its first records again, marked, until their number is a multiple.

    Left to itself, accelerate would repeat records unmarked, and these pairs would count twice.

    >>> [(r["id"], FILLER in r) for r in FilledStream([{"id": 1}, {"id": 2}, {"id": 3}], multiple=2)]
    [(1, False), (2, False), (3, False), (1, True)]

    Args:
        stream: an iterable of records.
        multiple: pairs of one batch of all ranks.
    """

    def __init__(self, stream: Any, multiple: int) -> None:
        self._stream = stream
        self._multiple = multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        first: list[dict[str, Any]] = []
        count = 0
        for record in self._stream:
            if len(first) < self._multiple:
                first.append(record)
            count += 1
            yield record
        for place in range(-count % self._multiple if count else 0):
            yield {**first[place % len(first)], FILLER: True}

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for this epoch, if the stream does."""
        if hasattr(self._stream, "set_epoch"):
            self._stream.set_epoch(epoch)
