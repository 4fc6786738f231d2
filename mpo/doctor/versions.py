"""Which versions of a package are supported, by mpo-trainer's own metadata, and which were tested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from shlex import quote

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mpo.doctor.finding import Finding

TESTED: Mapping[str, str] = {
    "torch": "2.15",
    "transformers": "5.24",
    "trl": "1.16",
    "peft": "0.21",
    "accelerate": "1.15",
    "datasets": "5.2",
    "bitsandbytes": "0.50",
}
"""The newest release of each package that the tests ran on."""


@dataclass(frozen=True)
class Supported:
    """What mpo-trainer asks of a package.

    Args:
        versions: as in its metadata.
        extra: of mpo-trainer that brings the package; None: always there.
    """

    versions: SpecifierSet = field(default_factory=SpecifierSet)
    extra: str | None = None


def supported() -> dict[str, Supported]:
    """What the installed mpo-trainer asks of each package it names.

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
    """What installs a package in a supported version.

    >>> install_command("transformers"), install_command("bitsandbytes"), install_command("deepspeed")
    ("pip install 'transformers>=5.17'", "pip install 'mpo-trainer[qlora]'", "pip install 'mpo-trainer[deepspeed]'")
    """
    asked = supported().get(name, Supported())
    return f"pip install {quote(f'mpo-trainer[{asked.extra}]' if asked.extra else f'{name}{asked.versions}')}"


def installed(name: str) -> str | None:
    """The version of a package by its metadata; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def judge(name: str, there: str, versions: SpecifierSet, extra: str = "") -> Finding:
    """A version against the supported and the tested ones.

    Args:
        name: of the package.
        there: its version.
        versions: supported ones.
        extra: what else to say of it.

    >>> judge("transformers", "5.10.0", SpecifierSet(">=5.17"))  # doctest: +NORMALIZE_WHITESPACE
    Finding(name='transformers', value='5.10.0 is not supported (>=5.17, tested up to 5.24)', status='problem',
            fix="pip install 'transformers>=5.17'")
    """
    tested = TESTED.get(name)
    about = ", ".join([str(versions)] * bool(versions) + [f"tested up to {tested}"] * bool(tested))
    about = "; ".join(part for part in (about, extra) if part)
    about = f" ({about})" if about else ""
    if not versions.contains(there, prereleases=True):
        return Finding(name, f"{there} is not supported{about}", "problem", f"pip install '{name}{versions}'")
    if tested and Version(there).release[: tested.count(".") + 1] > Version(tested).release:
        return Finding(name, f"{there} is newer than tested{about}", "note")
    return Finding(name, there + about)
