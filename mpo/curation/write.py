"""Write pairs of any source to a file in one of the forms that `load_preferences` reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image

from mpo.data.eval_part import encoded, image_bytes, key_of, video_key
from mpo.data.formats import FORMATS, detect
from mpo.data.messages import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from mpo.data.unused import metadata_of
from mpo.io import json_line, replacing
from mpo.schema import names

FORMS = ("trl", "mmpr", "parquet", "disk")
"""TRL's columns as JSONL; MMPR's JSONL; TRL's columns as Parquet; a folder of `save_to_disk`."""
IMAGES = ("path", "copy", "bytes")
"""Keep the paths of images; copy image files next to the target; store images in the target itself."""
ENDINGS = {".parquet": "parquet", ".jsonl": "trl", ".json": "trl", "": "disk"}
"""The form of a target by its suffix; a number, as in ``pairs-v1.2``, is not a suffix."""
ROW_GROUP = 256
"""Number of records of a Parquet row group, which may be large if it contains images."""
_IMAGES = List(ImageFeature())
NOT_IN_MMPR = names(mmpr=False)
"""Columns that MMPR's lines cannot hold. (In MMPR, `augment` is set in meta.json, for a whole file.)"""


@dataclass(frozen=True)
class Written:
    """The result of writing pairs.

    ``image_root`` is the folder of the files that the target refers to (None: none); paths in a JSONL file are relative to it.
    ``lost`` has, for every column that the form cannot hold, the number of records with a value in it.
    """

    path: Path
    form: str
    pairs: int
    image_root: Path | None
    lost: dict[str, int]
    unit: str = "pairs"


def not_kept(written: Written) -> list[str]:
    """List the columns that change when a file is read again; in MMPR's form prompt ids are recomputed, with the same groups."""
    return [*written.lost, *(["prompt_id"] if written.form == "mmpr" else [])]


def write_pairs(
    pairs: Dataset, target: str | Path, *, form: str | None = None, images: str | None = None, image_root: str | Path | None = None
) -> Written:
    """Write pairs; the target appears when it is complete.

    Args:
        target: a file or folder that does not exist.
        form: one of `FORMS`; default: by the suffix of the target: ``.parquet``, ``.jsonl`` (``"trl"``), none (``"disk"``).
        images: one of `IMAGES`; default: ``"path"`` in JSONL, with copies of images that are not files, else ``"bytes"``.
        image_root: the folder that image paths in JSONL are relative to; default: the folder of the target if it
            contains all of them, so that the file is read without more, else the deepest folder that does.

    Raises:
        ValueError: for an existing target, settings that cannot be combined, and records that the form cannot hold.
    """
    target = Path(target).expanduser()
    form = form or _form_of(target)
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.")
    in_lines = form in ("trl", "mmpr")
    if form == "mmpr" and "messages" in pairs.column_names:
        raise ValueError("MMPR's form holds pairs, and these records are conversations. Use trl, parquet or disk.")
    images = images or ("path" if in_lines else "bytes")
    if images not in IMAGES:
        raise ValueError(f"images must be one of {', '.join(IMAGES)}; got {images!r}.")
    if form == "disk" and images != "bytes":
        raise ValueError(f"images={images!r} cannot be used with form='disk', which stores images inside. Write Parquet.")
    if in_lines and images == "bytes":
        raise ValueError("images='bytes' cannot be used with JSONL, which holds paths. Use images='copy', or write Parquet.")
    if image_root is not None and (not in_lines or images == "copy"):
        raise ValueError(f"image_root={str(image_root)!r} needs a JSONL file and images='path'. Leave it out.")
    if target.exists():
        raise ValueError(f"{target} already exists, and nothing is overwritten. Give a new name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as aside:
        root = None
        if in_lines:
            root = _write_lines(pairs, aside, target, form, images, image_root)
        elif form == "parquet":
            root = _write_parquet(pairs, aside, target, images)
        else:
            pairs.save_to_disk(str(aside))
            root = _root(_videos(pairs))
    lost = {}
    for name in NOT_IN_MMPR if form == "mmpr" else ():
        values = pairs.select_columns([name])[:][name] if name in pairs.column_names else []
        if count := sum(value is not None for value in values):
            lost[name] = count
    return Written(target, form, len(pairs), root, lost, "conversations" if "messages" in pairs.column_names else "pairs")


def _form_of(target: Path) -> str:
    ending = target.suffix.lower()
    form = ENDINGS.get("" if ending[1:].isdigit() else ending)
    if form is None:
        raise ValueError(
            f"{target} has an unknown suffix {ending}. Use .jsonl, .parquet, none (save_to_disk), or choose the format."
        )
    return form


# JSONL


def _write_lines(pairs: Dataset, aside: Path, target: Path, form: str, images: str, image_root: Any) -> Path | None:
    shown = [name for name in ("images", "videos") if name in pairs.column_names]
    places: list[dict[str, list[Path]]] = []
    for record in encoded(pairs, shown) if shown else ():
        places.append({name: [_place(one, target, images) for one in record.get(name) or ()] for name in shown})
    root = _root((place for own in places for some in own.values() for place in some), image_root, target.parent.resolve())
    to_line = trl_line if form == "trl" else mmpr_line
    rest = pairs.with_format(None).select_columns([name for name in pairs.column_names if name not in shown])
    with aside.open("w", encoding="utf-8") as file:
        for index, record in enumerate(rest):
            own = places[index] if places else {}
            paths = {name: [place.relative_to(root).as_posix() for place in some] for name, some in own.items() if root}
            file.write(json_line(to_line({**record, **paths})))
    return root


def _root(places: Iterable[Path], given: str | Path | None = None, beside: Path | None = None) -> Path | None:
    """Return the folder that paths are relative to, `beside` if it contains all of them; None without paths."""
    every = set(places)
    if not every:
        return None
    if given is None and beside is not None and all(place.is_relative_to(beside) for place in every):
        return beside
    if given is None:
        return Path(os.path.commonpath({str(place.parent) for place in every}))
    root = Path(given).expanduser().resolve()
    outside = next((place for place in every if not place.is_relative_to(root)), None)
    if outside is not None:
        found = f"The image {str(outside)!r} lies outside image_root={root}"
        raise ValueError(f"{found}. Set it to a folder that contains all images, or use images='copy'.")
    return root


def trl_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record, with images as paths, to a line in TRL's columns."""
    line = {name: value for name, value in record.items() if value not in (None, [])}
    for name in ("prompt", "chosen", "rejected", "messages"):
        if not isinstance(line.get(name, ""), str):
            line[name] = [_without_nulls({**message, "content": _parts(message["content"])}) for message in line[name]]
    return _without_nulls(line)


def mmpr_line(record: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a record, with images as paths, to a line of MMPR; metadata become fields of the line, or one field ``metadata``.

    Raises:
        ValueError: for a record with more turns than a prompt and a completion, or with image placeholders in its text.
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
    """Whether a line is detected as MMPR's and gives this metadata: its fields may have a meaning, in MMPR or another format."""
    try:
        mmpr = FORMATS["mmpr"]
        return detect(line) is mmpr and json.dumps(metadata_of(mmpr, line, list(mmpr.read(line)))[0]) == json.dumps(metadata)
    except ValueError:
        return False


def _one_turn(record: Mapping[str, Any], side: str, role: str) -> str:
    messages, name = record[side], f"Record {record.get('id')!r}"
    if isinstance(messages, str):
        return messages
    roles = [message["role"] for message in messages]
    if roles != [role]:
        found = f"MMPR's form has one prompt and one completion, but '{side}' has the turns {', '.join(roles)}"
        raise ValueError(f"{name}: {found}. Use form='trl'.")
    parts = _parts(messages[0]["content"])
    for placeholder in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER) if side == "prompt" else ():
        if any(placeholder in part.get("text", "") for part in parts):
            raise ValueError(f"{name}: its text has {placeholder}, which stands for a file in MMPR's form. Use form='trl'.")
    # The line break after a placeholder belongs to it: readers drop one.
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


def _place(file: Mapping[str, Any] | str, target: Path, images: str) -> Path:
    """Return the path of an image or a video: of a copy next to the target, named by its hash, if requested or without a file."""
    path = file if isinstance(file, str) else file.get("path") or ""
    if images == "path" and (isinstance(file, str) or file.get("bytes") is None):
        return Path(path).resolve()
    data, suffix = None if isinstance(file, str) else image_bytes(file), Path(path).suffix
    if data is not None and not suffix:
        with Image.open(BytesIO(data)) as opened:
            suffix = f".{(opened.format or 'png').lower()}"
    folder = target.with_name(f"{target.stem}_images").resolve()
    copy = folder / f"{(video_key(path) if data is None else key_of(data)) % 2**64:016x}{suffix}"
    if not copy.exists():
        folder.mkdir(exist_ok=True)
        with replacing(copy) as aside:
            if data is None:
                shutil.copyfile(path, aside)
            else:
                aside.write_bytes(data)
    return copy


def _put(image: Mapping[str, Any], target: Path, images: str) -> dict[str, Any]:
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


# Comparing what was written with its source


def first_difference(one: Dataset, other: Dataset) -> str | None:
    """Describe the first difference between two data sets, or return None. A missing column is equal to nulls.

    Images are compared by the bytes of their files, message contents by their texts and images.
    """
    if len(one) != len(other):
        return f"{len(one):,} pairs against {len(other):,}"
    columns = list(dict.fromkeys([*one.column_names, *other.column_names]))
    for place, (left, right) in enumerate(zip(encoded(one, columns), encoded(other, columns), strict=True)):
        for column in columns:
            a, b = _plain(left.get(column)), _plain(right.get(column))
            if a != b:
                return f"record {place} ({left.get('id')!r}), column {column!r}: {a!r:.60} against {b!r:.60}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"bytes", "path"}:
            return key_of(image_bytes(value))
        return {key: plain for key, plain in ((key, _plain(one)) for key, one in value.items()) if plain is not None} or None
    if isinstance(value, list):
        joined: list[Any] = []
        for one in map(_plain, value):
            if joined and all(isinstance(part, dict) and part.get("type") == "text" for part in (joined[-1], one)):
                one = {"type": "text", "text": (joined.pop().get("text") or "") + (one.get("text") or "")}  # adjacent text parts
            joined.append(one)
        return joined or None
    return value
