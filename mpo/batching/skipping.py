"""Find records that cannot be collated, log them, and exclude them from the loss. None is replaced by another record."""

import hashlib
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from mpo.encoding.turns import SIDES, Record, describe
from mpo.io import BadRecord, bad_record
from mpo.schema import CONVERSATION_COLUMNS, IMAGE_COLUMNS, PADDING

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
    """Collate the records of a batch that `collate` refused one by one to find the bad ones.

    Returns:
        the indices of the good ones, and the bad ones that would have counted.
    """
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
