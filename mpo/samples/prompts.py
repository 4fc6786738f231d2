"""Files of prompts, or of pairs -> the few records that are asked during training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Image, List

from mpo.data.records import IMAGE_PLACEHOLDER, to_prompt
from mpo.data.sources import load_preferences
from mpo.packing.keys import image_key
from mpo.packing.turns import Record, record_images

_ENCODED = Image()
LOOK_AT = 100
"""At most so many records are looked at for each prompt that is wanted."""


def load_prompts(
    path: str | Path, *, count: int, image_root: str | Path | None = None, tiles: Mapping[str, Any] | None = None
) -> list[Record]:
    """Load the first prompts of a file.

    Args:
        path: a JSONL file whose lines have ``question`` (or ``prompt``) and, where there are images, ``image``; lines of pairs
            will do. Or anything else that `load_preferences` takes.
        count: how many different prompts.
        image_root: what image paths are relative to; the file's own folder by default.
        tiles: how their images are cut, as of `load_preferences`.

    Raises:
        ValueError: for a file that does not exist or has no prompts, and for lines that are not prompts (as ``file:line``).
    """
    path = Path(path).expanduser()
    if path.suffix not in (".jsonl", ".json"):
        return first_prompts(load_preferences(path, image_root=image_root, tiles=tiles), count)
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Set samples.path to a file of prompts.")
    found = first_prompts(_read_prompts(path, Path(image_root).expanduser() if image_root else path.parent), count)
    if not found:
        raise ValueError(f"{path} has no prompts.")
    return [{**record, "tiles": dict(tiles)} for record in found] if tiles else found


def _read_prompts(path: Path, image_root: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            where = f"{path}:{number}"
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}). A file of prompts holds one JSON object a line.") from error
            if not isinstance(line, dict):
                raise ValueError(f"{where}: a JSON {type(line).__name__} instead of an object with 'question' and 'image'.")
            record = to_prompt(line, where=where, image_root=image_root)
            encoded = [_ENCODED.encode_example(image) for image in record["images"]]
            yield {**record, "images": _named([_ENCODED.decode_example(image) for image in encoded], encoded)}


def first_prompts(records: Iterable[Record], count: int) -> list[Record]:
    """The first `count` records that ask different things: a question of many pairs is asked once."""
    found: dict[Any, Record] = {}
    features = getattr(records, "features", None) or {}
    encoded: Any = None
    if features.get("images") == List(_ENCODED):  # what is decoded has forgotten its file
        encoded = records.cast_column("images", List(Image(decode=False)))  # type: ignore[attr-defined]
    for place, record in enumerate(islice(records, LOOK_AT * count)):
        images = record_images(record)
        key = (prompt_text(record), *map(image_key, images))
        if key not in found:
            found[key] = record if encoded is None else {**record, "images": _named(images, encoded[place]["images"] or [])}
        if len(found) == count:
            break
    return list(found.values())


def _named(images: list[Any], encoded: list[Any]) -> list[Any]:
    """Opened images that know the file they come from."""
    for image, source in zip(images, encoded, strict=True):
        image.filename = source["path"] or ""
    return images


def prompt_text(record: Mapping[str, Any]) -> str:
    """A prompt for people to read; the roles are named where there are several turns.

    >>> prompt_text({"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A cat?"}]}]})
    '<image>A cat?'
    >>> prompt_text({"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "A cat?"}]})
    'system: Be brief. | user: A cat?'
    """
    prompt = record.get("prompt") or ""
    if isinstance(prompt, str):
        return prompt
    turns = [(message["role"], _content(message["content"])) for message in prompt]
    return turns[0][1] if len(turns) == 1 else " | ".join(f"{role}: {text}" for role, text in turns)


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(IMAGE_PLACEHOLDER if part["type"] == "image" else str(part.get("text") or "") for part in content)


def image_names(record: Mapping[str, Any]) -> list[str]:
    """What to call a record's images: their files' names, or their sizes where they come from no file."""
    given = record["images"] if record.get("images") is not None else record.get("image")
    images = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return [_name(image) for image in images]


def _name(image: Any) -> str:
    if isinstance(image, Mapping):
        image = image.get("path")
    path = image if isinstance(image, (str, Path)) else getattr(image, "filename", "")
    return Path(path).name if path else "x".join(map(str, getattr(image, "size", ("?",))))


def checked_records(records: Iterable[Record]) -> list[Record]:
    """The records that a user gives, as a list.

    Raises:
        ValueError: when there are none, or one has no prompt.
    """
    checked = list(records)
    if not checked:
        raise ValueError("There are no records to sample answers for. Give at least one with a 'prompt'.")
    for place, record in enumerate(checked):
        if not record.get("prompt"):
            raise ValueError(f"Record {place} to sample answers for has no 'prompt'; it has {sorted(record)}.")
    return checked
