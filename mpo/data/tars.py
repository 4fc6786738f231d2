"""Read the tar of a WebDataset, sample by sample."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpo.data.shards import DAMAGE, Line, one_line, parse_line
from mpo.io import BadRecord

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
MAX_SAMPLE_BYTES = 256 * 2**20
"""Maximum uncompressed bytes of all members of a sample, which are in memory at once."""


@dataclass(frozen=True)
class TarShard:
    """A WebDataset tar: the members with one key are a sample, ``key.json`` is its line, ``key.jpg`` and similar are its images.

    A line may name its images by their members; otherwise the sample has all its image members, in the tar's order.
    """

    path: Path

    @property
    def size(self) -> int:  # noqa: D102
        return self.path.stat().st_size

    def lines(self) -> Iterator[Line]:  # noqa: D102
        sample: _Sample | None = None
        seen: set[str] = set()
        try:
            with tarfile.open(self.path, "r|*") as archive:
                for member in archive:
                    if member.isdir():
                        continue
                    key = _key(member.name)
                    if sample is None or key != sample.key:
                        if sample is not None:
                            yield sample.line(self.path)
                        sample = _Sample(key)
                        if key in seen:
                            sample.refuse(
                                f"{self.path}:{member.name}",
                                "its key was there before, after which other samples came. Put the members of a sample one "
                                "after the other.",
                            )
                        seen.add(key)
                    sample.add(archive, member, self.path)
        except (tarfile.TarError, *DAMAGE) as error:
            raise ValueError(
                f"{self.path} is not a tar, damaged or cut short ({one_line(error)}). Download or write it again."
            ) from error
        if sample is not None:
            yield sample.line(self.path)


@dataclass
class _Sample:
    """The members of one key so far, or the first reason why they are not a valid sample."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    size: int = 0
    bad: BadRecord | None = None

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
        """Read the next member, unless the sample is already bad."""
        where, name = f"{path}:{member.name}", member.name.rpartition("/")[2]
        if self.bad is not None:
            return
        self.size += member.size
        file = archive.extractfile(member) if member.isreg() and self.size <= MAX_SAMPLE_BYTES else None
        if not member.isreg():
            self.refuse(where, "a link or a device in the tar. Pack the files themselves.")
        elif name in self.members:
            self.refuse(where, "this member is there twice. Remove one of them.")
        elif file is None:
            self.refuse(
                where,
                f"the members of its sample have more than {MAX_SAMPLE_BYTES >> 20} MiB, but are read at once. Make the images "
                "smaller, or leave the sample out.",
            )
        else:
            self.members[name] = file.read()

    def refuse(self, where: str, reason: str) -> None:
        self.bad = BadRecord(where, reason)
        self.members.clear()

    def line(self, path: Path) -> Line:
        """Return the place of the sample and its line with the images in it."""
        if self.bad is not None:
            return self.bad.where, self.bad
        where = f"{path}:{self.key}"
        try:
            return where, _with_images(self.key, self.members)
        except ValueError as error:
            return where, BadRecord(where, str(error))


def _key(name: str) -> str:
    """Return the key of a member: its folder and its name up to the first dot."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _with_images(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    texts = [name for name in members if name.lower().endswith(".json")]
    if len(texts) != 1:
        raise ValueError(f"a sample must have one member {Path(key).name}.json with its line; got {sorted(members)}.")
    line = parse_line(members.pop(texts[0]))
    column = next((name for name in ("images", "image", "img_path") if line.get(name)), "images")
    found = _named(line.get(column), members) if line.get(column) else list(members)
    others = [name for name in found if name.rpartition(".")[2].lower() not in IMAGES]
    if others:
        raise ValueError(f"the member {others[0]!r} is not an image of a known type ({', '.join(IMAGES)}). Remove it.")
    if found:
        line[column] = [{"bytes": members[name], "path": name} for name in found]
    return line


def _named(given: Any, members: dict[str, bytes]) -> list[str]:
    """Find the members that a line names as its images: by their names, with or without a folder, or by the part after the key."""
    names = []
    for one in given if isinstance(given, list) else [given]:
        last = one.rpartition("/")[2] if isinstance(one, str) else None
        matching = [name for name in members if last in (name, name.partition(".")[2])]
        if len(matching) != 1:
            raise ValueError(f"its image {one!r} is not a member of the sample, which has {sorted(members)}. Fix the name.")
        names += matching
    return names
