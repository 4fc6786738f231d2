"""Read RLAIF-V-Dataset: ``image`` as ``{bytes, path}``, ``question``, ``chosen``, ``rejected``, and fields that name its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import FoundPair, refuse_two_prompts, rest

NAME = "rlaif_v"
NEEDS = "question, chosen, rejected, image (bytes or path) or image_path; ds_name, origin_dataset or origin_split"
_USED = ("image", "question", "chosen", "rejected", "system", "idx")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line is in this format.

    Raises:
        BadRecord: for such a line with a second prompt.
    """
    if "question" not in line or not any(name in line for name in ("ds_name", "origin_dataset", "origin_split")):
        return False
    refuse_two_prompts(line)
    return True


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """Read the pair of a line."""
    yield FoundPair(
        prompt=line.get("question"),
        chosen=line.get("chosen"),
        rejected=line.get("rejected"),
        images=line.get("image") or line.get("image_path"),
        system=line.get("system"),
        id=line.get("idx"),
        metadata=rest(line, _USED),
    )
