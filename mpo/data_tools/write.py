"""Pairs of any source -> a file of one of the forms that `load_preferences` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image

from mpo.data.eval_part import encoded, image_bytes, key_of, video_key
from mpo.data.formats import detect, mmpr
from mpo.data.pairs import BadRecord
from mpo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER

FORMS = ("trl", "mmpr", "parquet", "disk")
"""TRL's columns as JSONL; MMPR's JSONL; TRL's columns as Parquet; a folder of `save_to_disk`."""
IMAGES = ("path", "copy", "bytes")
"""Images stay where they are; their files are copied beside the target; they are put into the target itself."""
ENDINGS = {".parquet": "parquet", ".jsonl": "trl", ".json": "trl", "": "disk"}
"""The form of a target by its ending; a number, as in ``pairs-v1.2``, is no ending."""
ROW_GROUP = 256
"""Records of a Parquet row group: images in it make them large."""
_IMAGES = List(ImageFeature())
NOT_IN_MMPR = ("source", "margin", "tiles", "frames", "augment")
"""Columns without a place in MMPR's lines. (In MMPR, the last two stand in meta.json, for a whole file.)"""


@dataclass(frozen=True)
class Written:
    """What was written.

    ``image_root`` is the folder of the files that it refers to (None: there are none); paths in a JSONL are relative to it.
    ``lost`` has, for every column that the form has no place for, how many records had something in it.
    """

    path: Path
    form: str
    pairs: int
    image_root: Path | None
    lost: dict[str, int]


def not_kept(written: Written) -> list[str]:
    """Columns that are not the same when a file is read again; in MMPR's form prompt ids are made anew, with the same groups."""
    return [*written.lost, *(["prompt_id"] if written.form == "mmpr" else [])]


def write_pairs(
    pairs: Dataset,
    target: str | Path,
    *,
    form: str | None = None,
    images: str | None = None,
    image_root: str | Path | None = None,
) -> Written:
    """Write pairs; the target appears when it is whole.

    Args:
        pairs: records.
        target: a file or folder that does not exist.
        form: of `FORMS`; by default as the target is called: ``.parquet``, ``.jsonl`` (``"trl"``), no ending ``"disk"``.
        images: of `IMAGES`; by default ``"path"`` in JSONL, with copies of those that are no files, else ``"bytes"``.
        image_root: the folder that a JSONL's image paths are to be relative to; by default the deepest that holds all of them.

    Raises:
        ValueError: for a target that is there, settings that do not go together, and records that the form cannot hold.
    """
    target = Path(target).expanduser()
    form = form or _form_of(target)
    if form not in FORMS:
        raise ValueError(f"Pairs are written as {', '.join(FORMS)}, not as {form!r}.")
    in_lines = form in ("trl", "mmpr")
    images = images or ("path" if in_lines else "bytes")
    if images not in IMAGES:
        raise ValueError(f"Images are written as {', '.join(IMAGES)}, not as {images!r}.")
    if form == "disk" and images != "bytes":
        raise ValueError(f"save_to_disk puts images inside; images={images!r} cannot be had. Leave it out, or write Parquet.")
    if in_lines and images == "bytes":
        raise ValueError("A JSONL file holds paths of images, not images. Use images='copy', or write Parquet.")
    if image_root is not None and (not in_lines or images == "copy"):
        raise ValueError("image_root is for the paths in a JSONL whose images stay where they are; leave it out here.")
    if target.exists():
        raise ValueError(f"{target} is there already. Give a new name; nothing is overwritten.")
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        root = None
        if in_lines:
            root = _write_lines(pairs, aside, target, form, images, image_root)
        elif form == "parquet":
            root = _write_parquet(pairs, aside, target, images)
        else:
            pairs.save_to_disk(str(aside))
            root = _root(_videos(pairs))
        aside.replace(target)
    finally:
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)
    lost = {name: _filled(pairs, name) for name in NOT_IN_MMPR if name in pairs.column_names} if form == "mmpr" else {}
    return Written(target, form, len(pairs), root, {name: count for name, count in lost.items() if count})


def _form_of(target: Path) -> str:
    ending = target.suffix.lower()
    form = ENDINGS.get("" if ending[1:].isdigit() else ending)
    if form is None:
        raise ValueError(
            f"{target}: nothing is written as {ending}. End the name in .jsonl or .parquet, in nothing for a save_to_disk folder, "
            "or say the form."
        )
    return form


def _filled(pairs: Dataset, column: str) -> int:
    return sum(value is not None for value in pairs.select_columns([column])[:][column])


# JSONL


def _write_lines(pairs: Dataset, aside: Path, target: Path, form: str, images: str, image_root: Any) -> Path | None:
    shown = [name for name in ("images", "videos") if name in pairs.column_names]
    places: list[dict[str, list[Path]]] = []
    for record in encoded(pairs, shown) if shown else ():
        own = {"images": [_place(image, target, images) for image in record.get("images") or ()]}
        own["videos"] = [_video_place(video, target, images) for video in record.get("videos") or ()]
        places.append(own)
    root = _root((place for own in places for some in own.values() for place in some), image_root)
    to_line = trl_line if form == "trl" else mmpr_line
    rest = pairs.with_format(None).select_columns([name for name in pairs.column_names if name not in shown])
    with aside.open("w", encoding="utf-8") as file:
        for index, record in enumerate(rest):
            own = places[index] if places else {}
            paths = {name: [place.relative_to(root).as_posix() for place in some] for name, some in own.items() if root}
            file.write(json.dumps(to_line({**record, **paths}), ensure_ascii=False) + "\n")
    return root


def _root(places: Iterable[Path], given: str | Path | None = None) -> Path | None:
    """The folder that paths are relative to; None without any."""
    every = set(places)
    if not every:
        return None
    if given is None:
        return Path(os.path.commonpath({str(place.parent) for place in every}))
    root = Path(given).expanduser().resolve()
    outside = next((place for place in every if not place.is_relative_to(root)), None)
    if outside is not None:
        name = repr(str(outside))
        raise ValueError(f"The image {name} lies outside {root}. Give the folder that holds all of them, or images='copy'.")
    return root


def trl_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, its images as paths, as a line in TRL's columns."""
    line = {name: value for name, value in record.items() if value not in (None, [])}
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(line[name], str):
            line[name] = [{"role": message["role"], "content": _parts(message["content"])} for message in line[name]]
    return _without_nulls(line)


def mmpr_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record, its images as paths, as a line of MMPR; metadata stand in it as they did in their file, or else in ``metadata``.

    Raises:
        ValueError: for a record with more turns than a question and an answer, or marks of images in its text.
    """
    line: dict[str, Any] = {"id": record.get("id")}
    for name, paths in (("image", record.get("images")), ("video", record.get("videos"))):
        if paths:
            line[name] = paths[0] if len(paths) == 1 else list(paths)
    line["question"] = _one_turn(record, "prompt", "user")
    line["chosen"] = _one_turn(record, "chosen", "assistant")
    line["rejected"] = _one_turn(record, "rejected", "assistant")
    line["answer_gt"] = record.get("ground_truth")
    line = _without_nulls(line)
    metadata = json.loads(record.get("metadata") or "{}")
    flat = {**line, **metadata}
    return flat if _reads_back(flat, metadata) else {**line, "metadata": metadata}


def _reads_back(line: dict[str, Any], metadata: dict[str, Any]) -> bool:
    """Whether a line is known for MMPR's and gives this metadata: its fields may be those of another format, or mean something."""
    try:
        return detect(line) is mmpr and json.dumps(next(mmpr.read(line)).metadata) == json.dumps(metadata)
    except BadRecord:
        return False


def _one_turn(record: Mapping[str, Any], side: str, role: str) -> str:
    messages = record[side]
    if isinstance(messages, str):
        return messages
    if [message["role"] for message in messages] != [role]:
        raise ValueError(
            f"Record {record.get('id')!r}: MMPR's form has one question and one answer, and this '{side}' has the turns "
            f"{', '.join(message['role'] for message in messages)}. Use TRL's form."
        )
    parts = _parts(messages[0]["content"])
    for mark in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER):
        if side == "prompt" and any(mark in part.get("text", "") for part in parts):
            raise ValueError(
                f"Record {record.get('id')!r}: its text has {mark}, which marks an image in MMPR's form. Use TRL's form."
            )
    # The line break after a mark belongs to the mark: readers take one away.
    return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>\n" for part in parts)


def _parts(content: Any) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [
        {"type": "text", "text": str(part.get("text") or "")} if part["type"] == "text" else {"type": part["type"]}
        for part in content
    ]


def _without_nulls(line: dict[str, Any]) -> dict[str, Any]:
    tidy = {name: value for name, value in line.items() if value is not None}
    if isinstance(tidy.get("tiles"), dict):
        tidy["tiles"] = {name: value for name, value in tidy["tiles"].items() if value is not None}
    return tidy


# Images


def _place(image: Mapping[str, Any], target: Path, images: str) -> Path:
    """Where the file of an image is; a copy is made if it is asked for, or there is no file."""
    if images == "path" and image.get("bytes") is None:
        return Path(image["path"]).resolve()
    data = image_bytes(image)
    return _copied(lambda aside: aside.write_bytes(data), key_of(data), _suffix(image, data), target)


def _video_place(video: str, target: Path, images: str) -> Path:
    if images == "path":
        return Path(video).resolve()
    return _copied(lambda aside: shutil.copyfile(video, aside), video_key(video), Path(video).suffix, target)


def _copied(write: Callable[[Path], Any], key: int, suffix: str, target: Path) -> Path:
    """A file beside the target, called by its content."""
    folder = target.with_name(f"{target.stem}_images").resolve()
    copy = folder / f"{key % 2**64:016x}{suffix}"
    if not copy.exists():
        folder.mkdir(exist_ok=True)
        aside = copy.with_name(f"{copy.name}.{os.getpid()}.partial")
        write(aside)
        aside.replace(copy)
    return copy


def _suffix(image: Mapping[str, Any], data: bytes) -> str:
    suffix = Path(image.get("path") or "").suffix
    if suffix:
        return suffix
    with Image.open(BytesIO(data)) as opened:
        return f".{(opened.format or 'png').lower()}"


def _put(image: Mapping[str, Any], target: Path, images: str) -> dict[str, Any]:
    """An image as a table holds it: inside, copied, or where it is."""
    if images == "copy":
        return {"bytes": None, "path": str(_place(image, target, images))}
    if images == "path":
        return dict(image)
    path = image.get("path")
    return {"bytes": image_bytes(image), "path": None if path is None else Path(path).name}


def _videos(pairs: Dataset) -> Iterable[Path]:
    if "videos" in pairs.column_names:
        for record in pairs.select_columns(["videos"]):
            yield from (Path(video) for video in record["videos"] or ())


def _write_parquet(pairs: Dataset, aside: Path, target: Path, images: str) -> Path | None:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    outside = set(_videos(pairs))
    pairs = encoded(pairs, pairs.column_names)
    features = pairs.features.copy()
    if "images" in features:
        features["images"] = _IMAGES
    schema = features.arrow_schema
    with pq.ParquetWriter(aside, schema) as writer:
        for start in range(0, len(pairs), ROW_GROUP):
            rows = pairs[start : start + ROW_GROUP]
            if "images" in rows:
                rows["images"] = [[_put(one, target, images) for one in own or ()] for own in rows["images"]]
                outside |= {Path(one["path"]) for own in rows["images"] for one in own if one["bytes"] is None}
            writer.write_table(pa.Table.from_pydict(rows, schema=schema))
    return _root(outside)
