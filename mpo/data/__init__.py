"""Preference data, conversations and questions: read from files, check and load lazily.

>>> sorted(__all__)
['load_conversations', 'load_preferences', 'load_questions']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo.data.load import load_conversations, load_preferences
    from mpo.data.questions import load_questions

__all__ = ["load_conversations", "load_preferences", "load_questions"]


def __getattr__(name: str) -> Any:  # lazy: reading a format's docstring does not import datasets
    if name not in __all__:
        raise AttributeError(f"module 'mpo.data' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module("mpo.data.questions" if name == "load_questions" else "mpo.data.load"), name)
