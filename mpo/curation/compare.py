"""Compare two data sets, to check a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from mpo.data.eval_part import encoded, image_bytes, key_of


def first_difference(one: Dataset, other: Dataset) -> str | None:
    """Describe the first difference between two data sets, or return None. A missing column is equal to nulls.

    Images are compared by the bytes of their files, message contents by their texts and images.
    """
    if len(one) != len(other):
        return f"{len(one):,} pairs against {len(other):,}"
    columns = list(dict.fromkeys([*one.column_names, *other.column_names]))
    for place, (left, right) in enumerate(zip(encoded(one, columns), encoded(other, columns), strict=True)):
        for column in columns:
            a, b = _plain(left.get(column)), _plain(right.get(column))
            if a != b:
                return f"record {place} ({left.get('id')!r}), column {column!r}: {_short(a)} against {_short(b)}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            return key_of(image_bytes(value))
        return {key: plain for key, plain in ((key, _plain(one)) for key, one in value.items()) if plain is not None} or None
    if isinstance(value, list):
        return _joined([_plain(one) for one in value]) or None
    return value


def _joined(values: list[Any]) -> list[Any]:
    """Join adjacent text parts."""
    joined: list[Any] = []
    for value in values:
        is_text = isinstance(value, dict) and value.get("type") == "text"
        if is_text and joined and isinstance(joined[-1], dict) and joined[-1].get("type") == "text":
            joined[-1] = {"type": "text", "text": (joined[-1].get("text") or "") + (value.get("text") or "")}
        else:
            joined.append(value)
    return joined


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
