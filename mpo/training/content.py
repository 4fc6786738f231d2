"""A fingerprint of the training data's content, the same in every process: values, not where the data set comes from."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from mpo.data.encoded import with_encoded_images
from mpo.encoding.keys import image_key
from mpo.schema import IMAGE_COLUMNS

_ABOUT = ("id", "source", "prompt_id", "ground_truth", "metadata")  # columns that no step reads
_FILES = (*IMAGE_COLUMNS, "videos")
_ROWS = 1000  # hashed together
_SAMPLED = 256  # records whose files are read
_END_BYTES = 2**16


def content_of(dataset: Any) -> str:
    """Identify the records of a training set by their content, in their order.

    Of a `datasets.Dataset`, all values of all columns that a step reads, the names and sizes of images and videos, and of up to 256
    records, evenly spaced, the files themselves: their pixels, or their size and both ends. Folders do not count, so the data may
    move. Of a stream, whose records are not known before they are read, its columns and its first record. Of other data sets, up to
    256 records.

    Returns:
        a hash of 16 hex digits, preceded by ``first record`` for a stream.
    """
    hasher = hashlib.blake2b(digest_size=8)
    if not hasattr(dataset, "__len__"):
        _add(hasher, sorted(getattr(dataset, "column_names", None) or []))
        _add(hasher, next(iter(dataset), None))
        return f"first record {hasher.hexdigest()}"
    places = sorted({int(place) for place in np.linspace(0, len(dataset) - 1, _SAMPLED)}) if len(dataset) else []
    if isinstance(dataset, Dataset):
        columns = sorted(set(dataset.column_names) - set(_ABOUT))
        for table in dataset.with_format("arrow").select_columns(columns).iter(_ROWS):
            for name in columns:
                _add_column(hasher, table[name].combine_chunks(), is_file=name in _FILES)
        files = [name for name in columns if name in _FILES]
        dataset = with_encoded_images(dataset.with_format(None).select_columns(files))
        places = places if files else []
    for place in places:
        _add(hasher, dataset[place])
    return hasher.hexdigest()


def _add_column(hasher: Any, array: Any, *, is_file: bool) -> None:
    """Hash the values of an Arrow array, however they are laid out in memory. Of files, names and sizes only."""
    if isinstance(array, pa.ChunkedArray):  # too large for one
        for chunk in array.chunks:
            _add_column(hasher, chunk, is_file=is_file)
        return
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    nulls = np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))
    hasher.update(np.asarray([len(array), len(nulls), *nulls], dtype="<i8").tobytes())
    kind, present = array.type, array.drop_null()
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if pa.types.is_struct(kind):
        for field, values in zip(kind, array.flatten(), strict=True):
            hasher.update(field.name.encode())
            _add_column(hasher, values, is_file=is_file)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        hasher.update(pc.list_value_length(present).cast("int64").to_numpy().tobytes())
        _add_column(hasher, array.flatten(), is_file=is_file)
    elif is_text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        if is_file and is_text:
            present = pc.replace_substring_regex(present, r"^.*/", "")
        hasher.update(pc.binary_length(present).cast("int64").to_numpy().tobytes())
        if is_text or not is_file:
            hasher.update(b"".join(present.cast("large_binary").to_pylist()))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        hasher.update(present.to_numpy(zero_copy_only=False).tobytes())
    else:
        hasher.update(json.dumps(present.to_pylist(), default=str).encode())


def _add(hasher: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        if set(value) == {"bytes", "path"} and value["bytes"] is None:
            value = {"file": _ends(value["path"])}
        for name in sorted(value):
            if name not in _ABOUT:
                hasher.update(json.dumps(str(name)).encode())
                _add(hasher, _ends(value[name]) if name == "image" else value[name])
    elif isinstance(value, (list, tuple)):
        hasher.update(f"[{len(value)}".encode())
        for item in value:
            _add(hasher, item)
    elif value is None or isinstance(value, (str, int, float, bool)):
        hasher.update(json.dumps(value).encode())
    else:
        try:
            hasher.update(image_key(value))
        except ValueError:  # not an image
            hasher.update(repr(value).encode())


def _ends(path: Any) -> Any:
    if not isinstance(path, (str, os.PathLike)) or not Path(path).is_file():
        return path
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(_END_BYTES)
        file.seek(max(size - _END_BYTES, 0))
        return [size, start, file.read(_END_BYTES)]
