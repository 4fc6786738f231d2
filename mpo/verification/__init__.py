"""Find the final answer of a response, and compare it with the ground truth. Importing this package loads no submodule.

>>> from mpo.verification import extract, match
>>> match(extract("3 + 4 = 7, so the answer is 7.").answer, "7").correct
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo.verification.extraction import extract
    from mpo.verification.matching import MATCHERS, Rules, Verdict, match, register
    from mpo.verification.statements import Extraction
    from mpo.verification.verdicts import final_answer, verify

__all__ = ["Extraction", "MATCHERS", "Rules", "Verdict", "extract", "final_answer", "match", "register", "verify"]

_HOME = {"extract": "extraction", "Extraction": "statements", "final_answer": "verdicts", "verify": "verdicts"}


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"mpo.verification.{_HOME.get(name, 'matching')}"), name)
    raise AttributeError(f"module 'mpo.verification' has no attribute {name!r}; it has {', '.join(__all__)}")
