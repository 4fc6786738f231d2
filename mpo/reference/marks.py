"""By what a data set that was gone through to its end is known again: its records, and the image and video files they name."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

FILE_COLUMNS = ("images", "image", "videos")
_THREADS = 32  # a network file system answers many questions at once


def mark_name(dataset: Any, settings: Any) -> str | None:
    """Name of the mark of a data set under some settings; another one when a file that its records name has changed.

    Args:
        dataset: of datasets. Its images may be paths, to files that are replaced under the same name.
        settings: whatever else decides the keys.

    Returns:
        None when what a record holds cannot be known from this: not of datasets, or with a transform of the user's.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return None
    hasher = hashlib.sha256(repr((dataset._fingerprint, len(dataset), settings)).encode())
    paths = sorted(named_files(dataset))
    with ThreadPoolExecutor(_THREADS) as pool:
        for looks in pool.map(_looks, [paths[start::_THREADS] for start in range(_THREADS)]):
            hasher.update(repr(looks).encode("utf-8", "surrogatepass"))
    return f"filled-{hasher.hexdigest()[:16]}"


def named_files(dataset: Dataset) -> set[str]:
    """Paths in a data set's image and video columns, and the names of images that are there as bytes. None is opened."""
    paths: set[str] = set()
    columns = [name for name in FILE_COLUMNS if name in dataset.column_names]
    if columns:
        for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=1000):
            for name in columns:
                paths.update(_paths(table.column(name).combine_chunks()))
    return paths


def _paths(values: Any) -> Iterable[str]:
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
        values = pc.struct_field(values, "path")
    is_text = pa.types.is_string(values.type) or pa.types.is_large_string(values.type)
    return filter(None, pc.unique(values).to_pylist()) if is_text else ()


def _looks(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Each file's size in bytes and when it was written, in nanoseconds; -1 where there is none."""
    looks = []
    for path in paths:
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            looks.append((path, -1, -1))
        else:
            looks.append((path, status.st_size, status.st_mtime_ns))
    return looks
