"""Read MMPR's annotation lines, v1.0 to v1.2: ``question``, ``chosen``, ``rejected``, optional ``image`` or ``video``.

Pairs with a known answer have it in ``answer_gt``; ``chosen_meta`` and ``rejected_meta`` say how the completions were made. If
``metadata`` is the only other field, its own fields are read as metadata of the line: `mpo data convert` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import FoundPair, images, one_of, refuse, refuse_two_prompts, rest

NAME = "mmpr"
NEEDS = "question, chosen, rejected; optional: image or video"
_USED = ("image", "images", "video", "videos", "question", "chosen", "rejected", "answer_gt", "system", "id")


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line is in this format.

    Raises:
        BadRecord: for such a line with a second prompt.
    """
    if "question" not in line:
        return False
    refuse_two_prompts(line)
    return True


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """Read the pair of a line."""
    refuse(line, {"clip": "only whole videos can be read. Trim the video file and remove 'clip'"})
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
    """Collect the other fields of a line, or those in its ``metadata``, whose names would have another meaning in the line."""
    found = rest(line, _USED)
    nested = found.get("metadata")
    return dict(nested) if len(found) == 1 and isinstance(nested, Mapping) else found
