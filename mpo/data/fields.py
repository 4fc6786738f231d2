"""What the formats of pairs and of conversations share: a format, what it reads of a line, and a line's fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpo.io import json_kind

Line = Mapping[str, Any]
OWN_DATA_SET = (
    "Load the file with datasets.load_dataset and pass that to the trainer, which reads TRL's columns and drops the None values "
    "that Arrow adds to calls and tools."
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"system": "system", "observation": "tool", "tool": "tool"}
"""The role of each name of ShareGPT."""
IMAGE, VIDEO, SYSTEM = ("image", "images"), ("video", "videos"), ("system", "system_prompt")
"""Fields of which a line has one: its images, its videos, and a system message (`one_of`)."""
COMMON = (*IMAGE, *VIDEO, *SYSTEM, "id", "chosen", "rejected", "metadata")
"""Fields that most formats of pairs use."""
CANNOT = "records have no field for it. Remove it or leave the record out"
TRL_CANNOT = f"records have no field for it. {OWN_DATA_SET.rstrip('.')}"


@dataclass(frozen=True)
class Found:
    """A pair or a conversation as read from a file, unchecked: any value may have any type. None: the line has no such value."""

    prompt: Any = None  # of a pair: text with <image> and <video> placeholders, or messages
    chosen: Any = None  # the preferred completion, text or messages
    rejected: Any = None
    messages: Any = None  # of a conversation: all of it
    tools: Any = None
    images: Any = None  # one image or several: paths, bytes, or dicts with bytes or path
    videos: Any = None  # one path or several
    system: Any = None  # text of a system message in front of the prompt
    id: Any = None
    prompt_id: Any = None  # other pairs may have the same
    source: Any = None
    ground_truth: Any = None
    margin: Any = None  # how much better the chosen completion is
    tiles: Any = None  # how the images are split into tiles: min, max, thumbnail
    frames: Any = None  # number of frames of each video: min, max
    augment: Any = None  # whether the images are augmented in training
    metadata: dict[str, Any] = field(default_factory=dict)  # what is known about the pair and not in a field of the line
    inner: dict[str, Any] = field(default_factory=dict)  # fields inside of used ones that the format does not use
    dropped: int = 0  # number of pairs of the line that are dropped after this one


class Format:
    """A format of lines.

    ``NAME`` is the value of ``format=``; ``NEEDS`` says in error messages which fields a line has; ``USES`` are the fields that it
    reads, and ``ABOUT`` those that its published data sets have besides, which are metadata.
    """

    NAME: str
    NEEDS: str
    USES: tuple[str, ...]
    ABOUT: tuple[str, ...] = ()

    def matches(self, line: Line) -> bool:
        """Whether a line is in this format. Raises ValueError for a line that has two prompts."""
        raise NotImplementedError

    def uses(self, line: Line) -> tuple[str, ...]:
        """Return the fields that are read of a line."""
        return self.USES

    def read(self, line: Line) -> Iterator[Found]:
        """Read the pairs of a line, without checking their values.

        Raises ValueError for a line that cannot be read in this format.
        """
        raise NotImplementedError


def read_common(line: Line, **own: Any) -> Found:
    """Read the fields that most formats share; ``own`` are the others."""
    shared = {"images": IMAGE, "videos": VIDEO, "system": SYSTEM}
    read = {name: one_of(line, *names) for name, names in shared.items() if name not in own}
    return Found(**{"id": line.get("id"), **read, **own})


def pair_of(line: Line, **own: Any) -> Found:
    """Read the fields that most formats of pairs share; ``own`` are the others."""
    return read_common(line, **{"chosen": line.get("chosen"), "rejected": line.get("rejected"), **own})


def settings_of(line: Line) -> dict[str, Any]:
    """Return how a line is shown, in any format: ``tiles``, ``augment``, and ``frames``, which may mean images in other files."""
    found = {name: line[name] for name in ("tiles", "frames", "augment") if line.get(name) is not None}
    return {name: value for name, value in found.items() if name != "frames" or isinstance(value, Mapping)}


def is_nothing(value: Any) -> bool:
    """Whether a value is null, an empty text, or a list or an object of nothing else."""
    if isinstance(value, (list, Mapping)):
        return all(map(is_nothing, value.values() if isinstance(value, Mapping) else value))
    return value is None or value == ""


def one_of(line: Line, *names: str) -> Any:
    """Return the value of the one field, of several alternatives, that a line has."""
    found = [name for name in names if not is_nothing(line.get(name))] or [name for name in names if line.get(name) is not None][:1]
    if len(found) > 1:
        raise ValueError(f"the line has both {found[0]!r} and {found[1]!r}, which mean the same. Keep one of them.")
    return line[found[0]] if found else None


def listed(value: Any, kind: str) -> Sequence[Any]:
    """Return the images or videos (``kind``) of a field, one or several, as several. Raises ValueError for another type."""
    if value is None or value == "":
        return ()
    if isinstance(value, (str, bytes, Mapping)):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f"{kind}s must be a path or a list of paths; got {json_kind(value)}.")
    return value


def refuse(line: Line, fields: Iterable[str], why: str) -> None:
    """Refuse a line with fields that a record cannot hold."""
    for name in fields:
        if not is_nothing(line.get(name)):
            raise ValueError(f"the line has {name!r}: {why}.")


def message_of(turn: Any, what: str, roles: Mapping[str, str] = ROLES) -> dict[str, Any]:
    """Convert a turn, with ``from`` and ``value`` or ``role`` and ``content``, to a message. Raises ValueError for another role."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{what} is {json_kind(turn)} instead of an object with 'from' and 'value'.")
    role = one_of(turn, "from", "role")
    if not isinstance(role, str) or role not in roles:
        raise ValueError(f"{what} is from {role!r}; its role must be one of {', '.join(roles)}.")
    other = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {**other, "role": roles[role], "content": one_of(turn, "value", "content")}
