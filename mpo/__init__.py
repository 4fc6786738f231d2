"""Train vision-language models with Mixed Preference Optimization (MPO, arXiv 2411.10442).

Nothing heavy is imported until it is used:

>>> import mpo
>>> sorted(mpo.__all__)
['MPOConfig', 'MPOTrainer', 'PackedSFTConfig', 'PackedSFTTrainer', '__version__', 'losses']
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from mpo.models.lazily import announce

if TYPE_CHECKING:
    from mpo import losses
    from mpo.training.config import MPOConfig
    from mpo.training.mpo import MPOTrainer
    from mpo.training.sft import PackedSFTTrainer
    from mpo.training.sft_config import PackedSFTConfig

__version__ = version("mpo-trainer")
__all__ = ["MPOConfig", "MPOTrainer", "PackedSFTConfig", "PackedSFTTrainer", "__version__", "losses"]

_HOME = {
    "MPOConfig": "mpo.training.config",
    "MPOTrainer": "mpo.training.mpo",
    "PackedSFTConfig": "mpo.training.sft_config",
    "PackedSFTTrainer": "mpo.training.sft",
}

announce()


def __getattr__(name: str) -> Any:
    if name == "losses":
        return import_module("mpo.losses")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mpo' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
