"""What a reader makes of a line, before anything of it is checked."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OWN_DATA_SET = (
    "Load the file with datasets.load_dataset and pass that to MPOTrainer, which reads TRL's columns and leaves out the None that "
    "Arrow fills calls and tools up with."
)
MAX_REASON_LENGTH = 2000
"""In characters: what a file holds may be of any length, and part of the reason."""


class BadRecord(ValueError):
    """A line that is no pair: where it stands (``file:line``), and the reason."""

    def __init__(self, where: str, reason: str) -> None:
        reason = reason if len(reason) <= MAX_REASON_LENGTH else reason[: MAX_REASON_LENGTH - 3] + "..."
        super().__init__(f"{where}: {reason}" if where else reason)
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:  # it crosses processes
        return BadRecord, (self.where, self.reason)


@dataclass(frozen=True)
class FoundPair:
    """A pair as a file has it: nothing of it is checked, and any value may be of any type.

    Attributes:
        prompt: text with ``<image>`` and ``<video>`` marks, or messages.
        chosen: the better answer, text or messages.
        rejected: the worse one.
        images: one image or several: paths, bytes, or dicts with ``bytes`` or ``path``; None: none.
        videos: one path or several; None: none.
        system: text of a system message in front of the prompt.
        id: what the file calls the pair.
        prompt_id: what the file calls its prompt, which other pairs may have too.
        source: what the file calls where the pair comes from.
        ground_truth: the known answer.
        margin: how much better the chosen answer is.
        tiles: how the images are cut: ``min``, ``max``, ``thumbnail``.
        frames: how many frames of each video: ``min``, ``max``.
        augment: whether the images are augmented in training.
        metadata: what else the line has.
        dropped: how many pairs of the line are dropped after this one.
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
    """The images of a line, under whichever name it has them.

    Raises:
        BadRecord: for a line with both names.
    """
    return one_of(line, "image", "images")


def one_of(line: Mapping[str, Any], *names: str) -> Any:
    """The value that a line has under one of several names.

    Raises:
        BadRecord: for a line with values under two of them.
    """
    found = [name for name in names if line.get(name) is not None]
    if len(found) > 1:
        raise BadRecord("", f"both {found[0]!r} and {found[1]!r} are there, and mean the same. Keep one of them.")
    return line[found[0]] if found else None


def rest(line: Mapping[str, Any], used: Iterable[str]) -> dict[str, Any]:
    """What a line has beside the fields that were read."""
    return {key: value for key, value in line.items() if key not in used and value is not None}


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest of those that are known, or nothing.

    >>> did_you_mean("maxx", ["min", "max"])
    ' Did you mean max?'
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def refuse(line: Mapping[str, Any], fields: Mapping[str, str]) -> None:
    """Refuse a line with something that a record cannot hold.

    Args:
        line: the line.
        fields: fields that must not say anything, and why not.

    Raises:
        BadRecord: for the first of them that says something.
    """
    for name, why in fields.items():
        if line.get(name) not in (None, "", [], {}):
            raise BadRecord("", f"{name!r} is there: {why}.")


def refuse_two_prompts(line: Mapping[str, Any]) -> None:
    """Refuse a line whose prompt may be its ``question`` or another field, so that no format can be told.

    Raises:
        BadRecord: with what to do.
    """
    other = next((name for name in ("prompt", "messages", "conversations") if line.get(name) not in (None, "", [])), None)
    if other is not None and line.get("question") not in (None, ""):
        raise BadRecord(
            "", f"both 'question' and {other!r} are there, and either may be the prompt. Keep one of them, or set format=."
        )


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse JSON of unknown origin.

    Args:
        text: the JSON; bytes are UTF-8.
        what: what it is said to be, for errors.

    Raises:
        BadRecord: when it is none, with the place of the mistake.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise BadRecord("", f"not UTF-8 (byte {error.start + 1} of {what}). Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise BadRecord("", f"not JSON ({error.msg} at character {error.pos + 1} of {what}).") from None
    except RecursionError:
        raise BadRecord("", f"nested too deeply to be {what}.") from None
    except ValueError:  # Python reads no whole numbers of more than 4,300 digits
        raise BadRecord("", f"a number in {what} is too long.") from None


def json_kind(value: Any) -> str:
    """What JSON calls a value's type.

    >>> json_kind([1]), json_kind(None), json_kind(True)
    ('a list', 'null', 'a boolean')
    """
    if value is None:
        return "null"
    for types, name in (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "text"),
        (Mapping, "an object"),
        ((list, tuple), "a list"),
        ((bytes, bytearray), "bytes"),
    ):
        if isinstance(value, types):  # type: ignore[arg-type]
            return name
    return f"a {type(value).__name__}"
