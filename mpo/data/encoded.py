"""Keep image columns encoded until a record is used, so that an image that cannot be decoded is an error of that record."""

from __future__ import annotations

import copy
import hashlib
import os
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
from datasets import Dataset, Features, IterableDataset, List
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher

from mpo.schema import IMAGE_COLUMNS


def with_encoded_images(dataset: Any) -> Any:
    """Return the same records with images as dicts with ``bytes`` or ``path``, not decoded by datasets.

    Nothing is copied. Objects that are not data sets, and data sets with a custom transform or unknown features, are returned
    unchanged.
    """
    features = getattr(dataset, "features", None)
    if not features or not isinstance(dataset, (Dataset, IterableDataset)):
        return dataset
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset  # the user's transform expects what datasets decodes
    for name in IMAGE_COLUMNS:
        feature = undecoded(features.get(name))
        if feature == features.get(name):
            continue
        if isinstance(dataset, IterableDataset):
            dataset = dataset.cast_column(name, feature)
        else:
            dataset = _with_feature(dataset, name, feature)
    return dataset


def file_state(dataset: Dataset) -> str:
    """Hash the names, sizes and modification times of all image and video files that a data set may read.

    It belongs to the key of every cached result that depends on them: a file may be replaced under its name.
    """
    paths: set[str | None] = set()
    for name in (*IMAGE_COLUMNS, "videos"):
        for array in dataset.data.column(name).chunks if name in dataset.column_names else ():
            while not pa.types.is_string(array.type):
                if pa.types.is_struct(array.type) and array.type.get_field_index("path") >= 0:
                    array = array.field("path")
                elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
                    array = array.flatten()
                else:
                    break
            else:
                paths.update(array.unique().to_pylist())
    states = [(path, _state(path)) for path in sorted(path for path in paths if path)]
    return hashlib.blake2b(repr(states).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _state(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # bytes with a name, or a file that is gone
        return None
    return found.st_size, found.st_mtime_ns


def _with_feature(dataset: Dataset, name: str, feature: Any) -> Dataset:
    """Replace the feature of a column. (For a column of lists, `Dataset.cast_column` would write all rows again.)"""
    renamed = copy.copy(dataset)
    renamed._info = dataset.info.copy()
    renamed._info.features = Features({**dataset.features, name: feature})
    renamed._fingerprint = Hasher.hash([dataset._fingerprint, name, "encoded"])
    return renamed


def undecoded(feature: Any) -> Any:
    """Return an Image feature, or lists of them, with ``decode=False``; any other feature unchanged."""
    if isinstance(feature, ImageFeature):
        return ImageFeature(mode=feature.mode, decode=False)
    if isinstance(feature, List):
        return List(undecoded(feature.feature), length=feature.length)
    return feature
