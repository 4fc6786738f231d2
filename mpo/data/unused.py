"""Judge the fields of a line that its format does not use: are they metadata, or something that the model should see?

A field is refused if it may be an image, a video or a sound (bytes; the name of a file, unless a file of the record has it; a field
called so in a record without one), a message, or text of the prompt (a sentence, more than six words, or any text in a field called
so). Everything else is metadata: numbers, flags, labels, identifiers, addresses, and texts that repeat the record.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mpo.data.messages import MESSAGES_AS_TEXT
from mpo.io import DUPLICATE_KEY, BadRecord, parse_json

KIND = "unused field"
MAX_LABEL_WORDS = 6
"""Maximum words of a label; two Chinese, Japanese or Korean characters count as a word."""
_MESSAGE, _TEXT = "a message", "text of the prompt"
_FILES = {
    "an image": r"jpe?g|jfif|png|webp|avif|gif|bmp|tiff?|ppm|heic|svg|jp2",
    "a video": r"mp4|webm|mkv|mov|avi|mpe?g|flv|m4v",
    "a sound": r"wav|mp3|flac|ogg|m4a|aac|opus",
}
_FILE = {kind: re.compile(rf"[^\n]*\.(?:{endings})(?:[?#]\S*)?", re.IGNORECASE) for kind, endings in _FILES.items()}
_ENCODED = re.compile(r"data:(?:image|video|audio)/|(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR)[\w+/=\s]{100,}")
_URL = re.compile(r"\w+://")
_SHOWS = re.compile(r"_(?:imgs?|images?|pictures?|photos?|pixels?|screenshots?|videos?)_")
_ASKS = re.compile(
    r"_(?:system|instructions?|inputs?|context|history|quer(?:y|ies)|prompts?|questions?|passages?|messages?|conversations?)_$"
)
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,2}|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_BETWEEN_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")


def check_unused(
    unused: Mapping[str, Any], used: Callable[[], Any], shown: Sequence[Any], advice: str = "say metadata=[{!r}]"
) -> None:
    """Refuse fields that may be something the model should see.

    Args:
        unused: the fields that the format does not use, by name; None, empty texts and empty lists are nothing.
        used: returns what the format uses, of any structure; a message or text that only repeats texts in it is metadata.
        shown: the images and videos of the record: paths, bytes, or dicts with ``bytes`` or ``path``.
        advice: what to do for a field that is metadata, with a place for its name.

    Raises:
        BadRecord: of kind `KIND`, with the first such field, its value, and what to do.
    """
    repeated: set[str] | None = None
    for name, value in unused.items():
        for path, leaf in _leaves(value, name):
            kind = _kind(leaf, path, shown)
            if kind in (_MESSAGE, _TEXT):
                repeated = {text.strip() for text in _texts(used())} if repeated is None else repeated
                said = leaf.get("content", leaf.get("value")) if isinstance(leaf, Mapping) else leaf
                if all(text.strip() in repeated for text in _texts(said)):
                    continue
            if kind is not None:
                what = f"the field {path!r} is not used, but may be {kind} ({leaf!r:.60})"
                raise BadRecord("", f"{what}. Rename it to one that is used, or {advice.format(name)}.", KIND)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a value that are judged one by one, each with its path."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and not MESSAGES_AS_TEXT.match(value):
        try:
            value = parse_json(value, path)
        except BadRecord as bad:  # another text that begins like JSON
            if bad.kind == DUPLICATE_KEY:
                raise
    if isinstance(value, Mapping) and not _is_file(value) and not _is_message(value):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}")
    elif isinstance(value, (list, tuple)) and not _is_history(value):
        for inner in value:
            yield from _leaves(inner, path)
    elif value not in (None, "", b""):
        yield path, value


def _is_file(value: Mapping[str, Any]) -> bool:
    return "bytes" in value and value.keys() <= {"bytes", "path"}


def _is_message(value: Mapping[str, Any]) -> bool:
    return any(isinstance(value.get(who), str) and what in value for who, what in (("role", "content"), ("from", "value")))


def _is_history(value: Sequence[Any]) -> bool:
    """Whether it is a list of questions with their answers, as ms-swift and LLaMA-Factory have them: lists of two texts."""
    return all(isinstance(one, (list, tuple)) and len(one) == 2 and all(isinstance(text, str) for text in one) for one in value)


def _kind(value: Any, path: str, shown: Sequence[Any]) -> str | None:
    """Say what a value may be that the model should see; None for metadata."""
    shows, asks = _named(path)
    if isinstance(value, Mapping) and _is_file(value):
        value, file = value.get("bytes") or value.get("path"), True
    else:
        file = isinstance(value, (bytes, bytearray))
    if isinstance(value, (Mapping, list, tuple)):
        return _MESSAGE
    if isinstance(value, str):
        if MESSAGES_AS_TEXT.match(value):
            return _MESSAGE
        kind = next((kind for kind, pattern in _FILE.items() if "." in value and pattern.fullmatch(value)), None)
        if file or kind is not None:
            return None if _is_shown(value, shown) else kind or "an image"
        words = len(_WORD.findall(value))
        if _ENCODED.match(value):
            return "an image"
        if asks or words > MAX_LABEL_WORDS or (words > 2 and value.rstrip()[-1:] in ".?!:\u3002\uff1f\uff01\uff1a"):
            return _TEXT
    return "an image" if value and (file or (shows and not shown)) else None


@lru_cache(maxsize=4096)
def _named(path: str) -> tuple[bool, bool]:
    """Whether a field is called like an image, or like a part of the prompt."""
    name = f"_{_BETWEEN_WORDS.sub('_', path.rpartition('.')[2]).lower()}_"
    return bool(_SHOWS.search(name)), bool(_ASKS.search(name))


def _is_shown(file: str, shown: Sequence[Any]) -> bool:
    """Whether the name of a file is that of an image of the record, or an address that such an image may be from."""
    paths = [one.get("path") if isinstance(one, Mapping) else one for one in shown]
    names = [_stem(path) if isinstance(path, str) else None for path in paths]
    return bool(shown) and (_URL.match(file) is not None or None in names or _stem(file) in names)


def _stem(path: str) -> str:
    return os.path.splitext(path.replace("\\", "/").rpartition("/")[2])[0]


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)
