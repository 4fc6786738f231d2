"""Image columns stay encoded until a record is used, so that an image that does not decode is that record's fault."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset, Features, IterableDataset, List
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher

IMAGE_COLUMNS = ("images", "image")


def with_encoded_images(dataset: Any) -> Any:
    """The same records, whose images come as dicts with ``bytes`` or ``path`` rather than decoded by datasets.

    Nothing is copied. A data set of another kind, with a transform of the user's, or without known features is left as it is.
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


def _with_feature(dataset: Dataset, name: str, feature: Any) -> Dataset:
    """Name a column's feature anew. (For a column of lists, `Dataset.cast_column` would write all its rows again.)"""
    renamed = copy.copy(dataset)
    renamed._info = dataset.info.copy()
    renamed._info.features = Features({**dataset.features, name: feature})
    renamed._fingerprint = Hasher.hash([dataset._fingerprint, name, "encoded"])
    return renamed


def undecoded(feature: Any) -> Any:
    """An Image feature, or lists of them, with ``decode=False``; any other feature is left as it is."""
    if isinstance(feature, ImageFeature):
        return ImageFeature(mode=feature.mode, decode=False)
    if isinstance(feature, List):
        return List(undecoded(feature.feature), length=feature.length)
    return feature
