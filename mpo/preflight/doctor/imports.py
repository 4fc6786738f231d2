"""Import packages and find the command that fixes a failed import."""

from __future__ import annotations

import traceback
from importlib import import_module
from importlib.metadata import packages_distributions

from packaging.version import Version

from mpo.preflight.doctor.finding import first_cause
from mpo.preflight.doctor.versions import install_command, installed

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
"""An object that a run uses from each package, as several packages import lazily. Packages that others import come first."""


def import_failure(package: str) -> BaseException | None:
    """Import the object of `NAMES` from a package; return the original error if that fails."""
    module, _, name = NAMES[package].partition(":")
    try:
        getattr(import_module(module), name)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return first_cause(error)
    return None


def failing_alike(error: BaseException) -> str | None:
    """Return the first package whose import fails with the same error; the others depend on it."""
    for package in NAMES:
        if installed(package) is not None:
            failure = import_failure(package)
            if failure is not None and str(failure) == str(error):
                return package
    return None


def fix_import(error: BaseException, package: str) -> str:
    """Return the command that fixes a failed import.

    Args:
        error: the original error.
        package: the imported package.
    """
    package = failing_alike(error) or package
    if isinstance(error, ModuleNotFoundError) and error.name:
        owner = _owner(error.name)
        if installed(owner) is None:
            return install_command(owner)
        package = owner  # it is installed, but incomplete
    elif package == "torchvision" or "torchvision" in str(error):
        torch = Version(installed("torch") or "0")
        if torch.major == 2:  # torchvision 0.(15 + x) belongs to torch 2.x
            return f"pip install --force-reinstall --no-deps 'torchvision==0.{15 + torch.minor}.*'"
        package = "torchvision"
    elif isinstance(error, ImportError) and error.name and (other := _owner(error.name)) != package and installed(other):
        return f"pip install --upgrade {package} {other}"  # one imports a name that the other does not have
    if package == "torch":
        return "pip install --force-reinstall torch torchvision"
    if package.startswith("flash-attn"):
        return f"pip install --force-reinstall --no-build-isolation --no-deps {package}   (or pip uninstall {package})"
    return f"pip install --force-reinstall --no-deps {package}=={installed(package)}"


def _owner(module: str) -> str:
    """Return the package that a module belongs to."""
    top = module.partition(".")[0]
    for package, name in NAMES.items():
        if name.partition(":")[0].partition(".")[0] == top:
            return package
    return next(iter(packages_distributions().get(top, [])), top.replace("_", "-"))
