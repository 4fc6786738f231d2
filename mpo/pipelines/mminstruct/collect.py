"""Collect images: of folders and data sets, without broken, small and duplicate ones, each with its domain, licence and origin."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from mpo.data import similar
from mpo.data.files import open_files
from mpo.data.images import open_image
from mpo.data.paths import inside
from mpo.data.similar import glimpse, may_be_same, same_image
from mpo.generation.generator import Generator, Request, Response
from mpo.io import BadRecord, read_json_lines, write_json_lines
from mpo.pipelines.ledger import content_hash
from mpo.pipelines.mminstruct.domains import Domain, check_domain, load_domains, prompt
from mpo.pipelines.mminstruct.language import without_thinking
from mpo.pipelines.step import Dropped, Record, Step

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm")
METADATA = "metadata.jsonl"
"""File of a folder with a line for images that more is known of, by their ``file_name``, as in datasets' ImageFolder."""
NAMES = {
    "id": ("id",),
    "image": ("image", "images", "file_name", "path"),
    "domain": ("domain",),
    "licence": ("licence", "license"),
    "origin": ("origin", "url"),
    "ocr": ("ocr",),
    "tags": ("tags",),
}
"""Fields of a line about an image, and the names that are read for each."""
BITS, COMPARED = 3, 64
"""Largest number of differing hash bits of two images to compare, and of earlier images that one is compared with in a bucket."""


def read_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The lines of a JSONL, JSON or Parquet file, each with its place. Raises BadRecord for one that cannot be read."""
    for shard in open_files(path):
        for where, line in shard.lines():
            if isinstance(line, BadRecord):
                raise line
            yield where, line


def image_of(value: Any) -> Any:
    """The image of a field as data sets have it: bytes, or a path."""
    if isinstance(value, Mapping):
        return value["bytes"] if value.get("bytes") is not None else value.get("path")
    return value


@dataclass
class Images:
    """The images of a folder, or of a data set: JSONL, JSON or Parquet with an ``image`` (a path, or bytes) a line.

    Args:
        path: the folder, which is searched with all folders in it, or the file.
        name: the beginning of the ids; None for the name of `path`.
        domain: the domain of all its images; ``folder``: the name of the folder in `path` that an image is in; None: that of its
            line, if any.
        licence, origin: of all images whose line does not say another.
        domains: the known domains; None for `load_domains`.
        limit: maximum number of images.
        order: file in which the order of a folder's images is noted, so that new ones come after them.

    Raises:
        ValueError: for a path without images, an unknown domain, and, while iterating, a line that is about no image.
    """

    path: str | Path
    name: str | None = None
    domain: str | None = None
    licence: str | None = None
    origin: str | None = None
    domains: Mapping[str, Domain] | None = None
    limit: int | None = None
    order: Path | None = None
    _known: dict[str, Domain] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(os.path.abspath(self.path))
        if not self.path.exists():
            raise ValueError(f"There is no {self.path}. Give a folder of images, or a JSONL, JSON or Parquet file.")
        self.name = self.name or self.path.name.split(".")[0]
        self._known = dict(self.domains or load_domains())
        if self.domain not in (None, "folder"):
            self.domain = check_domain(self.domain, self._known, str(self.path))
        if self.path.is_dir() and next(self._files(), None) is None:
            others = sum(len(files) for _, _, files in os.walk(self.path))
            found = f"{others:,} files of other types" if others else "no files"
            raise ValueError(f"{self.path} has no images: {found}. Images end in {', '.join(ENDINGS)}.")

    def __iter__(self) -> Iterator[Record]:
        records = islice(self._of_folder() if Path(self.path).is_dir() else self._of_lines(), self.limit)
        if (first := next(records, None)) is None:
            raise ValueError(f"{self.path} has no images. Leave it out.")
        yield first
        yield from records

    def _files(self) -> Iterator[str]:
        for folder, inner, files in os.walk(self.path):
            inner[:] = sorted(name for name in inner if name[0] != ".")
            for file in sorted(files):
                if file[0] != "." and file.lower().endswith(ENDINGS):
                    path = os.path.relpath(os.path.join(folder, file), self.path)
                    if (shown := os.fsencode(path).decode(errors="backslashreplace")) != path:
                        raise ValueError(f"{self.path}: the name of {shown} is not valid UTF-8. Rename it.")
                    yield path

    def _in_order(self) -> list[str]:
        """The files, those of an earlier run first, as it has noted them in `order`: others may have come between them."""
        files = [*self._files()]
        if self.order is None:
            return files
        there = {*files}
        earlier = [path for path in (read_json_lines(self.order) if self.order.is_file() else ()) if path in there]
        files = [*earlier, *sorted(there - {*earlier})]
        write_json_lines(self.order, files)
        return files

    def _of_folder(self) -> Iterator[Record]:
        said: dict[str, Any] = {}
        file = Path(self.path) / METADATA
        for number, line in enumerate(read_json_lines(file) if file.is_file() else (), 1):
            if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
                raise BadRecord(f"{file}:{number}", "it has no 'file_name'. Give the path of an image, relative to the folder.")
            if (path := os.path.normpath(line["file_name"])) in said:
                raise BadRecord(f"{file}:{number}", f"{path!r} is listed twice. Remove one of the lines.")
            said[path] = line
        for path in self._in_order():
            about = {name: value for name, value in _about(said.pop(path, {})).items() if name != "id"}
            yield self._record(path, os.path.join(self.path, path), about, path)
        if said:
            raise ValueError(f"{file}: there is no image {next(iter(said))!r} in {self.path}. Fix its 'file_name'.")

    def _of_lines(self) -> Iterator[Record]:
        for where, line in read_lines(self.path):
            about = _about(line)
            image = about.pop("image", None)
            image = image_of(image[0] if isinstance(image, list) and len(image) == 1 else image)
            if not image or not isinstance(image, str | bytes):
                raise BadRecord(where, f"it has no image. Name it {' or '.join(NAMES['image'])}; each line has one.")
            path = image if isinstance(image, str) else ""
            shown = inside(Path(self.path).parent, path, where=where) if path else image
            yield self._record(str(about.pop("id", path or where.rpartition(":")[2])), shown, about, path, where)

    def _record(self, name: str, image: Any, about: dict[str, Any], path: str, where: str = "") -> Record:
        domain = about.pop("domain", None)
        if self.domain == "folder":
            parts = Path(path).parts
            if len(parts) < 2:
                raise ValueError(f"{self.path}: {path or name} is in no folder, and folders name the domains. Move it into one.")
            domain = parts[0]
        if domain := domain or self.domain:
            domain = check_domain(domain, self._known, where or os.path.join(self.path, path))
        given = {"domain": domain, "licence": self.licence, "origin": self.origin, **about}
        if isinstance(image, str) and os.path.isfile(image):
            given["state"] = content_hash(image, read=False)  # so that a replaced image is looked at again
        return {"id": f"{self.name}/{name}", "images": [image], "source": self.name, **{k: v for k, v in given.items() if v}}


def _about(line: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for field_name, names in NAMES.items():
        value = next((line[name] for name in names if line.get(name) not in (None, "", [])), None)
        if field_name == "tags" and isinstance(value, str):
            value = [tag.strip() for tag in value.split(",") if tag.strip()]
        if field_name == "ocr" and isinstance(value, list):
            value = "\n".join(map(str, value))
        if value is not None:
            found[field_name] = value
    return found


class Look(Step):
    """Open an image, and note its ``width``, ``height``, ``content`` (a hash of the file) and ``look`` (one of its appearance).

    Args:
        min_side: the shortest side that is large enough, in pixels.
    """

    verb = "look"

    def __init__(self, *, min_side: int = 64) -> None:
        self.min_side = min_side

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:  # noqa: D102
        try:
            record.pop("state", None)
            image = open_image(record["images"][0])
        except ValueError as error:
            raise Dropped(str(error), kind="broken") from None
        if min(image.size) < self.min_side:
            raise Dropped(f"it is too small: {image.width} x {image.height}, under {self.min_side} pixels", kind="small")
        hashes = {"content": content_hash(record["images"][0]), "look": similar.difference_hash(image)}
        return {**record, "width": image.width, "height": image.height, **hashes}


class Classify(Step):
    """Ask a model for the ``domain`` of an image that has none.

    Args:
        generator: the model, which sees images.
        domains: files of further domains (`load_domains`).
        max_side: the image is made smaller to so many pixels of its longer side.
    """

    verb = "classify"

    def __init__(self, generator: Generator, *, domains: Sequence[str] = (), max_side: int | None = 512) -> None:
        self.generator, self.domains, self.max_side = generator, [str(one) for one in domains], max_side
        self.sampling = {"temperature": 0.0, "max_new_tokens": 32}
        self._known = load_domains(self.domains)

    def requests(self, record: Record) -> list[Request]:  # noqa: D102
        if record.get("domain"):
            return []
        asked = prompt("domain", domains=[(name, domain.about["en"]) for name, domain in self._known.items()])
        return [Request.ask(asked, images=[smaller(record["images"][0], self.max_side)])]

    def finish(self, record: Record, responses: Sequence[Sequence[Response]]) -> Record:  # noqa: D102
        if record.get("domain"):
            return record
        said = without_thinking(responses[0][0].text)
        words = re.sub(r"[\W_]+", "_", said.lower()).strip("_")
        found = [name for name in self._known if f"_{name.lower()}_" in f"_{words}_"]
        if len(found) != 1:
            raise Dropped(f"the model names {'several domains' if found else 'no known domain'}: {said!r:.80}", kind="domain")
        return {**record, "domain": found[0]}


def smaller(image: Any, max_side: int | None) -> Any:
    """Return an image whose longer side is at most `max_side` pixels: itself, if it is; None for any size."""
    if max_side is None:
        return image
    opened = open_image(image)
    if max(opened.size) <= max_side:
        return image
    opened = opened.copy()
    opened.thumbnail((max_side, max_side))
    return opened


def duplicates(records: Iterable[Record], *, near: bool = True, before: Collection[str] = ()) -> dict[str, str]:
    """Find duplicates among images that `Look` has seen: the same file, or near copies (compressed again, made smaller).

    Of several copies that of the first source is kept, and of one source the largest.

    Args:
        records: the records.
        near: whether to find near copies too.
        before: ids of images that an earlier run has kept, which stay.

    Returns:
        the ids of the duplicates, each with the reason, which names the image that is kept.
    """
    kept: dict[str, Record] = {}  # by the content of each that has been seen
    buckets: dict[tuple[int, int], list[Record]] = {}
    found: dict[str, str] = {}
    records = list(records)
    sources = {name: place for place, name in enumerate(dict.fromkeys(one["source"] for one in records))}
    for record in sorted(records, key=lambda one: (one["id"] not in before, sources[one["source"]], -one["width"] * one["height"])):
        if (first := kept.setdefault(record["content"], record)) is not record:
            found[record["id"]] = f"it is the same file as {first['id']!r}"
            continue
        keys = [(block, (record["look"] >> (16 * block)) & 0xFFFF) for block in range(similar.BLOCKS)] if near else []
        earlier = {one["id"]: one for key in keys for one in buckets.get(key, ())[-COMPARED:]}
        close = (one for one in earlier.values() if similar.differing_bits(one["look"], record["look"]) <= BITS)
        if same := next((one for one in close if _same(one, record)), None):
            found[record["id"]] = f"it is a copy of {same['id']!r}"
            kept[record["content"]] = same
            continue
        for key in keys:
            buckets.setdefault(key, []).append(record)
    return found


def _same(one: Record, other: Record) -> bool:
    first, second = sorted((open_image(each["images"][0]) for each in (one, other)), key=lambda image: -image.width)
    if not may_be_same(glimpse(first), glimpse(second)):
        return False
    if abs(first.width * second.height - second.width * first.height) <= max(*first.size, *second.size):
        first = first.resize(second.size)
    return same_image(first, second)


def check_unique(sources: Sequence[Images]) -> None:
    """Raises ValueError for two sources with the same name, whose ids would be the same."""
    names = [one.name for one in sources]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"Two sources are called {twice!r}. Give one another name.")
