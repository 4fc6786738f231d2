"""InternVL models of any size. Importing this package loads no submodule.

>>> import mpo.models
>>> mpo.models.__all__
['add_fuser', 'join', 'load_internvl', 'load_processor']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo.models.fused import add_fuser
    from mpo.models.joining import join
    from mpo.models.loading import load_internvl, load_processor

__all__ = ["add_fuser", "join", "load_internvl", "load_processor"]
_HOME = {"add_fuser": "fused", "join": "joining"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"mpo.models.{_HOME.get(name, 'loading')}"), name)
    raise AttributeError(f"module 'mpo.models' has no attribute {name!r}; it has {', '.join(__all__)}")
