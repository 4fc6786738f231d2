"""Examine one shard of a source: findings in its records, and keys to find duplicate records."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo.curation.dedupe import in_sides, structure, texts
from mpo.data.eval_part import asked_text, content_text, first_question, image_bytes, key_of, video_key
from mpo.data.images import open_image
from mpo.data.messages import EMPTY, PLACEHOLDERS
from mpo.data.records import EQUAL, NOT_THERE, Reading, Row
from mpo.data.shards import FILE_DAMAGED, Shard
from mpo.data.unused import KIND as UNUSED
from mpo.data.video import DEFAULT_FRAMES, checked_frames, frames_of, open_frames
from mpo.io import DUPLICATE_KEY, BadRecord

PROBLEMS = (
    *("no pair", "no conversation", EMPTY, EQUAL, PLACEHOLDERS, DUPLICATE_KEY, UNUSED, NOT_THERE, "image not decoded"),
    *("video not decoded", FILE_DAMAGED, "not encoded", "too long", "in eval too"),
)
"""Findings that prevent training."""
NOTES = (
    *("truncated by max_length", "image in eval too", "tiny image", "duplicate", "equal but for space", "refusal", "unfinished"),
    *("control token", "gives no pair", "pairs left out"),
)
"""Findings to inspect, which do not prevent training."""
TINY = 10
"""Pixels of an image's shorter side below which it is reported as tiny."""
ROOM = 256
"""Maximum number of tokens that a chat template adds to the shortest conversation."""
_SIDES = ("prompt", "chosen", "rejected", "completion")
MAX_CACHED = 100_000
"""Maximum number of images, and of videos, whose results a process remembers."""
Image = tuple[int, str | None, tuple[int, int]]
"""The key of an image, why it cannot be decoded, and its size in pixels."""


@dataclass(frozen=True)
class Finding:
    """A finding in the record at ``where`` (``file:line``)."""

    kind: str
    where: str
    reason: str


@dataclass(frozen=True)
class Part:
    """A shard of a source, how its lines are read, and the source's frames and tiles (`mpo.data.load_preferences`)."""

    shard: Shard
    reading: Reading
    frames: Mapping[str, int] | None = None
    tiles: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Examined:
    """The results for one shard: N pairs, with M images and videos."""

    lines: int
    findings: list[Finding]  # in the order of the records
    where: list[str]  # the place of each pair
    pair: NDArray[np.int64]  # key of each pair's question, images, videos and completions, shape (N,)
    prompt: NDArray[np.int64]  # key of each pair's question (`mpo.data.eval_part.asked_text`), images and videos, shape (N,)
    images: NDArray[np.int64]  # keys of the images and videos of all pairs, shape (M,)
    owner: NDArray[np.int64]  # index of the pair that each of these belongs to, shape (M,)
    unused: Counter[str]  # how many lines have each field that their format does not use
    refused: Counter[str]  # and how many are refused for each, by its name


class Examiner:
    """Examines the shards of a source; each process has one, which remembers the results for images and videos.

    Args:
        processor: of the model to train, for lengths.
        max_length, context: limits in tokens.
        conversations: whether the source holds conversations.
        only_keys: compute only the keys, of a source to compare with.
    """

    def __init__(
        self,
        processor: Any = None,
        max_length: int | None = None,
        context: int | None = None,
        *,
        conversations: bool = False,
        only_keys: bool = False,
    ) -> None:
        self._processor, self._max_length, self._context = processor, max_length, context
        self._conversations, self._only_keys = conversations, only_keys
        self._image_at = lru_cache(MAX_CACHED)(lambda path: self._image({"path": path}))
        self._video_at = lru_cache(MAX_CACHED)(self._video)
        self._shapes: set[Any] = set()
        self._measure: Any = None
        self._controls: re.Pattern[str] | None = None
        if processor is not None and not only_keys:
            from mpo.encoding.costs import RecordMeasure
            from mpo.encoding.turns import CONVERSATION, SIDES
            from mpo.models.control_tokens import control_tokens

            self._measure = RecordMeasure(processor, sides=CONVERSATION if conversations else SIDES, sampled=0)
            tokens = control_tokens(processor)
            self._controls = re.compile("|".join(map(re.escape, tokens))) if tokens else None

    def __call__(self, part: Part) -> Examined:
        """Examine one shard of a source."""
        shard, lines, unused, refused = part.shard, 0, Counter[str](), Counter[str]()
        findings: list[Finding] = []
        where: list[str] = []
        keys: list[tuple[int, int]] = []
        images: list[int] = []
        owner: list[int] = []
        try:
            for rows in part.reading.rows(shard.lines()):
                lines += 1
                if isinstance(rows, BadRecord):
                    nothing = "no conversation" if self._conversations else "no pair"
                    findings.append(Finding(rows.kind or nothing, rows.where, rows.reason))
                    refused.update([rows.field] if rows.field else [])
                    continue
                unused.update(rows.unused)
                if rows.dropped and not self._only_keys:
                    left_out = f"{rows.dropped} pairs beyond the {len(rows)} with the largest margins"
                    findings.append(Finding("pairs left out", rows.where, left_out))
                if not rows and not self._only_keys:
                    findings.append(Finding("gives no pair", rows.where, "no two of its completions differ in rating and text"))
                for row in rows:
                    row["frames"] = row["frames"] or checked_frames(part.frames)
                    row["tiles"] = row["tiles"] or part.tiles
                    limits = tuple((row["frames"] or DEFAULT_FRAMES).values())
                    shown = [self._image_at(one["path"]) if one.get("bytes") is None else self._image(one) for one in row["images"]]
                    films = [self._video_at(path, *limits) for path in row["videos"] or ()]
                    own = [*(key for key, *_ in shown), *(key for key, _ in films)]
                    images += own
                    owner += [len(where)] * len(own)
                    where.append(rows.where)
                    keys.append(_keys(row, own))
                    if not self._only_keys:
                        findings += self._check_record(row, rows.where, shown, [wrong for _, wrong in films if wrong is not None])
        except BadRecord as bad:  # the rest of the shard cannot be read
            findings.append(Finding(bad.kind or FILE_DAMAGED, bad.where, bad.reason))
        except ValueError as error:
            findings.append(Finding(FILE_DAMAGED, shard.path, str(error)))
        pair, prompt = np.array(keys, dtype=np.int64).reshape(-1, 2).T
        arrays = pair, prompt, np.array(images, dtype=np.int64), np.array(owner, dtype=np.int64)
        return Examined(lines, findings, where, *arrays, unused, refused)

    def _check_record(self, row: Row, where: str, shown: list[Image], wrong_videos: list[str]) -> list[Finding]:
        found = [("video not decoded", wrong) for wrong in wrong_videos]
        for number, (_, wrong, size) in enumerate(shown, start=1):
            if wrong is not None:
                found.append(("image not decoded", wrong))
            elif min(size) < TINY:
                found.append(("tiny image", f"image {number} has {size[0]} x {size[1]} pixels"))
        whole, row = row, in_sides(row)
        sides = [side for side in _SIDES if side in row]
        completions = [" ".join(" ".join(content_text(one["content"]) for one in row[side]).split()) for side in sides[1:]]
        if len(set(completions)) < len(completions):
            found.append(("equal but for space", "'chosen' and 'rejected' differ only in white space"))
        for side in sides[1:]:
            completion = content_text(row[side][-1]["content"])
            if words := refusal(completion):
                found.append(("refusal", f"'{side}' refuses: {words!r}"))
            if reason := unfinished(completion):
                found.append(("unfinished", f"'{side}' looks unfinished: {reason}"))
        controls = []
        if self._controls is not None:
            from mpo.models.control_tokens import texts_of

            controls = [(side, token) for side in sides for token in self._controls.findall(texts_of(row[side]))]
        image_token = getattr(self._processor, "image_token", None)  # reported as a problem when the record is measured
        for side, token in [(side, token) for side, token in controls if token != image_token][:1]:
            reason = f"the text of '{side}' holds {token!r}, which is encoded as the control token of that name"
            found.append(("control token", reason))
        if self._measure is not None and not wrong_videos and all(wrong is None for _, wrong, _ in shown):
            found += self._lengths(whole, row, sides, measured=bool(controls))
        return [Finding(kind, where, reason) for kind, reason in found]

    def _lengths(self, whole: Row, row: Row, sides: list[str], *, measured: bool) -> list[tuple[str, str]]:
        shape = tuple((side, message["role"], len(message["content"])) for side in sides for message in row[side])
        if not measured and shape in self._shapes and self._is_surely_short(row, sides):
            return []
        try:
            cost = self._measure({name: value for name, value in whole.items() if value is not None})
        except ValueError as error:
            return [("not encoded", str(error))]
        self._shapes.add(shape)
        prompt, longest = cost["prompt"], cost["prompt"] + max(cost["chosen"], cost["rejected"])
        tiles = f", {cost['tiles']} tiles" if cost["tiles"] else ""
        most, context = self._max_length, self._context
        kept = longest if most is None else min(longest, most)
        both = "it takes" if self._conversations else "the prompt and the longer completion take"
        if most is not None and longest > most and self._conversations:  # which are never truncated
            return [("too long", f"it takes {longest:,} tokens{tiles}; max_length is {most:,}")]
        if most is not None and prompt + 1 > most:
            return [("too long", f"the prompt alone takes {prompt:,} tokens{tiles}; max_length is {most:,}")]
        if context is not None and kept > context:
            return [("too long", f"{both} {kept:,} tokens{tiles}; the model's context is {context:,} tokens")]
        if most is not None and longest > most:
            return [("truncated by max_length", f"{both} {longest:,} tokens{tiles}")]
        return []

    def _is_surely_short(self, row: Row, sides: list[str]) -> bool:
        """Whether a text record is within the limits, without tokenising it.

        A token has at least one byte; twice the number of bytes leaves room for the template's tokens. That the template accepts
        such turns is known from another record of the same shape.
        """
        if row["images"] or row["videos"] or row.get("tools"):
            return False
        size = {side: sum(len(content_text(message["content"]).encode()) for message in row[side]) for side in sides}
        room = ROOM + 16 * sum(len(row[side]) for side in sides)
        limits = [limit for limit in (self._max_length, self._context) if limit is not None]
        return all(2 * (size["prompt"] + max(size[side] for side in sides[1:])) + room <= limit for limit in limits)

    def _image(self, image: Row) -> Image:
        path = image.get("path") or ""
        try:
            data = image_bytes(image)
            size = (TINY, TINY) if self._only_keys else open_image(data, where=path).size
        except OSError as error:
            return 0, f"{path}: cannot be read ({error})", (0, 0)
        except ValueError as error:
            return key_of(data), str(error), (0, 0)
        return key_of(data), None, size

    def _video(self, path: str, least: int, most: int) -> tuple[int, str | None]:
        key = 0
        try:
            key = video_key(path)
            if not self._only_keys:
                open_frames(path, frames_of(path, min_frames=least, max_frames=most))
        except OSError as error:
            return key, f"{path}: cannot be read ({error})"
        except ValueError as error:
            return key, str(error)
        return key, None


def _keys(row: Row, images: list[int]) -> tuple[int, int]:
    """Compute the keys of a pair and of its question; ``images`` has the keys of its images and videos."""
    question, *completions = texts(row)
    pair = "\0".join([question, *map(str, images)])
    asked = "\0".join([asked_text(first_question(row)), *map(str, images)])
    return key_of("\0\0".join([pair, *completions, structure(row)])), key_of(asked)


# Completions to inspect. The rules look at the form of the text and are sometimes wrong


REFUSALS = (
    r"i(?:'m| am) (?:really |very |so )?sorry,? (?:but )?(?:i|as an)\b",
    r"(?:sorry|apologies|unfortunately),? (?:but )?i (?:can(?:'t|not)|am (?:not able|unable)|do(?:n't| not) have)",
    r"i (?:can(?:'t|not)|am (?:not able|unable) to|won't) (?:assist|help|answer|provide|comply|fulfil|see|view|process|identify)",
    r"as an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"i do(?:n't| not) have (?:access to|the ability to)",
    r"我(?:无法|不能)(?:回答|提供|协助|帮助|查看|看到)",
    r"(?:抱歉|对不起)[,,]?\s*我(?:无法|不能)",
    r"作为(?:一个|一名)?(?:人工智能|ai|语言模型)",
)
_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)
REFUSAL_WITHIN = 160
"""Number of first characters in which a refusal must begin; later, such words are usually part of a completion."""

ENDS = ".!?。！？…．:;\"'”’」』)]}）】>*`|$~_%°"
"""Characters that a finished completion may end with."""
OPEN_WORDS = frozenset(
    "a an the and or but so of to in on at by for with from as is are was were be that which this these than then "
    "because if when while where it its their his her our your we can will would should".split()
)
"""Words that no sentence ends with."""
LONG_LINE = 8
"""Number of words above which a last line is a sentence and not a list item or a name."""
_ANSWER_LINE = re.compile(r"answer\b.{0,20}[:：]|答案", re.IGNORECASE)


def refusal(completion: str) -> str | None:
    """Return the words with which a completion refuses, or None.

    >>> refusal("I'm sorry, but I can't see the image.")
    "I'm sorry, but I"
    >>> refusal("The sign says sorry.")
    """
    found = _REFUSAL.search(completion[:REFUSAL_WITHIN].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    return None if found is None else found.group()


def unfinished(completion: str) -> str | None:
    r"""Return the reason why a completion looks unfinished, or None.

    >>> unfinished("So the area is \\boxed{12")
    'a \\boxed{ that is not closed'
    >>> unfinished("First we look at the height of the bar and the")
    "ends with 'the'"
    >>> unfinished("Two and three make five.\nFinal answer: 5")
    """
    text = completion.rstrip()
    if _open_box(text):
        return r"a \boxed{ that is not closed"
    if text.count("```") % 2:
        return "a ``` that is not closed"
    if text.count("<think>") > text.count("</think>"):
        return "a <think> that is not closed"
    if not text or text[-1] in ENDS:
        return None
    last = text.rsplit("\n", 1)[-1]
    words = last.split()
    if text[-1] in ",，、" or (len(text.split()) > 1 and words[-1].lower() in OPEN_WORDS):
        return f"ends with {words[-1]!r}"
    if len(words) > LONG_LINE and not _ANSWER_LINE.search(last):
        return f"its last sentence has no end: ...{last[-40:]!r}"
    return None


def _open_box(text: str) -> bool:
    _, box, inside = text.rpartition(r"\boxed{")
    return bool(box) and -1 not in accumulate((character == "{") - (character == "}") for character in inside)
