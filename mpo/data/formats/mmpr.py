"""MMPR's annotation lines, v1.0 to v1.2: ``image`` (a path, several, or none) or ``video``, ``question``, ``chosen``, ``rejected``.

Pairs with a checked answer have ``answer_gt``; ``chosen_meta`` and ``rejected_meta`` say how the answers were made. An object
``metadata`` that is all there is beside the pair is read as if its fields stood in the line: `mpo data convert` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import FoundPair, images, one_of, refuse, refuse_two_prompts, rest

NAME = "mmpr"
NEEDS = "question, chosen, rejected; image or video, where there is one"
_USED = ("image", "images", "video", "videos", "question", "chosen", "rejected", "answer_gt", "system", "id")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line looks like it.

    Raises:
        BadRecord: for a line that does, with a second prompt.
    """
    if "question" not in line:
        return False
    refuse_two_prompts(line)
    return True


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """The pair of a line."""
    refuse(line, {"clip": "only whole videos can be read. Cut the video, and leave 'clip' out"})
    yield FoundPair(
        prompt=line.get("question"),
        chosen=line.get("chosen"),
        rejected=line.get("rejected"),
        images=images(line),
        videos=one_of(line, "video", "videos"),
        system=line.get("system"),
        id=line.get("id"),
        ground_truth=line.get("answer_gt"),
        metadata=_metadata(line),
    )


def _metadata(line: Mapping[str, Any]) -> dict[str, Any]:
    """What else a line has. It may be in ``metadata`` alone, where names of its own would mean something in the line."""
    found = rest(line, _USED)
    nested = found.get("metadata")
    return dict(nested) if len(found) == 1 and isinstance(nested, Mapping) else found
