"""Find an id that is there twice among any number of records, with eight bytes for each."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

import numpy as np

from mpo.io import BadRecord


def id_hash(text: str) -> int:
    """Hash an id to 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def refuse_repeated(hashes: array[int], placed: Iterable[tuple[str, str]]) -> None:
    """Refuse an id that is there twice among the hashes of all (`id_hash`); `placed`, places and ids, are read only to name it.

    Raises BadRecord naming both places.
    """
    values = np.sort(np.frombuffer(hashes, np.uint64)) if hashes else np.empty(0, np.uint64)
    twice = set(values[1:][values[1:] == values[:-1]].tolist())
    seen: dict[str, str] = {}
    for where, text in placed if twice else ():
        if text in seen:
            raise BadRecord(where, f"the id {text!r} is that of {seen[text]} too. Give each its own.")
        if id_hash(text) in twice:
            seen[text] = where
