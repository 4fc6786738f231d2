"""Open images safely: fully decoded, as upright RGB; a bad file raises an error that names it."""

from __future__ import annotations

import os
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageChops, ImageFile, ImageOps, UnidentifiedImageError

from mpo.data.paths import regular_file

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before decoding: a file of a few kilobytes can claim gigabytes."""
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "ICO")
"""Formats that Pillow may try. Not EPS, which runs another program, nor formats without a magic number, which match any bytes."""
ORIENTATION = 0x0112  # of EXIF
_SENT = {"PNG": "image/png", "GIF": "image/gif", "WEBP": "image/webp"}
_TURNED = range(5, 9)  # width and height are swapped
_OTHER_FILES = (
    (rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?(<!doctype svg|<svg)", "an SVG drawing, which has no pixels. Convert it to PNG"),
    (rb"\s*(<!doctype html|<html|<head|<body)", "an HTML page: its download went wrong. Get the image again"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the image. Run git lfs pull"),
    (rb"....ftyp(heic|heix|mif1|msf1)", "a HEIC image. Convert it to JPEG"),
    (rb"%PDF", "a PDF file. Convert its pages to PNG"),
)


def open_image(source: Any, *, where: str = "") -> Image.Image:
    """Open an image: fully decoded, upright as its EXIF data say, as RGB on white, and only the first frame of an animation.

    `source` is a path, the bytes of a file, a dict of datasets' Image feature with ``bytes`` or ``path``, or a PIL image, which is
    returned itself if it is RGB already; ``filename`` is the path, if there is one. `where` names the image in messages.

    Raises ValueError for a file that is missing, cut short, damaged, not an image or not of `FORMATS`, for more than `MAX_PIXELS`,
    and for pixels without a defined white (32-bit and float).
    """
    if isinstance(source, Image.Image):
        where = where or "the image"
        with _refusing(where):
            return _as_rgb(source, where)
    with _header(source, where) as (opened, name):
        image = _as_rgb(opened, name)
        path = _path_of(source)
        if path:
            image.filename = path  # type: ignore[attr-defined]  # as Image.open has it
        return image


def image_size(source: Any, *, where: str = "") -> tuple[int, int]:
    """Read the height and width of `open_image`'s result from the header alone.

    Raises ValueError as in `open_image`, as far as the header tells.
    """
    if isinstance(source, Image.Image):
        return _upright_size(source)
    if (plain := _plain_size(source)) is not None:
        return plain
    with _header(source, where) as (opened, _):
        return _upright_size(opened)


_HEAD = 4096  # bytes in which the header of a plain file ends
_PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_MODES = {(1, 0), (8, 0), (8, 2), (8, 4), (8, 6)}  # bits and colour type, without a palette
_PNG_CHUNKS = {b"gAMA": 4, b"pHYs": 9, b"sRGB": 1, b"cHRM": 32}


def _plain_size(source: Any) -> tuple[int, int] | None:
    """Height and width of a plain JPEG or PNG, several times as fast as Pillow opens it; None for any other source.

    Plain is a header with nothing that Pillow turns the image by, refuses or warns about: it finds the same size.
    """
    content = source.get("bytes") if isinstance(source, Mapping) else source
    try:
        if isinstance(content, bytes):
            head = content[:_HEAD]
        elif isinstance(content, (str, Path, type(None))) and (path := _path_of(source)):
            with open(regular_file(path, "", "image"), "rb", buffering=0) as file:
                head = file.read(_HEAD)
        else:
            return None
        found = _jpeg_size(head) if head.startswith(b"\xff\xd8\xff") else _png_size(head) if head.startswith(_PNG) else None
    except (OSError, ValueError, IndexError):  # raised again by Pillow
        return None
    return found if found is not None and 0 < found[0] * found[1] <= MAX_PIXELS else None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    """Height and width, if its segments up to the first scan are in `head`, without EXIF, XMP, and images that follow this one."""
    at, size = 2, None
    while head[at] == 0xFF:
        kind, begin = head[at + 1], at + 4
        at += 2 + (head[at + 2] << 8 | head[at + 3])
        length = at - begin
        if length < 0 or at > len(head):
            return None
        if kind in (0xC0, 0xC1, 0xC2):  # start of frame
            layers = head[begin + 5]
            if size is not None or head[begin] != 8 or layers not in (1, 3, 4) or length != 6 + 3 * layers:
                return None
            size = head[begin + 1] << 8 | head[begin + 2], head[begin + 3] << 8 | head[begin + 4]
        elif kind == 0xDB:  # quantization tables of 8 bits
            if length % 65 or any(table > 15 for table in head[begin:at:65]):
                return None
        elif kind == 0xDA:
            return size
        elif kind not in (0xC4, 0xDD, 0xFE) and not (kind in (0xE0, 0xEE) and length >= 12):
            if kind != 0xE2 or length < 14 or head[begin : begin + 12] != b"ICC_PROFILE\0":
                return None
    return None


def _png_size(head: bytes) -> tuple[int, int] | None:
    at = 8
    while (kind := head[at + 4 : at + 8]) != b"IDAT":
        begin, end = at + 4, at + 8 + int.from_bytes(head[at : at + 4], "big")
        at = end + 4
        known = end - begin - 4 == (13 if begin == 12 else _PNG_CHUNKS.get(kind))
        if not known or zlib.crc32(head[begin:end]) != int.from_bytes(head[end:at], "big"):
            return None
    if tuple(head[24:26]) not in _PNG_MODES or head[27]:
        return None
    return int.from_bytes(head[20:24], "big"), int.from_bytes(head[16:20], "big")


def media_type(content: bytes, *, where: str = "") -> str | None:
    """The media type of a file whose pixels anyone reads as `open_image` does; None for one that has to be converted.

    These are JPEG, PNG, GIF and WebP without transparency, 16-bit grey, CMYK or further frames, and upright unless JPEG, whose
    orientation is commonly known. A JPEG needs its end, a PNG the checksums of all its chunks; anything else is decoded.

    Raises ValueError as in `open_image`.
    """
    with _header(content, where) as (opened, _):
        jpeg = opened.format in ("JPEG", "MPO")
        plain = opened.mode in ("1", "L", "P", "RGB") and "transparency" not in opened.info
        plain = plain and (jpeg or not (_orientation(opened) > 1 or getattr(opened, "is_animated", False)))
        if opened.format == "PNG":
            opened.verify()
        elif not jpeg or content.rfind(b"\xff\xd9") < content.rfind(b"\xff\xda"):  # no end after the last scan
            opened.load()
        return "image/jpeg" if jpeg and plain else _SENT.get(opened.format or "") if plain else None


@contextmanager
def _header(source: Any, where: str) -> Iterator[tuple[Image.Image, str]]:
    path = _path_of(source)
    name = ": ".join(part for part in (where, path) if part) or "the image"
    content = source.get("bytes") if isinstance(source, Mapping) else source
    if isinstance(content, (bytes, bytearray, memoryview)):
        stream: BinaryIO = BytesIO(content)
    elif path:
        try:
            stream = open(regular_file(path, name, "image"), "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{name}: this image cannot be opened ({error.strerror}). Fix its permissions.") from error
    else:
        found = "neither" if isinstance(source, Mapping) else type(source).__name__
        raise ValueError(f"{name}: an image is a path, bytes, a dict with 'bytes' or 'path', or a PIL image; got {found}.")
    with stream, _refusing(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about files that are then refused or decoded anyway
        head = stream.read(512)
        stream.seek(0)
        if not head:
            raise ValueError(f"{name}: this file is empty. Get the image again or leave the record out.")
        for pattern, found in _OTHER_FILES:
            if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
                raise ValueError(f"{name}: this file is {found}, or leave the record out.")
        with Image.open(stream, formats=_formats()) as opened:
            check_pixels(opened.size, name)
            yield opened, name


def _path_of(source: Any) -> str | None:
    path = source.get("path") if isinstance(source, Mapping) else source
    return os.fspath(path) if isinstance(path, (str, Path)) and os.fspath(path) else None


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # an older Pillow may lack one


def check_pixels(size: tuple[int, int], name: str) -> None:
    """Refuse an image without pixels, or with more than `MAX_PIXELS`. Raises ValueError for such a size."""
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name}: an image of {width} x {height} pixels is empty. Leave the record out.")
    if width * height > MAX_PIXELS:
        found = f"{name}: an image of {width:,} x {height:,} pixels is beyond the limit of {MAX_PIXELS:,}"
        raise ValueError(f"{found}. Make it smaller, leave the record out, or raise mpo.data.images.MAX_PIXELS.")


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # another library may have set it
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"{name}: this file is not an image that Pillow can read. Fix it or leave the record out.") from None
    except Image.DecompressionBombError as error:
        found = str(error).partition(", could be")[0]
        raise ValueError(f"{name}: {found} (a decompression bomb?). Make it smaller or leave the record out.") from None
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: this image is cut short or damaged ({found}). Fix it or leave the record out.") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _orientation(image: Image.Image) -> int:
    # Pillow turns TIFFs itself, and would decode a PNG in search of EXIF data.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # invalid EXIF data are ignored
        return 1
    return found if found in range(1, 9) else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.width, image.height) if _orientation(image) in _TURNED else (image.height, image.width)


def _as_rgb(image: Image.Image, name: str) -> Image.Image:
    orientation = _orientation(image)
    check_pixels(image.size, name)
    if isinstance(image, ImageFile.ImageFile):
        image.load()
    rgb = _colours(image, name)
    if orientation > 1:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        rgb = rgb.copy()
        rgb.info["exif"] = exif.tobytes()
        rgb = ImageOps.exif_transpose(rgb)
    if rgb is not image:
        rgb.info.clear()  # it includes the orientation, by which a saved copy would be turned again
    return rgb


def _colours(image: Image.Image, name: str) -> Image.Image:
    mode = image.mode
    sixteen = mode.startswith("I;16") or (mode == "I" and image.format in ("PNG", "PPM"))
    see_through = image.info.get("transparency")
    if see_through is not None and (sixteen or (isinstance(see_through, tuple) and max(see_through) > 255)):
        raise ValueError(f"{name}: it has 16 bits and a transparent colour, which Pillow loses. Convert it to 8 bits.")
    if sixteen:
        values = np.asarray(image).astype(np.uint32) & 0xFFFF
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if mode in ("I", "F"):
        kind = "32-bit integers" if mode == "I" else "floating-point numbers"
        raise ValueError(f"{name}: its pixels are {kind}, a type without a fixed value for white. Convert it to 8 or 16 bits.")
    if mode == "CMYK" and image.format in ("JPEG", "MPO") and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow treats every CMYK JPEG as Adobe's, whose values are inverted
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if mode == "RGB" and not isinstance(image, ImageFile.ImageFile):
        return image
    return image.convert("RGB")
