"""Read the formats of preference pairs, one module each with NAME, NEEDS, ``matches(line)`` and ``read(line)``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from mpo.data.formats import mmpr, rlaif_v, rlhf_v, sharegpt, swift, trl, vlfeedback
from mpo.data.pairs import FoundPair
from mpo.io import BadRecord

FORMATS: dict[str, ModuleType] = {reader.NAME: reader for reader in (swift, sharegpt, vlfeedback, rlaif_v, rlhf_v, mmpr, trl)}
"""In the order of detection: the more specific formats come first."""


def detect(line: Mapping[str, Any]) -> ModuleType:
    """Find the reader of a line by the fields that the line has.

    Raises:
        BadRecord: for a line in no known format (the message lists the formats), and for a line with two prompts.
    """
    for reader in FORMATS.values():
        if reader.matches(line):
            return reader
    known = "; ".join(f"{name}: {reader.NEEDS}" for name, reader in FORMATS.items())
    has = ", ".join(map(repr, list(line)[:20])) or "nothing"
    raise BadRecord(
        "", f"no pair in any known format: the line has {has}. Use one of these formats, with the fields they need: {known}."
    )


def check_format(name: str | None) -> None:
    """Check the name of a format.

    Raises:
        ValueError: for an unknown name; the message lists the formats.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}, or null to detect it; got {name!r}.")


def read_line(line: Mapping[str, Any], format: str | None = None) -> Iterator[FoundPair]:
    """Read the pairs of a line, without checking their values.

    Args:
        line: the parsed line.
        format: name of its format; None: detect it.

    Raises:
        BadRecord: for a line that its reader cannot read.
    """
    reader = detect(line) if format is None else FORMATS[format]
    pairs: Iterator[FoundPair] = reader.read(line)
    return pairs
