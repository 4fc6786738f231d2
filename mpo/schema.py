"""The records, and the columns of a preference record, each named once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Column:
    """A column of a data set of preference records.

    Attributes:
        name: its name in `datasets.Dataset` and in files in TRL's format.
        type: ``text``, ``texts``, ``images``, ``messages``, ``turns``, ``number``, ``flag``, ``json``, or a group of settings,
            ``tiles`` or ``frames`` (`mpo.data.records` has the types of Arrow).
        optional: a data set leaves the column out if no record has a value.
        encoded: its value changes the tokens or tiles of the record.
        mmpr: MMPR's files have a field for it.
    """

    name: str
    type: str
    optional: bool = False
    encoded: bool = False
    mmpr: bool = True


COLUMNS = (
    Column("id", "text"),  # of the pair; by default where it stands (file:line)
    Column("source", "text", mmpr=False),  # what the pair comes from
    Column("prompt_id", "text"),  # the same for all pairs of a prompt with the same images
    Column("images", "images", encoded=True),  # encoded: a path inside its root, or bytes
    Column("videos", "texts", optional=True, encoded=True),  # paths inside their root
    Column("prompt", "messages", encoded=True),  # their contents are parts: text, image or video
    Column("chosen", "messages", encoded=True),
    Column("rejected", "messages", encoded=True),
    Column("ground_truth", "text", optional=True),  # the known answer
    Column("margin", "number", optional=True, mmpr=False),  # how much better the chosen completion is
    Column("tiles", "tiles", optional=True, encoded=True, mmpr=False),  # limits of tiles (`mpo.encoding.tiles`)
    Column("frames", "frames", optional=True, encoded=True, mmpr=False),  # limits of frames of a video (`mpo.data.video`)
    Column("augment", "flag", optional=True, encoded=True, mmpr=False),  # whether images are augmented in training
    Column("metadata", "json", optional=True),  # all other fields of the line
)
CONVERSATIONS = (
    *(column for column in COLUMNS if column.name not in ("prompt", "chosen", "rejected", "ground_truth", "margin")),
    Column("messages", "turns", encoded=True),  # all turns; a turn of the assistant may have calls of tools and a flag, ``train``
    Column("tools", "text", optional=True, encoded=True),  # as JSON
)
"""Columns of a data set of conversations (`mpo.data.load_conversations`)."""
SIDES = ("chosen", "rejected")
"""The columns of a preference record's completions."""
IMAGE_COLUMNS = ("images", "image")
"""Columns of images: ours, and TRL's name for a single one."""
TRL_COLUMNS = ("image", "tools", "chat_template_kwargs")
"""Columns of TRL's formats that a user's data set may have beside ours; all of them change a record's tokens."""
CONVERSATION_COLUMNS = ("messages", "completion")
"""Columns of TRL's formats for supervised training that take the place of chosen and rejected."""
LOADED = ("id", "source", "prompt_id")
"""Columns that the records of `mpo.data` have, and together only they: the paths of their files are real ones."""


class InternalKey(str):
    """A key that the library adds to a record. No column of a data set can be it, whatever its name: it equals itself alone."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)

    def __reduce__(self) -> str:  # it stays itself in other processes
        return str(self)


EPOCH = InternalKey("EPOCH")
"""Key of a record that is to be augmented: which pass over the records it is in. Only training has it."""
PADDING = InternalKey("PADDING")
"""Key of a record that only fills a batch up."""
COUNTED = InternalKey("COUNTED")
"""Key of a record whose batch was planned: how many tokens its prompt had when it was measured."""
BAD = InternalKey("BAD")
"""Key of what takes the place of a record that the data set could not return: the error."""


def names(**properties: object) -> tuple[str, ...]:
    """Return the columns with these properties, in their order.

    >>> names(optional=True, mmpr=False)
    ('margin', 'tiles', 'frames', 'augment')
    """
    return tuple(column.name for column in COLUMNS if all(getattr(column, key) == value for key, value in properties.items()))


Message = dict[str, Any]
"""A chat message: ``role`` and ``content``, a text or a list of parts: ``{"type": "text", "text": ...}``, ``{"type": "image"}``."""


@dataclass(frozen=True)
class Conversation:
    """A conversation whose turns of the assistant are labelled, unless they have ``"train": False``.

    Attributes:
        messages: all turns; images are placeholders in those of the user.
        columns: its other columns (`CONVERSATIONS`).
    """

    messages: Sequence[Message]
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Preference:
    """A prompt with its completions, and which of them is preferred to which.

    Attributes:
        prompt: messages, or text.
        completions: different ones, each messages or text.
        pairs: indices of the chosen and the rejected completion of each pair.
        columns: of each pair, its other columns, images among them, in the same order.
    """

    prompt: Any
    completions: Sequence[Any]
    pairs: Sequence[tuple[int, int]]
    columns: Sequence[Mapping[str, Any]]

    @classmethod
    def grouped(cls, records: Iterable[Mapping[str, Any]]) -> list[Preference]:
        """Group flat pairs, in TRL's form, by prompt and images; groups and pairs keep their order.

        >>> pairs = [{"prompt": "2 + 2?", "chosen": "4", "rejected": text} for text in ("5", "6")]
        >>> [(one.completions, one.pairs) for one in Preference.grouped(pairs)]
        [(['4', '5', '6'], [(0, 1), (0, 2)])]
        """
        groups: list[list[Mapping[str, Any]]] = []
        alike: dict[str, list[tuple[list[Any], list[Mapping[str, Any]]]]] = {}  # groups by the text of their prompt
        for record in records:
            shown = [record.get(name) for name in names(encoded=True) if name not in SIDES]
            same = alike.setdefault(repr(record.get("prompt")), [])
            members = next((own for other, own in same if other == shown), None)
            if members is None:
                members = []
                groups.append(members)
                same.append((shown, members))
            members.append(record)
        found = []
        for members in groups:
            given = [record[side] for record in members for side in SIDES]
            completions = [one for place, one in enumerate(given) if one not in given[:place]]
            places = list(map(completions.index, given))
            columns = [{name: value for name, value in record.items() if name not in ("prompt", *SIDES)} for record in members]
            found.append(cls(members[0].get("prompt"), completions, list(zip(places[::2], places[1::2], strict=True)), columns))
        return found

    def flat(self) -> list[dict[str, Any]]:
        """A record for each pair, in TRL's form."""
        return [
            {**columns, "prompt": self.prompt, "chosen": self.completions[better], "rejected": self.completions[worse]}
            for columns, (better, worse) in zip(self.columns, self.pairs, strict=True)
        ]

    def chosen(self) -> list[Conversation]:
        """The prompt with each completion that is preferred to another, which alone is labelled."""
        prompt = unlabelled(self.prompt)
        first = {place: columns for (place, _), columns in reversed(list(zip(self.pairs, self.columns, strict=True)))}
        return [Conversation([*prompt, *self.completions[place]], first[place]) for place in sorted(first)]


def unlabelled(messages: Iterable[Message]) -> list[Message]:
    """Return messages whose turns of the assistant are not labelled."""
    return [{**message, "train": False} if message["role"] == "assistant" else message for message in messages]


@dataclass(frozen=True)
class Question:
    """A prompt with a known answer.

    Attributes:
        messages: the conversation up to the user's turn that asks; images are placeholders in it.
        images: images or paths of image files, one per placeholder, in order.
        ground_truths: the known answers, each of them right; empty where none is known.
        kind: the kind of answer (`mpo.verification` lists them); None to detect it from the rest.
        choices: the texts of a multiple-choice question's choices, in order: A, B, ...
        unit: the unit of a number.
        tolerance: how far a number may be from the ground truth, as a fraction of it; None for the kind's own.
        id: of the question, unique in its data set.
        source: the data set that it comes from.
        metadata: everything else that is known about it.
        videos: paths of videos, one per placeholder, in order.
    """

    messages: Sequence[Message]
    images: Sequence[Any] = ()
    ground_truths: Sequence[str] = ()
    kind: str | None = None
    choices: Sequence[str] | None = None
    unit: str | None = None
    tolerance: float | None = None
    id: str = ""
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    videos: Sequence[Any] = ()
