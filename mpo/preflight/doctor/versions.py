"""Compare installed versions with those that mpo-trainer's metadata supports and those that were tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from shlex import quote

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mpo.preflight.doctor.finding import Finding

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


@dataclass(frozen=True)
class Supported:
    """The requirement of mpo-trainer for a package.

    Args:
        versions: supported versions.
        extra: the extra of mpo-trainer that installs the package; None: always installed.
    """

    versions: SpecifierSet = field(default_factory=SpecifierSet)
    extra: str | None = None


def supported() -> dict[str, Supported]:
    """Read the requirements of mpo-trainer from its metadata, by package.

    >>> str(supported()["pillow"].versions), supported()["bitsandbytes"].extra
    ('>=10', 'qlora')
    """
    extras = metadata("mpo-trainer").get_all("Provides-Extra") or []
    found: dict[str, Supported] = {}
    for line in requires("mpo-trainer") or []:
        asked = Requirement(line)
        extra = None if asked.marker is None else next((e for e in extras if asked.marker.evaluate({"extra": e})), None)
        found.setdefault(canonicalize_name(asked.name), Supported(asked.specifier, extra))
    return found


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


def judge(name: str, current: str, versions: SpecifierSet, extra: str = "") -> Finding:
    """Compare a version with the supported and the tested versions.

    Args:
        name: name of the package.
        current: its installed version.
        versions: supported versions.
        extra: additional text for the finding.

    >>> judge("transformers", "5.10.0", SpecifierSet(">=5.17"))  # doctest: +NORMALIZE_WHITESPACE
    Finding(name='transformers', value='5.10.0 is not supported (>=5.17, tested up to 5.24)', status='problem',
            fix="pip install 'transformers>=5.17'")
    """
    tested = TESTED.get(name)
    about = ", ".join([str(versions)] * bool(versions) + [f"tested up to {tested}"] * bool(tested))
    about = "; ".join(part for part in (about, extra) if part)
    about = f" ({about})" if about else ""
    if not versions.contains(current, prereleases=True):
        return Finding(name, f"{current} is not supported{about}", "problem", f"pip install '{name}{versions}'")
    if tested and Version(current).release[: tested.count(".") + 1] > Version(tested).release:
        return Finding(name, f"{current} is newer than tested{about}", "note")
    return Finding(name, current + about)
