"""Whether a package really imports, and the command that fixes it when it does not."""

from __future__ import annotations

import traceback
from importlib import import_module
from importlib.metadata import packages_distributions

from packaging.version import Version

from mpo.doctor.finding import first_cause
from mpo.doctor.versions import install_command, installed

NAMES = {
    "pillow": "PIL.Image:open",
    "hydra-core": "hydra:compose",
    "torch": "torch:Tensor",
    "torchvision": "torchvision.ops:nms",
    "datasets": "datasets:Dataset",
    "bitsandbytes": "bitsandbytes.nn:Linear4bit",
    "flash-attn": "flash_attn:flash_attn_varlen_func",
    "flash-attn-3": "flash_attn_interface:flash_attn_varlen_func",
    "deepspeed": "deepspeed:initialize",
    "accelerate": "accelerate:Accelerator",
    "transformers": "transformers:InternVLForConditionalGeneration",
    "liger-kernel": "liger_kernel.transformers:LigerRMSNorm",
    "peft": "peft:LoraConfig",
    "trl": "trl:DPOTrainer",
}
"""Something that a run uses of each package: several import nothing before they are asked for it. What others import is first."""


def import_failure(package: str) -> BaseException | None:
    """Import what a run uses of a package; the error at the bottom where that fails."""
    module, _, name = NAMES[package].partition(":")
    try:
        getattr(import_module(module), name)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return first_cause(error)
    return None


def failing_alike(error: BaseException) -> str | None:
    """The first package that does not import for this very reason; others lean on it."""
    for package in NAMES:
        if installed(package) is not None:
            failure = import_failure(package)
            if failure is not None and str(failure) == str(error):
                return package
    return None


def fix_import(error: BaseException, package: str) -> str:
    """The command that fixes a failed import.

    Args:
        error: the error at the bottom.
        package: that was imported.
    """
    package = failing_alike(error) or package
    if isinstance(error, ModuleNotFoundError) and error.name:
        owner = _owner(error.name)
        if installed(owner) is None:
            return install_command(owner)
        package = owner  # a part of it is missing
    elif package == "torchvision" or "torchvision" in str(error):
        torch = Version(installed("torch") or "0")
        if torch.major == 2:  # torchvision 0.(15 + x) goes with torch 2.x
            return f"pip install --force-reinstall --no-deps 'torchvision==0.{15 + torch.minor}.*'"
        package = "torchvision"
    elif isinstance(error, ImportError) and error.name and (other := _owner(error.name)) != package and installed(other):
        return f"pip install --upgrade {package} {other}"  # one asks for what the other does not have
    if package == "torch":
        return "pip install --force-reinstall torch torchvision"
    if package.startswith("flash-attn"):
        return f"pip install --force-reinstall --no-build-isolation --no-deps {package}   (or pip uninstall {package})"
    return f"pip install --force-reinstall --no-deps {package}=={installed(package)}"


def _owner(module: str) -> str:
    """The package that a module belongs to."""
    top = module.partition(".")[0]
    for package, name in NAMES.items():
        if name.partition(":")[0].partition(".")[0] == top:
            return package
    return next(iter(packages_distributions().get(top, [])), top.replace("_", "-"))
