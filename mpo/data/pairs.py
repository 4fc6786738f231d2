"""Hold the pairs that a reader finds in a line, before they are checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpo.io import BadRecord

OWN_DATA_SET = (
    "Load the file with datasets.load_dataset and pass that to MPOTrainer, which reads TRL's columns and drops the None values "
    "that Arrow adds to calls and tools."
)


@dataclass(frozen=True)
class FoundPair:
    """A pair as read from a file: nothing is checked, and every value may have any type.

    Attributes:
        prompt: text with ``<image>`` and ``<video>`` placeholders, or messages.
        chosen: the preferred completion, text or messages.
        rejected: the other completion, text or messages.
        images: one image or several: paths, bytes, or dicts with ``bytes`` or ``path``; None: none.
        videos: one path or several; None: none.
        system: text of a system message in front of the prompt.
        id: the file's name for the pair.
        prompt_id: the file's name for the prompt, which other pairs may share.
        source: the file's name for the origin of the pair.
        ground_truth: the known answer.
        margin: how much better the chosen completion is.
        tiles: how the images are split into tiles: ``min``, ``max``, ``thumbnail``.
        frames: number of frames of each video: ``min``, ``max``.
        augment: whether the images are augmented in training.
        metadata: the other fields of the line.
        dropped: number of pairs of the line that are dropped after this one.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    images: Any = None
    videos: Any = None
    system: Any = None
    id: Any = None
    prompt_id: Any = None
    source: Any = None
    ground_truth: Any = None
    margin: Any = None
    tiles: Any = None
    frames: Any = None
    augment: Any = None
    metadata: Any = field(default_factory=dict)
    dropped: int = 0


def images(line: Mapping[str, Any]) -> Any:
    """Return the images of a line, from ``image`` or ``images``.

    Raises:
        BadRecord: for a line with both fields.
    """
    return one_of(line, "image", "images")


def one_of(line: Mapping[str, Any], *names: str) -> Any:
    """Return the value of the one field, of several alternatives, that a line has.

    Raises:
        BadRecord: for a line with values in two of them.
    """
    found = [name for name in names if line.get(name) is not None]
    if len(found) > 1:
        raise BadRecord("", f"the line has both {found[0]!r} and {found[1]!r}, which mean the same. Keep one of them.")
    return line[found[0]] if found else None


def rest(line: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """Return the fields of a line that were not read."""
    return {key: value for key, value in line.items() if key not in used and value is not None}


def refuse(line: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Refuse a line with fields that a record cannot hold.

    Args:
        line: the line.
        fields: fields that must be missing or empty, and why.

    Raises:
        BadRecord: for the first of them that has a value.
    """
    for name, why in fields.items():
        if line.get(name) not in (None, "", [], {}):
            raise BadRecord("", f"the line has {name!r}: {why}.")


def refuse_two_prompts(line: Mapping[str, Any]) -> None:
    """Refuse a line whose prompt may be its ``question`` or another field, so that its format is ambiguous.

    Raises:
        BadRecord: for such a line.
    """
    other = next((name for name in ("prompt", "messages", "conversations") if line.get(name) not in (None, "", [])), None)
    if other is not None and line.get("question") not in (None, ""):
        raise BadRecord(
            "", f"the line has both 'question' and {other!r}, and either may be the prompt. Keep one of them, or set format=."
        )
