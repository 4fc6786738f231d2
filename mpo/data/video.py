"""Convert videos to images: evenly spread frames, in the places and with the names that InternVL uses.

A prompt's ``{"type": "video"}`` part becomes, as in the official MPO code, one line per frame:

    Frame1: <image>
    Frame2: <image>

Each frame is one tile. The number of frames is known from the file's header; frames are decoded when the record is used. They are
evenly spread in time: in a video with a variable frame rate, a frame that is shown long may be used twice.
Needs PyAV (``pip install mpo-trainer[video]``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image

from mpo.data.images import check_pixels
from mpo.data.paths import regular_file
from mpo.io import did_you_mean, json_kind

MIN_FRAMES = 8
MAX_FRAMES = 32
DEFAULT_FRAMES = {"min": MIN_FRAMES, "max": MAX_FRAMES}
FRAMES_PER_SECOND = 1.0
"""Frames per second of a video, between the minimum and the maximum. (The official code draws the number at random.)"""
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,flv,ogg,asf,gif"
"""Formats that FFmpeg may try: no playlists, which name other files and URLs."""
MAX_SIDE = 1920
"""Maximum side of a frame in pixels: larger frames are resized when decoded, since all frames of a video are in memory together.

Full HD is not resized; a frame becomes one tile, whose sides are 448 pixels in InternVL, so no detail of it is lost.
"""
_SEEK_BEYOND = 5.0  # seconds; closer frames are reached by decoding those in between


@dataclass(frozen=True)
class Frame:
    """A frame of a video, not yet decoded: number `place` (from 0) of `count` frames that are evenly spread in time."""

    path: str
    place: int
    count: int


@dataclass(frozen=True)
class _Header:
    width: int
    height: int
    frames: int
    start: float  # of the first frame, in seconds
    seconds: float


def checked_limits(value: Any, name: str, flags: Sequence[str] = ()) -> dict[str, Any] | None:
    """Check an object with ``min``, ``max`` and `flags`; return all keys, or None if nothing is set. Raises ValueError."""
    if value is None:
        return None
    known = ("min", "max", *flags)
    expected = f"{name} must be an object with {', '.join(known)}, each optional"
    if not isinstance(value, Mapping):
        raise ValueError(f"{expected}; got {json_kind(value)}: {value!r:.50}.")
    for key, given in value.items():
        if key not in known:
            raise ValueError(f"{expected}; got {key!r}.{did_you_mean(key, known)}")
        if key in flags:
            is_right = isinstance(given, bool)
        else:
            is_right = isinstance(given, int) and not isinstance(given, bool) and 1 <= given < 2**31
        if given is not None and not is_right:
            what = "true or false" if key in flags else "a whole number of 1 or more"
            raise ValueError(f"{key} of {name} must be {what}; got {given!r:.50}.")
    least, most = value.get("min"), value.get("max")
    if least is not None and most is not None and least > most:
        raise ValueError(f"{name} must have 1 <= min <= max; got min {least}, max {most}.")
    return {key: value.get(key) for key in known} if any(given is not None for given in value.values()) else None


def checked_frames(value: Any) -> dict[str, int] | None:
    """Check the minimum and maximum frames of a video; return both, or None if nothing is set. Raises ValueError for others."""
    found = checked_limits(value, "frames")
    if found is None:
        return None
    most = found["max"] or max(MAX_FRAMES, found["min"])
    return {"min": found["min"] or min(MIN_FRAMES, most), "max": most}


def with_frames(record: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Replace the videos of a record by frames among its images. A record without videos is returned unchanged.

    A prompt in messages has one ``{"type": "video"}`` part for each of the ``videos``, a list of paths. Images keep their order and
    have one tile each, as the frames do. ``frames`` of a record: see `checked_frames`. `where` names it in messages.

    Raises ValueError for a video that is missing or cannot be read, and for a prompt with another number of video parts.
    """
    paths = record.get("videos") or []
    if not paths:
        return dict(record)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: 'videos' must be a list of paths; got {paths!r:.100}.")
    prompt: list[Any] = record["prompt"] if isinstance(record.get("prompt"), list) else []
    kinds = [part.get("type") for message in prompt for part in _parts(message)]
    images = record.get("images") if record.get("images") is not None else record.get("image")
    own = iter([] if images is None else images if isinstance(images, (list, tuple)) else [images])
    if kinds.count("video") != len(paths):
        found = f"the prompt has {kinds.count('video')} video parts for {len(paths)} videos"
        raise ValueError(f'{where}: {found}. Give messages with one part {{"type": "video"}} for each.')
    limits = checked_frames(record.get("frames")) or DEFAULT_FRAMES
    frames = [
        frames_of(path, where=f"{where}: video {number} of {len(paths)}", min_frames=limits["min"], max_frames=limits["max"])
        for number, path in enumerate(paths, start=1)
    ]
    videos, in_order, messages = iter(frames), [], []
    for message in prompt:
        content: list[Any] = []
        for part in _parts(message):
            if part.get("type") == "video":
                shown = next(videos)
                in_order += shown
                # The chat template puts a line break after every image.
                for number in range(1, len(shown) + 1):
                    content += [{"type": "text", "text": f"Frame{number}: "}, {"type": "image", "text": None}]
                continue
            if part.get("type") == "image":
                in_order += [image for image in [next(own, None)] if image is not None]
            content.append(part)
        messages.append({**message, "content": content} if content else message)
    in_order += own  # more images than image parts: refused later, where images are counted
    kept = {name: value for name, value in record.items() if name not in ("videos", "frames", "image")}
    return {**kept, "prompt": messages, "images": in_order, "tiles": {"min": 1, "max": 1}}


def _parts(message: Mapping[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def frames_of(path: str, *, where: str = "", min_frames: int = MIN_FRAMES, max_frames: int = MAX_FRAMES) -> list[Frame]:
    """Choose the frames of a video, undecoded: `FRAMES_PER_SECOND`, at least `min_frames`, at most `max_frames` or all it has.

    Raises ValueError for a missing file, and for a file that FFmpeg cannot read as a video.
    """
    if not 1 <= min_frames <= max_frames:
        raise ValueError(f"Expected 1 <= min_frames <= max_frames; got min_frames={min_frames} and max_frames={max_frames}.")
    with _named(where):
        header = _header(path)
    count = min(max(round(header.seconds * FRAMES_PER_SECOND), min_frames), max_frames, header.frames)
    return [Frame(path, place, count) for place in range(count)]


def frame_size(frame: Frame, *, where: str = "") -> tuple[int, int]:
    """Read the height and width of a frame from the file's header; `open_frames` may resize it."""
    with _named(where):
        header = _header(frame.path)
    return header.height, header.width


def open_frames(path: str, frames: Sequence[Frame], *, where: str = "") -> list[Image.Image]:
    """Decode frames of a video, as `frames_of` chooses them: upright RGB images, in order, with sides of `MAX_SIDE` at most.

    Raises ValueError for a video, which `where` names in messages, that is missing, cut short or damaged.
    """
    with _named(where):
        header = _header(path)
        wanted = [index_of(frame, header.frames) for frame in frames]
        in_order = sorted(set(wanted))
        moments = [header.start + (index + 0.5) * header.seconds / header.frames for index in in_order]
        with _opened(path) as (container, stream):
            decoded = [_upright(frame) for frame in _frames_at(container, stream, moments, header, path)]
        found = dict(zip(in_order, decoded, strict=True))
        return [found[index] for index in wanted]


def index_of(frame: Frame, frames: int) -> int:
    """Return the index of a frame in a video with `frames` frames: the middle one of `frame.count` equal intervals.

    >>> [index_of(Frame("", place, 4), 40) for place in range(4)]
    [4, 14, 24, 34]
    """
    first, end = (place * frames // frame.count for place in (frame.place, frame.place + 1))
    return (first + end - 1) // 2


def _frames_at(container: Any, stream: Any, moments: Sequence[float], header: _Header, path: str) -> Iterator[Any]:
    each = header.seconds / header.frames
    decoded: Iterator[Any] = iter(())
    current: Any = None  # the last frame up to the given time
    following: Any = None
    for moment in moments:
        at = following or current
        if at is None or moment > at.time + _SEEK_BEYOND:
            container.seek(int(moment / stream.time_base), stream=stream)
            decoded, current, following = container.decode(stream), None, None
        while following is None or following.time <= moment:
            current, following = following or current, next(decoded, None)
            if following is None:
                break
        shown = current or following  # the first frame may be shown late
        if shown is None or (following is None and moment > shown.time + _seconds(shown.duration, stream, each) + each):
            raise ValueError(f"{path}: the video ends before {moment:.1f} s; it is cut short. Fix it or leave the record out.")
        check_pixels((shown.width, shown.height), path)
        yield shown


def _seconds(duration: int | None, stream: Any, default: float) -> float:
    return float(duration * stream.time_base) if duration else default


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)  # does not enlarge smaller ones
    turned = getattr(frame, "rotation", 0)  # counterclockwise
    return image.rotate(turned, expand=True) if turned else image


def _header(path: str) -> _Header:
    state = os.stat(regular_file(path, path, "video"))
    return _header_of(path, state.st_size, state.st_mtime_ns)  # the file may be replaced


@lru_cache(maxsize=4096)
def _header_of(path: str, size: int, mtime: int) -> _Header:
    with _opened(path) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        check_pixels((width, height), path)
        seconds = _seconds(stream.duration, stream, (container.duration or 0) / 1e6)
        start = _seconds(stream.start_time, stream, 0.0)
        frames = stream.frames or round(seconds * float(stream.average_rate or 0))
        if frames < 1 or seconds <= 0:  # some containers do not have these
            times = sorted(float(packet.pts * stream.time_base) for packet in container.demux(stream) if packet.pts is not None)
            if not times:
                raise ValueError(f"{path}: this video has no frames. Fix it or leave the record out.")
            each = (times[-1] - times[0]) / max(len(times) - 1, 1) or 1.0
            frames, start, seconds = len(times), times[0], each * len(times)
        return _Header(width, height, frames, start, seconds)


@contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    try:
        import av
    except ImportError:
        raise ValueError(f"{path}: videos need PyAV. Install it: pip install mpo-trainer[video]") from None
    with open(regular_file(path, path, "video"), "rb") as file:
        try:
            # Passed as a Python file, so that FFmpeg itself opens no files.
            lenient: dict[str, Any] = {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
            with av.open(file, options={"format_whitelist": CONTAINERS}, **lenient) as container:
                if not container.streams.video:
                    raise ValueError(f"{path}: this file has no video stream. Fix it or leave the record out.")
                yield container, container.streams.video[0]
        except Exception as error:
            if isinstance(error, ValueError) and str(error).startswith(path):
                raise
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: FFmpeg cannot read this as a video, or it is damaged ({found}). Fix it.") from error


@contextmanager
def _named(where: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error.__cause__
