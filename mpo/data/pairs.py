"""Hold the pairs that a reader finds in a line, before they are checked."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

OWN_DATA_SET = (
    "Load the file with datasets.load_dataset and pass that to MPOTrainer, which reads TRL's columns and drops the None values "
    "that Arrow adds to calls and tools."
)
MAX_REASON_LENGTH = 2000
"""Maximum characters of a reason, which may quote values of any length from a file."""


class BadRecord(ValueError):
    """A line that is not a valid pair: its place (``file:line``) and the reason."""

    def __init__(self, where: str, reason: str) -> None:
        reason = reason if len(reason) <= MAX_REASON_LENGTH else reason[: MAX_REASON_LENGTH - 3] + "..."
        super().__init__(f"{where}: {reason}" if where else reason)
        self.where = where
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRecord], tuple[str, str]]:  # it crosses processes
        return BadRecord, (self.where, self.reason)


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


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """Suggest the closest known name, as the end of an error message about an unknown name.

    >>> did_you_mean("maxx", ["min", "max"])
    ' Did you mean max?'
    """
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


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


def parse_json(text: str | bytes, what: str) -> Any:
    """Parse JSON of unknown origin.

    Args:
        text: the JSON; bytes are UTF-8.
        what: what the text is, for error messages.

    Raises:
        BadRecord: for invalid JSON, with the place of the mistake.
    """
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise BadRecord("", f"not UTF-8 (byte {error.start + 1} of {what}). Save the file as UTF-8.") from None
    except json.JSONDecodeError as error:
        raise BadRecord("", f"not JSON ({error.msg} at character {error.pos + 1} of {what}). Fix it.") from None
    except RecursionError:
        raise BadRecord("", f"{what} is nested too deeply to be read.") from None
    except ValueError:  # Python does not parse whole numbers of more than 4,300 digits
        raise BadRecord("", f"a number in {what} is too long: more than 4,300 digits. Shorten it.") from None


def json_kind(value: Any) -> str:
    """Name the JSON type of a value.

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
