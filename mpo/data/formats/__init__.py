"""The formats that pairs come in, one file each: NAME, NEEDS, ``matches(line)``, ``read(line)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from mpo.data.formats import mmpr, rlaif_v, rlhf_v, sharegpt, swift, trl, vlfeedback
from mpo.data.pairs import BadRecord, FoundPair

FORMATS: dict[str, ModuleType] = {reader.NAME: reader for reader in (swift, sharegpt, vlfeedback, rlaif_v, rlhf_v, mmpr, trl)}
"""In the order of detection: those that are known by more come first."""


def detect(line: Mapping[str, Any]) -> ModuleType:
    """The reader of a line, known by the fields that the line has.

    Raises:
        BadRecord: for a line of no format, with the formats that there are, and for one with two prompts.
    """
    for reader in FORMATS.values():
        if reader.matches(line):
            return reader
    known = "; ".join(f"{name}: {reader.NEEDS}" for name, reader in FORMATS.items())
    has = ", ".join(map(repr, list(line)[:20])) or "nothing"
    raise BadRecord("", f"no pair in any format that is known: the line has {has}. Formats and what they need: {known}.")


def check_format(name: str | None) -> None:
    """Refuse the name of a format that does not exist.

    Raises:
        ValueError: with the formats that there are.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, or null to detect it; got {name!r}.")


def read_line(line: Mapping[str, Any], format: str | None = None) -> Iterator[FoundPair]:
    """The pairs of a line, unchecked.

    Args:
        line: the parsed line.
        format: its format; None: detected.

    Raises:
        BadRecord: for a line that its reader cannot make sense of.
    """
    reader = detect(line) if format is None else FORMATS[format]
    pairs: Iterator[FoundPair] = reader.read(line)
    return pairs
