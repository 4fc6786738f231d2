"""Read the tar of a WebDataset, sample by sample."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mpo.data.shards import DAMAGE, Line, Shard, damaged, parse_line
from mpo.io import BadRecord

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
MAX_SAMPLE_BYTES = 256 * 2**20
"""Maximum uncompressed bytes of all members of a sample, which are in memory at once."""


@dataclass(frozen=True)
class TarShard(Shard):
    """A WebDataset tar: the members with one key are a sample, ``key.json`` is its line, ``key.jpg`` and similar are its images.

    A line may name its images by their members; otherwise the sample has all its image members, in the tar's order.
    """

    def lines(self) -> Iterator[Line]:  # noqa: D102
        seen: set[str] = set()
        try:
            with tarfile.open(self.path, "r|*") as archive:
                members = (member for member in archive if not member.isdir())
                for key, sample in groupby(members, lambda member: _key(member.name)):
                    yield self._line(archive, key, sample, key not in seen)
                    seen.add(key)
        except (tarfile.TarError, *DAMAGE) as error:
            raise damaged(self.path, error, "not a tar, ") from error

    def _line(self, archive: tarfile.TarFile, key: str, sample: Iterator[tarfile.TarInfo], is_new: bool) -> Line:
        """Return the place of a sample and its line with the images in it, or the first reason why it is not valid."""
        members: dict[str, bytes] = {}
        size = 0
        for member in sample:
            where, name = f"{self.path}:{member.name}", member.name.rpartition("/")[2]
            size += member.size
            file = archive.extractfile(member) if member.isreg() and size <= MAX_SAMPLE_BYTES else None
            if not is_new:
                reason = "its key was there before, after which other samples came. Put the members of a sample together."
            elif not member.isreg():
                reason = "a link or a device in the tar. Pack the files themselves."
            elif name in members:
                reason = "this member is there twice. Remove one of them."
            elif file is None:
                found = f"the members of its sample have more than {MAX_SAMPLE_BYTES >> 20} MiB, but are read at once"
                reason = f"{found}. Make the images smaller, or leave the sample out."
            else:
                members[name] = file.read()
                continue
            return where, BadRecord(where, reason)
        where = f"{self.path}:{key}"
        try:
            return where, _with_images(key, members)
        except ValueError as error:
            return where, BadRecord(where, str(error))


def _key(name: str) -> str:
    """Return the key of a member: its folder and its name up to the first dot."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _with_images(key: str, members: dict[str, bytes]) -> dict[str, Any]:
    texts = [name for name in members if name.lower().endswith(".json")]
    if len(texts) != 1:
        raise ValueError(f"a sample must have one member {os.path.basename(key)}.json with its line; got {sorted(members)}.")
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
