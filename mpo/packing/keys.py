"""Keys of contents: of a picture, and of an answer to a prompt with its pictures."""

import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

KEY_BYTES = 16


def picture_key(picture: Any) -> bytes:
    """Key of one picture, 16 bytes.

    Args:
        picture: a PIL image (its pixels count, decoded), an array or tensor (likewise), or an encoded file: its bytes, its path,
            or a dict of datasets' Image feature with ``bytes`` or ``path``. Decoded and encoded forms of one picture have
            different keys, which costs a second computation, never a wrong one.

    Raises:
        ValueError: for anything else, or a path without a file.
    """
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    if isinstance(picture, Mapping):
        picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
    if isinstance(picture, Image.Image):
        # A palette or a transparent colour changes what the same pixel values look like.
        looks = [picture.mode, picture.size, picture.getpalette(), repr(picture.info.get("transparency"))]
        hasher.update(json.dumps(looks).encode())
        hasher.update(picture.tobytes())
    elif isinstance(picture, (np.ndarray, Tensor)):
        array = np.ascontiguousarray(picture.detach().cpu().numpy() if isinstance(picture, Tensor) else picture)
        hasher.update(json.dumps(["array", array.dtype.str, array.shape]).encode())
        hasher.update(array.tobytes())
    elif isinstance(picture, (bytes, bytearray, memoryview)):
        hasher.update(b"file")
        hasher.update(picture)
    elif isinstance(picture, (str, os.PathLike)):
        if not Path(picture).is_file():
            raise ValueError(f"There is no picture {str(picture)!r}. Give a path to a file, or the opened picture.")
        return picture_key(Path(picture).read_bytes())
    else:
        raise ValueError(
            f"A picture must be a PIL image, an array, a path, or a dict with 'bytes' or 'path', not {type(picture).__name__}."
        )
    return hasher.digest()


def same_picture(first: Any, second: Any) -> bool:
    """Whether two pictures, in the forms that `picture_key` takes, are the same."""
    return first is second or picture_key(first) == picture_key(second)


def first_alike(outlines: Sequence[Hashable], same: Callable[[int, int], bool]) -> list[int]:
    """For each of some things the place of the first one that is the same, which may be its own.

    Args:
        outlines: what things that are the same have in common.
        same: whether the things at two places are the same; asked only where the outlines are.

    >>> first_alike(["a", "b", "a", "b"], lambda one, other: one == 0)
    [0, 1, 0, 3]
    """
    kept: dict[Hashable, list[int]] = {}
    firsts = []
    for place, outline in enumerate(outlines):
        alike = kept.setdefault(outline, [])
        first = next((other for other in alike if same(other, place)), place)
        if first == place:
            alike.append(place)
        firsts.append(first)
    return firsts


def answer_key(pictures: Sequence[bytes], prompt_ids: Iterable[int], answer_ids: Iterable[int], scored: Iterable[bool]) -> bytes:
    """Key of one answer, 16 bytes.

    Args:
        pictures: keys of the prompt's pictures, in order (see `picture_key`).
        prompt_ids: token ids before the answer, picture tokens included; behind them marks, which are no ids, of what else
            decides the sum (`mpo.packing.collator`).
        answer_ids: the answer's token ids.
        scored: which of them are in the sum; as many as `answer_ids`.

    >>> answer_key([], [1, 2], [3], [True]) == answer_key([], [1], [2, 3], [False, True])
    False
    """
    prompt, answer = (np.asarray(list(ids), dtype="<i8") for ids in (prompt_ids, answer_ids))
    mask = np.asarray(list(scored), dtype=bool)
    assert mask.shape == answer.shape, (mask.shape, answer.shape)
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    # The lengths come first: without them, tokens could move from the prompt to the answer unnoticed.
    hasher.update(np.asarray([len(pictures), len(prompt), len(answer)], dtype="<i8").tobytes())
    for data in (*pictures, prompt.tobytes(), answer.tobytes(), mask.tobytes()):
        hasher.update(data)
    return hasher.digest()
