"""Name the file that says a data set is in the cache completely, after its records and the image and video files they name."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

FILE_COLUMNS = ("images", "image", "videos")
_THREADS = 32  # a network file system serves many requests at once


def finished_name(dataset: Any, settings: Any) -> str | None:
    """Name the finished file of a data set under some settings. The name changes when a file that its records name changes.

    Args:
        dataset: a `datasets.Dataset`; for another class, or with a transform of the user's, None is returned.
        settings: everything else that determines the keys.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        return None
    hasher = hashlib.sha256(repr((dataset._fingerprint, len(dataset), settings)).encode())
    paths = sorted(named_files(dataset))
    with ThreadPoolExecutor(_THREADS) as pool:
        for states in pool.map(_file_states, [paths[start::_THREADS] for start in range(_THREADS)]):
            hasher.update(repr(states).encode("utf-8", "surrogatepass"))
    return f"filled-{hasher.hexdigest()[:16]}"


def named_files(dataset: Dataset) -> set[str]:
    """Return the paths in a data set's image and video columns, and the names of images held as bytes. Open no file."""
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


def _file_states(paths: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return each file's size in bytes and modification time in nanoseconds; -1 for a missing file."""
    found = []
    for path in paths:
        try:
            status = os.stat(path)
            found.append((path, status.st_size, status.st_mtime_ns))
        except (OSError, ValueError):
            found.append((path, -1, -1))
    return found
