"""Preference data: read from files, check and load lazily.

>>> sorted(__all__)
['load_preferences']
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo.data.load import load_preferences

__all__ = ["load_preferences"]


def __getattr__(name: str) -> Any:  # lazy: reading a format's docstring does not import datasets
    if name == "load_preferences":
        from mpo.data.load import load_preferences

        return load_preferences
    raise AttributeError(f"module 'mpo.data' has no attribute {name!r}; it has {', '.join(__all__)}")
