"""Load the prompts that are sampled during training, from a file of prompts or of pairs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mpo.data import load_preferences
from mpo.data.encoded import with_encoded_images
from mpo.data.eval_part import question_text
from mpo.data.messages import image_parts
from mpo.data.records import to_prompt
from mpo.data.shards import LinesShard
from mpo.encoding.keys import image_key
from mpo.encoding.turns import Record, as_completion, describe, encoded_images, record_images
from mpo.io import BadRecord, bad_record

MAX_RECORDS_PER_PROMPT = 100
"""The largest number of records that are read per requested prompt."""


def load_prompts(
    path: str | Path,
    *,
    count: int,
    image_root: str | Path | None = None,
    tiles: Mapping[str, Any] | None = None,
    metadata: Sequence[str] | None = None,
) -> list[Record]:
    """Load the first prompts of a file.

    Args:
        path: a JSONL file whose lines have ``question`` (or ``prompt``) and, where there are images, ``image``; lines of pairs
            are accepted too. Or any other source that `load_preferences` takes.
        count: number of different prompts.
        image_root: the folder that image paths are relative to; by default the file's own.
        tiles: how their images are split into tiles, as in `load_preferences`.
        metadata: fields that are metadata, as in `load_preferences`.

    Raises:
        ValueError: for a file that does not exist or has no prompts, and for lines that are not prompts (named as ``file:line``).
    """
    path = Path(path).expanduser()
    if path.suffix not in (".jsonl", ".json"):
        return first_prompts(load_preferences(path, image_root=image_root, tiles=tiles, metadata=metadata), count)
    if not path.is_file():
        raise ValueError(f"samples.path={path}: there is no such file. Set it to a file of prompts.")
    root = Path(image_root).expanduser() if image_root else path.parent
    found = first_prompts(_read_prompts(path, root, metadata or ()), count)
    if not found:
        raise ValueError(f"{path} has no prompts.")
    return [{**record, "tiles": dict(tiles)} for record in found] if tiles else found


def _read_prompts(path: Path, image_root: Path, metadata: Sequence[str]) -> Iterator[Record]:
    for where, line in LinesShard(str(path)).lines():
        if isinstance(line, BadRecord):
            raise line
        yield to_prompt(line, where=where, image_root=image_root, metadata=metadata)


def first_prompts(records: Iterable[Record], count: int, *, on_bad_record: str = "raise") -> list[Record]:
    """The first `count` records with different prompts: a question of many pairs is taken once, of a conversation its first turn.

    Raises BadRecord for a record whose images cannot be opened, unless `on_bad_record` is ``"skip"``: the next one takes its place.
    """
    found: dict[Any, Record] = {}
    for record in islice(with_encoded_images(records), MAX_RECORDS_PER_PROMPT * count):
        try:
            with bad_record(describe(record)):
                record = _without_responses(record)
                images = record_images(record)
                key = (question_text(record.get("prompt") or ""), *map(image_key, images))
        except BadRecord:
            if on_bad_record == "raise":
                raise
            continue
        if key not in found:
            found[key] = record if record.get("videos") or not record.get("images") else {**record, "images": images}
        if len(found) == count:
            break
    return list(found.values())


def _without_responses(record: Record) -> Record:
    """The prompt of a conversation: what precedes the assistant's first turn. Other records are unchanged."""
    if record.get("messages") is None:
        return record
    found = as_completion(record)
    count = sum(map(image_parts, found["prompt"]))
    has_parts = any(map(image_parts, [*found["prompt"], *found["completion"]]))  # otherwise all images precede the first text
    found["images"] = encoded_images(found)[: count if has_parts else None]
    return {name: value for name, value in found.items() if name not in ("image", "completion", "labelled")}


def image_names(record: Mapping[str, Any]) -> list[str]:
    """Names of a record's images: their file names, or their sizes for images without a file."""
    given = record["images"] if record.get("images") is not None else record.get("image")
    images = given if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return [_name(image) for image in images]


def _name(image: Any) -> str:
    if isinstance(image, Mapping):
        image = image.get("path")
    path = image if isinstance(image, (str, Path)) else getattr(image, "filename", "")
    return Path(path).name if path else "x".join(map(str, getattr(image, "size", ("?",))))


def checked_records(records: Iterable[Record]) -> list[Record]:
    """The given records as a list; refuse none, and one without a prompt."""
    checked = list(records)
    if not checked:
        raise ValueError("There are no records to sample responses for. Give at least one with a 'prompt'.")
    for place, record in enumerate(checked):
        if not record.get("prompt"):
            raise ValueError(f"Record {place} has no 'prompt' to sample a response for; its keys are {sorted(record)}.")
    return checked
