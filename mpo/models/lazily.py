"""Let transformers find this package's models by their type, and import them only when a checkpoint has one.

`import mpo` calls `announce`. Neither transformers nor PyTorch is imported for it.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

HOME = "mpo.models.fused"
TYPES = {"internvl_mmfuser": "InternVLFuserConfig", "llava_mmfuser": "LlavaFuserConfig"}
AUTO = "transformers.models.auto.configuration_auto"


def announce() -> None:
    """Add the types to transformers' table of configs, now or when transformers is imported."""
    if AUTO in sys.modules:
        _add_to(sys.modules[AUTO])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _Home:
    """Stands for the module of the models, which is imported when a name of it is looked up."""

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(HOME), name)


def _add_to(module: Any) -> None:
    for kind, config in TYPES.items():
        module.CONFIG_MAPPING_NAMES.setdefault(kind, config)
        module.CONFIG_MAPPING._modules.setdefault(kind, _Home())


class _AfterImport(MetaPathFinder):
    """Calls `_add_to` when transformers' table of configs was imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run: Callable[[ModuleType], None] = spec.loader.exec_module

            def run_and_add(module: ModuleType) -> None:
                run(module)
                _add_to(module)

            spec.loader.exec_module = run_and_add  # type: ignore[method-assign]
        return spec
