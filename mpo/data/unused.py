"""Judge the fields of a record that are not used: are they metadata, or something that the model should see?

A field is refused if it may be an image, a video, a sound or a document (a file's bytes; the name of a file, unless it is one of
the record's; a field called so in a record without one), a message, or text of the prompt (a sentence, more than six words, or any
text in a field called so, `_ASKS`). Everything else is metadata: numbers, flags, labels, identifiers, addresses, texts that repeat
the record, and texts in fields whose name says that they are about it (`_ABOUT`).
"""

from __future__ import annotations

import os.path
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from mpo.data.fields import Format, Found, is_nothing, listed, settings_of
from mpo.data.messages import MESSAGES_AS_TEXT
from mpo.io import DUPLICATE_KEY, BadRecord, parse_json

Find = Callable[[str, str], str]
"""Maps a path in a file and its kind (image, video) to the real path; a ValueError if there is no such file inside the root."""
TRUTHS = ("answer", "answer_gt", "ground_truth")
"""Names of the known answer, which is no part of a prompt in any format."""
KIND = "unused field"
MAX_LABEL_WORDS = 6
"""Maximum words of a label; two Chinese, Japanese or Korean characters count as a word."""
MAX_ID_BYTES = 64
"""Maximum bytes of an identifier or a digest that is not text."""
MESSAGE = ("role", "content", "tool_calls")
"""The fields of a message."""
FLAGS = ("train", "loss", "weight")
"""Names of the flag by which a turn of the assistant is labelled, or not: ours, ms-swift's and OpenAI's."""
KTO = ("label", "kto_tag", "desirable")
"""Names by which a completion without a pair is good or bad: TRL's and ms-swift's, LLaMA-Factory's and others."""
_FLAG = re.compile(r"_(?:train(?:ing|able|ed)?|loss|mask(?:ed)?|weights?|ignored?|learn(?:able|ed)?)_")
_MESSAGE, _TEXT = "a message", "text of the prompt"
_FILES = {
    "an image": r"jpe?g|jfif|png|webp|avif|gif|bmp|tiff?|p[pgbn]m|hei[cf]|svg|jp2|j2k|jxl|ico|tga|psd|exr|hdr|dcm|np[yz]|nii",
    "a video": r"mp4|webm|mkv|mov|avi|mpe?g|flv|m4v|3gp|ogv|wmv",
    "a sound": r"wav|mp3|flac|ogg|m4a|aac|opus|wma",
    "a document": r"pdf|docx?|pptx?",
}
_FILE = {kind: re.compile(rf"[^\n]*\.(?:{endings})(?:[?#]\S*)?", re.IGNORECASE) for kind, endings in _FILES.items()}
_ENCODED = re.compile(
    r"data:(?:image|video|audio)/|(?:[/_]9j[/_]|iVBORw0KGgo|R0lGOD|UklGR|Qk[0-3]|SUkqA|TU0AK|JVBERi)[\w+/=\s-]{100,}"
)
_MAGIC = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|BM.{4}\0{4}|II\*\0|MM\0\*|....ftyp|\x1aE\xdf\xa3|OggS|fLaC|ID3|%PDF", re.DOTALL
)
_LINKED = re.compile(r"<(?:img|video|audio)\b[^>]*>|!\[[^\]]*\]\(", re.IGNORECASE)
_NO_IMAGE = ("none", "no", "null", "n/a", "false", "text")
_URL = re.compile(r"\w+://")
_SHOWS = re.compile(r"_(?:imgs?|images?|pictures?|photos?|pixels?|screenshots?|videos?)_")
_ASKS = re.compile(
    r"_(?:system|sys(?:_msg)?|preamble|instructions?|inputs?|context|history|quer(?:y|ies)|prompts?|questions?|passages?|messages?|conversations?"
    r"|hints?|suffix|prefix)_$"
)
"""Names of parts of a prompt: any text in such a field is one."""
_PARTS = re.compile(
    r"_(?:options|choices|turns|(?:option|choice|turn)_?[a-h0-9]|dialog(?:ue)?s?|few_?shots?|shots|demonstrations|examples)_$|^_[a-h]_$"
)
"""Names of lists and objects of such parts, whatever the names inside of them."""
_ABOUT = re.compile(
    r"_(?:justifications?|rationales?|explanations?|critiques?|feedbacks?|judge?ments?|verdicts?|reasons?|comments?|licen[cs]es?|authors?"
    r"|citations?|titles?|keywords?|dataset_names?|versions?|timestamps?|answers?|solutions?|responses?|steps_with_scores?)"
    r"(?:_(?:of_)?(?:chosen|rejected))?_$"
)
"""Names of what is said about a pair, and of known answers: texts in them are metadata."""
_FILE_NAME = re.compile(r"_(?:file_?name|original_(?:file|path))s?_$")
_OF_IMAGE = re.compile(r"_(?:(?:imgs?|images?|pictures?|photos?)_(?:path|file|name|id|url|src)|path|file)s?_$")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,2}|[^\s\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_BETWEEN_WORDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+")


def metadata_of(
    reader: Format,
    line: Mapping[str, Any],
    pairs: Sequence[Found],
    called: Mapping[str, Any] | None = None,
    names: Sequence[str] = (),
    find: Find | None = None,
    labels: bool = False,
) -> tuple[dict[str, Any], list[str]]:
    """Return what a line says that its format does not use, as metadata, and the names of these fields.

    The user calls the fields `called` metadata, and `line` is without them; fields `names` are not refused. With `labels`, turns of
    the assistant are labelled, each for itself.

    Raises ValueError for a field that the model should see, and for one that the line's own metadata have with another value.
    """
    used = (*reader.uses(line), *settings_of(line))
    unused = {name: value for name, value in line.items() if name not in used and value is not None}
    judged = {name: value for name, value in unused.items() if not is_nothing(value)}
    for pair in pairs:
        judged |= pair.inner
    inside: dict[str, Any] = {}
    for pair in pairs[:1]:
        alike = next((name for name in judged if plain_name(name) in used and name not in (*used, *names)), None)
        if alike is not None:
            meant = f"the field {alike!r} is not used. Did you mean {plain_name(alike)!r}?"
            raise BadRecord("", f"{meant} Rename it, remove it, or say metadata=[{alike!r}].", KIND)
        said = {name: getattr(pair, name) for name in ("prompt", "messages", "chosen", "rejected", "system")}
        files = [*listed(pair.images, "image"), *listed(pair.videos, "video")]
        known = MESSAGE if pair.messages is None else (*MESSAGE, "train")
        passed, labelled = (*names, *reader.ABOUT, *TRUTHS), ("messages", "chosen") if labels else ()
        inside = check_unused(judged, said, files, find=find, known=known, passed=passed, labelled=labelled)
    for name in reader.ABOUT:
        parsed(unused.get(name), name)
    own = line.get("metadata")
    if isinstance(own, str) and own.lstrip()[:1] in ("{", "["):
        own = parse_json(own, "'metadata'")
    own = dict(own) if isinstance(own, Mapping) else {} if own in (None, "") else {"metadata": own}
    more = [name for name in judged if name not in unused]
    return merged(own, {**unused, **(called or {}), **inside}), [*unused, *(called or ()), *more, *inside]


def merged(metadata: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata and more of it. Raises ValueError for a name with two values."""
    for name in metadata.keys() & more.keys():
        if metadata[name] != more[name]:
            raise ValueError(f"{name!r} has two values, {metadata[name]!r:.50} and {more[name]!r:.50}, in the metadata. Rename it.")
    return {**metadata, **more}


def check_unused(
    unused: Mapping[str, Any],
    used: Mapping[str, Any],
    shown: Sequence[Any],
    *,
    find: Find | None = None,
    known: Collection[str] = MESSAGE,
    passed: Collection[str] = (),
    advice: str = "say metadata=[{!r}]",
    labelled: Collection[str] = (),
) -> dict[str, list[Any]]:
    """Refuse fields that may be something the model should see, beside what is used and inside of its messages.

    `unused` and `used` (texts and conversations) are by name; what only repeats texts of `used` is metadata. `shown` are the images
    and videos of the record: paths, bytes, or dicts with ``bytes`` or ``path``. `known` are the fields of a message that are used,
    `passed` those that are not judged, `labelled` the conversations whose turns are labelled: flags of other names, which may say
    which, are refused. `advice` says what to do for a field that is metadata, with a place for its name.

    Returns the fields inside of messages and their parts that are not used, each with its values. Raises BadRecord, of kind `KIND`,
    with the first field that is refused, its value, and what to do.
    """
    inner: dict[str, list[Any]] = {}
    for side, conversation in used.items():
        for name, value in _inside(conversation, known):
            inner.setdefault(f"{side}.{name}", []).append(value)
            if side in labelled and f"{side}.{name}" not in passed and _says_labelled(name, value):
                what = f"the field {name!r} ({value!r:.60}) of a turn of {side!r} may say whether it is labelled, and is not read"
                fix = 'Say "train": false in turns that are not labelled' + " of 'messages'" * (side == "chosen")
                raise BadRecord("", f"{what}. {fix}, or {advice.format(f'{side}.{name}')}.", KIND, f"{side}.{name}")
    if labelled and not used.get("rejected"):
        for name in [name for name in KTO if unused.get(name) is False and name not in passed]:
            what = f"{name!r} is false: a completion to avoid (KTO's data), and training would imitate it"
            raise BadRecord("", f"{what}. Leave the record out, or {advice.format(name)}.", KIND, name)
    repeated: set[str] | None = None
    for name, value in (*unused.items(), *inner.items()):
        for path, leaf in _leaves(value, name) if name not in passed else ():
            kind = _kind(leaf, path, shown, find)
            if kind in (_MESSAGE, _TEXT):
                repeated = {text.strip() for text in texts_in(list(used.values()))} if repeated is None else repeated
                if all(text.strip() in repeated for text in texts_in(leaf)):
                    continue
            if kind is not None:
                what = f"the field {path!r} is not used, but may be {kind} ({leaf!r:.60})"
                raise BadRecord("", f"{what}. Rename it to one that is used, or {advice.format(name)}.", KIND, path)
    return inner


def _says_labelled(name: str, value: Any) -> bool:
    """Whether a field of a turn may say that it is not labelled, under a name that is not read here."""
    says = isinstance(value, (bool, int, float, list)) and _FLAG.search(_named(name)[0]) is not None
    return says and not (name in FLAGS and value == 1)


def plain_name(name: str) -> str:
    """Return a name as it looks: without characters of no width and blanks around it, in one case and width."""
    if not name.isascii():
        name = "".join(one for one in unicodedata.normalize("NFKC", name) if unicodedata.category(one) != "Cf")
    return name.strip().lower()


def _inside(conversation: Any, known: Collection[str]) -> Iterator[tuple[str, Any]]:
    for message in conversation if isinstance(conversation, list) else ():
        if isinstance(message, Mapping):
            content = message.get("content")
            yield from ((name, value) for name, value in message.items() if value is not None and name not in known)
            for part in content if isinstance(content, list) else ():
                if isinstance(part, Mapping):
                    own = ("type", "text") if part.get("type") == "text" else ("type",)
                    yield from ((name, value) for name, value in part.items() if value is not None and name not in own)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    value = parsed(value, path)
    if isinstance(value, Mapping) and not _is_file(value) and not _is_message(value):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}")
    elif isinstance(value, (list, tuple)) and not _is_history(value):
        if len(value) > 9 and all(type(one) is int and 0 <= one < 256 for one in value):
            yield path, bytes(value) if _MAGIC.match(bytes(value[:16])) else value[0]
            return
        for inner in value:
            yield from _leaves(inner, path)
    elif not (value is None or (isinstance(value, (str, bytes)) and not value)):
        yield path, value


def parsed(value: Any, name: str) -> Any:
    """Return the value of a text that is JSON, and any other value unchanged. Raises BadRecord for JSON with a key twice."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "[") and not MESSAGES_AS_TEXT.match(value):
        try:
            return parse_json(value, name)
        except BadRecord as bad:  # another text that begins like JSON
            if bad.kind == DUPLICATE_KEY:
                raise
    return value


def _is_file(value: Mapping[str, Any]) -> bool:
    return "bytes" in value and value.keys() <= {"bytes", "path"}


def _is_message(value: Mapping[str, Any]) -> bool:
    return any(isinstance(value.get(who), str) and what in value for who, what in (("role", "content"), ("from", "value")))


def _is_history(value: Sequence[Any]) -> bool:
    """Whether it is a list of questions with their answers, as ms-swift and LLaMA-Factory have them: lists of two texts."""
    return all(isinstance(one, (list, tuple)) and len(one) == 2 and all(isinstance(text, str) for text in one) for one in value)


def _kind(value: Any, path: str, shown: Sequence[Any], find: Find | None) -> str | None:
    name, shows, asks, about = _named(path)
    if isinstance(value, Mapping) and _is_file(value):
        value, file = value.get("bytes") or value.get("path"), True
    else:
        file = isinstance(value, (bytes, bytearray)) and (len(value) > MAX_ID_BYTES or _MAGIC.match(value) is not None)
    if isinstance(value, (Mapping, list, tuple)):
        return _MESSAGE
    if isinstance(value, str):
        text = value.strip()
        if MESSAGES_AS_TEXT.match(text):
            return _MESSAGE
        kind = next((kind for kind, pattern in _FILE.items() if "." in text and pattern.fullmatch(text)), None)
        if file or kind is not None:
            return None if _is_shown(text, name, kind or "an image", shown, find) else kind or "an image"
        words = len(_WORD.findall(text))
        if _ENCODED.match(text):
            return "an image"
        if asks or _LINKED.search(text):
            return _TEXT
        if not about and (words > MAX_LABEL_WORDS or (words > 2 and text[-1:] in ".?!:\u3002\uff1f\uff01\uff1a")):
            return _TEXT
        value = text.lower() not in _NO_IMAGE
    elif not isinstance(value, (int, float, bytes, bytearray)):  # a decoded image, or an array
        file = len(getattr(value, "shape", ())) > 2 or hasattr(value, "getbands")
    return "an image" if file or (shows and not shown and not isinstance(value, bool) and value) else None


@lru_cache(maxsize=4096)
def _named(path: str) -> tuple[str, bool, bool, bool]:
    """Return the plain name of a field, and whether it is called like an image, a part of the prompt, or what is about the pair."""
    words = [f"_{_BETWEEN_WORDS.sub('_', one if one.isascii() else plain_name(one)).lower()}_" for one in path.split(".")]
    asks = _ASKS.search(words[-1]) or any(_PARTS.search(one) for one in words)
    return words[-1], bool(_SHOWS.search(words[-1])), bool(asks), any(_ABOUT.search(one) for one in words)


def _is_shown(file: str, name: str, kind: str, shown: Sequence[Any], find: Find | None) -> bool:
    """Whether the name of a file is that of one of the record, or an address or another name that it may have had."""
    files = [one.get("path") if isinstance(one, Mapping) else getattr(one, "path", one) for one in shown]
    paths = [one for one in files if isinstance(one, str)]
    if not shown or kind not in {_kind_of(one) for one in paths} | ({"an image"} if len(paths) < len(files) else set()):
        return False
    if _URL.match(file) or _FILE_NAME.search(name):
        return True
    real = _real(file, find)
    if real is not None and paths:
        return any(_real(one, find) == real for one in paths)
    same = file.replace("\\", "/").rpartition("/")[2]
    named = any(one.replace("\\", "/").rpartition("/")[2] == same for one in paths)
    return named or (len(paths) < len(files) and _OF_IMAGE.search(name) is not None)  # bytes have no name


def _kind_of(file: str) -> str:
    return next((kind for kind, pattern in _FILE.items() if pattern.fullmatch(file)), "an image")


def _real(file: str, find: Find | None) -> str | None:
    try:
        return find(file, "image") if find else os.path.realpath(file, strict=True)
    except (ValueError, OSError):
        return None


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts of a text or a conversation, without the other fields of its messages and parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping) and value.get("type", "text") == "text":
        yield from texts_in(next((value[name] for name in ("text", "content", "value") if value.get(name) is not None), None))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from texts_in(inner)
