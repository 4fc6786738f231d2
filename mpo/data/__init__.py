"""Preference data, conversations and questions: read from files, check and load lazily.

>>> sorted(__all__)
['load_conversations', 'load_preferences', 'load_questions']
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo.data.load import load_conversations, load_preferences
    from mpo.data.questions import load_questions

__all__ = ["load_conversations", "load_preferences", "load_questions"]


def __getattr__(name: str) -> Any:  # lazy: reading a format's docstring does not import datasets
    if name in ("load_conversations", "load_preferences"):
        from mpo.data import load

        return getattr(load, name)
    if name == "load_questions":
        from mpo.data.questions import load_questions

        return load_questions
    raise AttributeError(f"module 'mpo.data' has no attribute {name!r}; it has {', '.join(__all__)}")
