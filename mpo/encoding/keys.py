"""Keys of what is computed once: an image, a prompt with its images, a completion to it; and the settings of a processor."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from mpo.data.images import open_image
from mpo.data.video import Frame
from mpo.encoding.chat import is_processor
from mpo.encoding.turns import encoded_images
from mpo.schema import EPOCH

KEY_BYTES = 16


def image_key(image: Any) -> bytes:
    """Key of one image, 16 bytes.

    Args:
        image: a PIL image, an array or tensor, of which the pixels are hashed; or an encoded file: its bytes, its path, or a
            dict of datasets' Image feature with ``bytes`` or ``path``. Decoded and encoded forms of one image have different
            keys, which costs a second computation, but never gives a wrong result.
    """
    known: bytes | None = getattr(image, "content_key", None)  # of an image that is not decoded (`mpo.encoding.images`)
    if known is not None:
        return known
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, Image.Image):
        # The same pixel values look different with another palette or transparent colour.
        looks = [image.mode, image.size, image.getpalette(), repr(image.info.get("transparency"))]
        hasher.update(json.dumps(looks).encode())
        hasher.update(image.tobytes())
    elif isinstance(image, (np.ndarray, Tensor)):
        array = np.ascontiguousarray(image.detach().cpu().numpy() if isinstance(image, Tensor) else image)
        hasher.update(json.dumps(["array", array.dtype.str, array.shape]).encode())
        hasher.update(array.tobytes())
    elif isinstance(image, (bytes, bytearray, memoryview)):
        hasher.update(b"file")
        hasher.update(image)
    elif isinstance(image, (str, os.PathLike)):
        if not Path(image).is_file():
            raise ValueError(f"The image file {str(image)!r} does not exist. Give the path of a file, or the opened image.")
        return image_key(Path(image).read_bytes())
    else:
        raise ValueError(f"Expected a PIL image, an array, a path, or a dict with 'bytes' or 'path'; got {type(image).__name__}.")
    return hasher.digest()


def prompt_key(prompt: str, record: Mapping[str, Any]) -> int:
    """Key of a prompt with its images, 64 bits: records with the same one are planned together, and share a row in a batch.

    An image file is known by its path, since planning reads none. A copy of it has another key, and is still processed once. The
    record has encoded images, their paths, or decoded images; and the frames, not the paths, of videos.
    """
    augmented = f" augmented {record.get(EPOCH, '')}".rstrip() if record.get("augment") else ""
    hasher = hashlib.blake2b(f"{prompt}\0{record.get('tiles')}{augmented}".encode("utf-8", "surrogatepass"), digest_size=8)
    for image in encoded_images(record):
        content = image
        if isinstance(image, Mapping):
            content = image["bytes"] if image.get("bytes") is not None else image["path"]
        if isinstance(content, (str, os.PathLike, Frame)):
            content = str(content).encode("utf-8", "surrogatepass")
        elif not isinstance(content, bytes):
            content = image_key(open_image(content) if isinstance(content, Image.Image) else content)
        hasher.update(b"\0picture\0" + hashlib.blake2b(content, digest_size=KEY_BYTES).digest())
    return int.from_bytes(hasher.digest(), "little", signed=True)


def completion_key(
    images: Sequence[bytes], prompt_ids: Iterable[int], completion_ids: Iterable[int], loss_mask: Iterable[bool]
) -> bytes:
    """Key of one completion, 16 bytes.

    `images` are keys of the prompt's images, in order. `prompt_ids` are the token ids before the completion, image tokens included;
    then negative numbers for the settings that also determine the sum (`mpo.batching.collator`).

    >>> completion_key([], [1, 2], [3], [True]) == completion_key([], [1], [2, 3], [False, True])
    False
    """
    prompt, completion = (np.asarray(list(ids), dtype="<i8") for ids in (prompt_ids, completion_ids))
    mask = np.asarray(list(loss_mask), dtype=bool)
    assert mask.shape == completion.shape, (mask.shape, completion.shape)
    hasher = hashlib.blake2b(digest_size=KEY_BYTES)
    # The lengths come first: without them, moving tokens from the prompt to the completion would give the same key.
    hasher.update(np.asarray([len(images), len(prompt), len(completion)], dtype="<i8").tobytes())
    for data in (*images, prompt.tobytes(), completion.tobytes(), mask.tobytes()):
        hasher.update(data)
    return hasher.digest()


def settings_of(processing_class: Any) -> list[Any]:
    """All settings that determine the number of a record's tokens."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        text: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        text = json.loads(backend.to_str())
        text["padding"] = text["truncation"] = None  # state of the last call, not a setting
    found = [type(processing_class).__name__, json.dumps(text, sort_keys=True), tokenizer.eos_token]
    found.append(getattr(processing_class, "chat_template", None))
    if is_processor(processing_class):
        image_processor = getattr(processing_class, "image_processor", None)
        found.append(json.dumps(image_processor.to_dict(), sort_keys=True, default=str) if image_processor else None)
        found += [
            getattr(processing_class, "image_seq_length", None),
            json.dumps(getattr(processing_class, "images_kwargs", None), default=str),
        ]
    return found
