"""Convert a line to checked records; everything is checked except what needs a decoded image.

A record is a row of a data set with the columns of `mpo.schema`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Features, Image, List, Value

from mpo.data.conversations import CONVERSATIONS, PAIRS
from mpo.data.fields import IMAGE, SYSTEM, VIDEO, Format, Found, listed, read_common, refuse, settings_of
from mpo.data.formats import FORMATS, detect
from mpo.data.messages import (
    NEEDED,
    TURNS_NEEDED,
    as_json,
    check_messages,
    check_turns,
    checked_text,
    completion_messages,
    prompt_messages,
    there,
    with_system,
)
from mpo.data.paths import Folders
from mpo.data.unused import TRUTHS, Find, check_unused, merged, metadata_of, texts_in
from mpo.data.video import checked_frames, checked_limits
from mpo.io import BadRecord, bad_record, json_kind, nearest
from mpo.schema import COLUMNS, Column, Preference
from mpo.schema import CONVERSATIONS as CONVERSATION_COLUMNS

_LIMITS = {"min": Value("int32"), "max": Value("int32")}
_MESSAGE = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
_TYPES = {
    "text": Value("string"),
    "json": Value("string"),
    "texts": List(Value("string")),
    "images": List(Image()),
    "messages": List(_MESSAGE),
    "turns": List({**_MESSAGE, "tool_calls": Value("string"), "train": Value("bool")}),
    "number": Value("float32"),
    "flag": Value("bool"),
    "tiles": {**_LIMITS, "thumbnail": Value("bool")},
    "frames": _LIMITS,
}

PROMPTS = ("question", "prompt", "messages", "conversations")
"""Names of the prompt in any format."""
PROMPT_USES = (
    *(*IMAGE, *VIDEO, *SYSTEM, "id", "metadata", *TRUTHS),
    *("chosen", "rejected", "chosen_meta", "rejected_meta"),
)
"""Fields of a line that prompts are read from, completions among them, which are ignored."""
EQUAL, NOT_THERE = "equal completions", "image not there"
"""Kinds of bad records."""

Row = dict[str, Any]


class Rows(list[Row]):
    """The records of one line, its place, the number of its pairs that are left out, and the fields that are not used."""

    where: str = ""
    dropped: int = 0
    unused: Sequence[str] = ()


def to_records(
    line: Mapping[str, Any],
    *,
    where: str,
    find: Find,
    format: str | None = None,
    source: str | None = None,
    metadata: Sequence[str] = (),
    kind: str = "pair",
) -> Rows:
    """Convert a line, whose place is `where` (``pairs.jsonl:17``), to its records: one, in most formats.

    `find` finds images and videos, such as `mpo.data.paths.Folders`; a `format` of None is detected; `source` is the name for a
    line without its own; fields `metadata` are that, whatever they hold; `kind` is one of `KINDS`.

    Raises BadRecord for a line that is not a valid pair or conversation: missing or empty fields, fields of another type, equal
    completions, turns out of order, files that are missing or outside their root, placeholders that do not match the images, fields
    that the format does not use although the model should see them (`mpo.data.unused`).
    """
    with bad_record(where):
        rows = Rows()
        rows.where = where
        called = {name: line[name] for name in metadata if line.get(name) is not None}
        line = {name: value for name, value in line.items() if name not in metadata} if metadata else line
        what = KINDS[kind]
        if what.formats is CONVERSATIONS:
            refuse(line, PAIRS, "it belongs to a preference record. Set from_preferences=true to take the chosen completions")
        reader = detect(line, what.formats, what.noun) if format is None else what.formats[format]
        pairs = [replace(pair, **settings_of(line)) for pair in reader.read(line)]
        chosen = PROMPTS if format is not None else ()  # a given format says which of them is the prompt
        own, rows.unused = metadata_of(reader, line, pairs, called, (*metadata, *chosen), find, kind != "pair")
        for pair in pairs:
            rows.append(what.row(pair, merged(own, pair.metadata), where, find, source))
            rows.dropped += pair.dropped
        if kind == "chosen":
            kept = [column.name for column in what.columns if column.name not in ("messages", "tools")]
            whole = [one for preference in Preference.grouped(rows) for one in preference.chosen()]
            rows[:] = [_checked({name: one.columns[name] for name in kept}, list(one.messages)) for one in whole]
    if len(rows) > 1:
        for number, row in enumerate(rows, start=1):
            row["id"] = f"{where}#{number}" if row["id"] == where else row["id"]
    return rows


def to_prompt(line: Mapping[str, Any], *, where: str, image_root: Path, metadata: Sequence[str] = ()) -> Row:
    """Convert a line to a record without completions: ``id``, ``images``, ``videos`` if there are any, and ``prompt``.

    Arguments and errors are as in `to_records`. The line has ``question`` or ``prompt``, and images as in any format; completions
    are ignored.
    """
    line = {name: value for name, value in line.items() if name not in metadata}
    field = "question" if "question" in line else "prompt"
    with bad_record(where):
        asked = there(line.get(field), repr(field), "Give the prompt a text.")
        given, find = read_common(line), Folders(image_root)
        row = _shared(given, {}, where, find, None)
        unused = {name: value for name, value in line.items() if name not in (field, *PROMPT_USES) and value is not None}
        check_unused(unused, {"prompt": asked, "system": given.system}, listed(given.images, "image"), find=find)
        prompt = with_system(prompt_messages(asked, repr(field), _wanted(row)), given.system)
        return {name: row[name] for name in ("id", "images", "videos") if row[name] is not None} | {"prompt": prompt}


def _pair(pair: Found, metadata: dict[str, Any], where: str, find: Find, source: str | None) -> Row:
    asked, better, worse = (
        there(value, name, _misspelt(name.strip("'"), metadata) + NEEDED)
        for name, value in (("the prompt", pair.prompt), ("'chosen'", pair.chosen), ("'rejected'", pair.rejected))
    )
    chosen, rejected = completion_messages(better, "'chosen'"), completion_messages(worse, "'rejected'")
    if chosen == rejected:
        equal = "'chosen' and 'rejected' are the same completion, so neither can be preferred. Leave the record out."
        raise BadRecord("", equal, EQUAL)
    shared = _shared(pair, metadata, where, find, source)
    elsewhere = {"'chosen'": "\n".join(texts_in(chosen)), "'rejected'": "\n".join(texts_in(rejected))}
    elsewhere["'system'"] = pair.system if isinstance(pair.system, str) else ""
    prompt = with_system(prompt_messages(asked, "the prompt", _wanted(shared), elsewhere), pair.system)
    shared["prompt_id"] = shared["prompt_id"] or _prompt_id(prompt, pair)
    truth, margin = _ground_truth(pair.ground_truth), _number(pair.margin, "'margin'")
    return {**shared, "prompt": prompt, "chosen": chosen, "rejected": rejected, "ground_truth": truth, "margin": margin}


def _misspelt(name: str, others: Iterable[str]) -> str:
    near = nearest(name, others, cutoff=0.75)
    return f"If {near!r} is meant, call it {name!r}. " if near is not None else ""


def _conversation(whole: Found, metadata: dict[str, Any], where: str, find: Find, source: str | None) -> Row:
    turns = there(whole.messages, "the conversation", TURNS_NEEDED)
    shared = _shared(whole, metadata, where, find, source)
    elsewhere = {"'system'": whole.system if isinstance(whole.system, str) else ""}
    placed = prompt_messages(turns, "the conversation", _wanted(shared), elsewhere, is_whole=True)
    messages = with_system(placed, whole.system)
    first = next((place for place, message in enumerate(messages) if message["role"] == "assistant"), None)
    shared["prompt_id"] = shared["prompt_id"] or _prompt_id(messages[:first], whole)
    return _checked(shared, messages, as_json(whole.tools, "'tools'"))


def _checked(row: Row, messages: list[Row], tools: str | None = None) -> Row:
    """A conversation that training takes as it is: its turns are in order, none is empty, and images are where they can be."""
    this = "the conversation"
    check_messages(messages, "messages", row, this)
    check_turns(messages, this)
    if not any(message.get("train") is not False for message in messages if message["role"] == "assistant"):
        raise ValueError(f"{this} has 'train': false in every turn of the assistant, so there is nothing to learn. Leave it out.")
    return {**row, "messages": messages, "tools": tools}


def _wanted(row: Row) -> dict[str, int]:
    return {"image": len(row["images"]), "video": len(row["videos"] or ())}


def _shared(pair: Found, metadata: dict[str, Any], where: str, find: Find, source: str | None) -> Row:
    videos = [_found(find, _path(path, "the video"), "video") for path in listed(pair.videos, "video")]
    if not isinstance(pair.augment, bool | None):
        raise ValueError(f"'augment' is {json_kind(pair.augment)} instead of true or false.")
    return {
        "id": _name(pair.id, "'id'") or where,
        "source": _name(pair.source, "'source'") or source,
        "prompt_id": _name(pair.prompt_id, "'prompt_id'"),
        "images": _images(pair.images, find),
        "videos": videos or None,
        "tiles": checked_tiles(pair.tiles),
        "frames": checked_frames(pair.frames),
        "augment": pair.augment,
        "metadata": json.dumps(metadata, default=str) if metadata else None,
    }


# Images


def _images(value: Any, find: Find) -> list[Row]:
    given = listed(value, "image")
    return [_image(image, f"image {place + 1} of {len(given)}", find) for place, image in enumerate(given)]


def _image(image: Any, what: str, find: Find) -> Row:
    path = image if isinstance(image, str) else None
    if isinstance(image, Mapping):
        path, image = image.get("path"), image.get("bytes")
        image = _path(path, what) if image is None and path is not None else image
    if path is not None and image is path:
        return {"bytes": None, "path": _found(find, checked_text(path, what), "image")}
    if not isinstance(image, (bytes, bytearray)) or not image:
        kind = json_kind(image) if image != b"" else "no bytes"
        raise ValueError(f"{what} is {kind} instead of a path or the bytes of a file.")
    name = path.replace("\\", "/").rsplit("/", 1)[-1] if isinstance(path, str) else None
    return {"bytes": bytes(image), "path": checked_text(name, what) if name else None}


def _found(find: Find, path: str, kind: str) -> str:
    try:
        return find(path, kind)
    except ValueError as error:
        raise BadRecord("", str(error), NOT_THERE) from None


def _path(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{what} is {json_kind(value) if value != '' else 'empty'} instead of a path.")
    return checked_text(value, what)


def _prompt_id(prompt: list[Row], pair: Found) -> str:
    """Hash the messages and the image paths as in the file, so that the id does not depend on where the images are."""
    digest = hashlib.blake2b(digest_size=12)
    for message in prompt:
        digest.update(f"{message['role']}:{len(message['content'])};".encode())
        for part in message["content"]:
            text = (part["text"] or "").encode()
            digest.update(f"{part['type']}:{len(text)};".encode() + text)
    for kind, files in (("image", pair.images), ("video", pair.videos)):
        for file in listed(files, kind):
            if isinstance(file, Mapping):
                file = file.get("path") if file.get("bytes") is None else file["bytes"]
            data = file.encode() if isinstance(file, str) else file
            digest.update(f"{kind}:{len(data)};".encode() + data)
    return digest.hexdigest()


# Other fields


def _name(value: Any, field: str) -> str | None:
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or (isinstance(value, int) and abs(value) >= 2**63):
        raise ValueError(f"{field} is {json_kind(value)} instead of text or a whole number of 64 bits.")
    return checked_text(str(value), field)


def _ground_truth(value: Any) -> str | None:
    if value is None:
        return None
    return checked_text(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False), "the ground truth")


def _number(value: Any, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 3e38 or not math.isfinite(value):
        raise ValueError(f"{field} is {value if isinstance(value, float) else json_kind(value)} instead of a finite number.")
    return float(value)


def checked_tiles(value: Any) -> Row | None:
    """Check limits of tiles; return all three keys, or None if nothing is set. Raises ValueError for invalid limits."""
    return checked_limits(value, "'tiles'", ("thumbnail",))


@dataclass(frozen=True)
class Kind:
    """What lines hold, the formats that they are read in, the columns of their records, and how one of them is made."""

    noun: str
    formats: Mapping[str, Format]
    columns: Sequence[Column]
    row: Callable[[Found, dict[str, Any], str, Find, str | None], Row]

    @property
    def features(self) -> Features:
        """The columns and their types."""
        return Features({column.name: _TYPES[column.type] for column in self.columns})

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are left out of a data set if no record has a value there."""
        return tuple(column.name for column in self.columns if column.optional)


KINDS = {
    "pair": Kind("pair", FORMATS, COLUMNS, _pair),
    "conversation": Kind("conversation", CONVERSATIONS, CONVERSATION_COLUMNS, _conversation),
    "chosen": Kind("pair", FORMATS, CONVERSATION_COLUMNS, _pair),
}
"""Kinds of records: ``chosen`` are the prompts of pairs with their chosen completions, as conversations."""


def kind_of(line: Mapping[str, Any]) -> str:
    """Whether a line is a conversation, or else a pair."""
    is_pair = any(line.get(name) for name in PAIRS) or not any(one.matches(line) for one in CONVERSATIONS.values())
    return "pair" if is_pair else "conversation"


@dataclass(frozen=True)
class Reading:
    """How lines are read: see `mpo.data.load_preferences`."""

    image_root: str
    format: str | None = None
    source: str | None = None
    skip: bool = True
    metadata: tuple[str, ...] = ()
    kind: str = "pair"

    def rows(self, lines: Iterable[tuple[str, Any]]) -> Iterator[Rows | BadRecord]:
        """Yield the records of each line, given with its place, or why it has none, which is raised unless `skip` is set."""
        find = Folders(self.image_root)
        for where, line in lines:
            try:
                if isinstance(line, BadRecord):
                    raise line
                how: dict[str, Any] = {"source": self.source, "metadata": self.metadata, "kind": self.kind, "format": self.format}
                yield to_records(line, where=where, find=find, **how)
            except BadRecord as bad:
                if not self.skip:
                    raise
                yield bad
