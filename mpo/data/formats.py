"""Read the formats of preference pairs, a class each. Values are not checked here but in `mpo.data.records`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from mpo.data.fields import CANNOT, COMMON, SYSTEM, TRL_CANNOT, Format, Found, Line, is_nothing, message_of, one_of, pair_of, refuse
from mpo.data.messages import text_of
from mpo.io import json_kind, parse_json

ASPECTS = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
"""What a completion of VLFeedback is rated in."""
MAX_PAIRS = 6
"""Maximum pairs per prompt of VLFeedback: all pairs of four completions; of more, the pairs with the largest margins."""
MAX_RESPONSES = 64
"""Maximum completions per prompt of VLFeedback."""


# MMPR and the data sets with its fields


class _MMPR(Format):
    """MMPR's annotation lines, v1.0 to v1.2."""

    NAME = "mmpr"
    NEEDS = "question, chosen, rejected; optional: image or video"
    USES = (*COMMON, "question", "answer_gt")
    ABOUT = ("chosen_meta", "rejected_meta")

    def matches(self, line: Line) -> bool:
        return _has_question(line)

    def read(self, line: Line) -> Iterator[Found]:
        refuse(line, ["clip"], "only whole videos can be read. Trim the video file and remove 'clip'")
        yield pair_of(line, prompt=line.get("question"), ground_truth=line.get("answer_gt"))


class _RLAIFV(Format):
    """RLAIF-V-Dataset: MMPR's fields, and some that name its source."""

    NAME = "rlaif_v"
    NEEDS = "question, chosen, rejected, image (bytes or path) or image_path; ds_name, origin_dataset or origin_split"
    USES: tuple[str, ...] = ("image", "question", "chosen", "rejected", *SYSTEM, "idx", "metadata")
    ABOUT = ("image_path", "origin_split")

    def matches(self, line: Line) -> bool:
        return any(name in line for name in ("ds_name", "origin_dataset", "origin_split")) and _has_question(line)

    def uses(self, line: Line) -> tuple[str, ...]:
        return self.USES if line.get("image") else (*self.USES, "image_path")

    def read(self, line: Line) -> Iterator[Found]:
        yield self._found(line, line, line.get("idx"))

    @staticmethod
    def _found(line: Line, pair: Line, id: Any, **inner: Any) -> Found:
        image = line.get("image") or line.get("image_path")
        sides = {"chosen": pair.get("chosen"), "rejected": pair.get("rejected")}
        return pair_of(line, prompt=pair.get("question"), **sides, images=image, videos=None, id=id, **inner)


class _RLHFV(_RLAIFV):
    """RLHF-V-Dataset: ``text`` is JSON with ``question``, ``chosen``, ``rejected``."""

    NAME = "rlhf_v"
    NEEDS = "text (JSON with question, chosen, rejected), image (bytes or path) or image_path"
    USES = ("image", "text", *SYSTEM, "idx", "origin_split_inner_idx", "metadata")
    ABOUT = ("image_path", "origin_split")

    def matches(self, line: Line) -> bool:
        if "text" not in line or not ("image" in line or "image_path" in line):
            return False
        if not any(name in line for name in ("question", "prompt", "chosen", "rejected")):
            return True  # no other field can be part of a pair
        try:
            pair = self._pair(line["text"])
        except ValueError:
            return False
        return all(name in pair for name in ("question", "chosen", "rejected"))

    def read(self, line: Line) -> Iterator[Found]:
        index = line.get("origin_split_inner_idx") if line.get("idx") is None else line["idx"]
        pair = self._pair(line.get("text"))
        inner = {f"text.{name}": value for name, value in pair.items() if name not in ("question", "chosen", "rejected")}
        yield self._found(line, pair, index, metadata=inner, inner=inner)

    @staticmethod
    def _pair(text: Any) -> Line:
        pair = parse_json(text, "'text', which holds the pair in rlhf_v's lines") if isinstance(text, str) else text
        if not isinstance(pair, Mapping):
            raise ValueError(f"'text' holds {json_kind(pair)} instead of rlhf_v's object with question, chosen, rejected.")
        return pair


# Ratings


class _VLFeedback(Format):
    """VLFeedback (Silkie, arXiv 2312.10665): completions of several models, each rated in three aspects.

    The rating of a completion is the mean over the aspects. Of two completions, the one with the higher rating is chosen, and the
    margin is the difference. Completions with equal ratings or equal texts make no pair. Lines without a pair, and pairs beyond
    `MAX_PAIRS`, are counted and reported.
    """

    NAME = "vlfeedback"
    NEEDS = "prompt, completions (each with response and annotations), img_path or image"
    USES = ("prompt", "completions", "img_path", "image", *SYSTEM, "id", "models", "metadata")

    def matches(self, line: Line) -> bool:
        return "completions" in line

    def read(self, line: Line) -> Iterator[Found]:
        """Those with the largest margin first."""
        completions = _completions(line.get("completions"))
        ratings = [_rating(completion, place) for place, completion in enumerate(completions)]
        texts = [completion.get("response") for completion in completions]
        ranked = [
            (abs(ratings[one] - ratings[other]), *((one, other) if ratings[one] > ratings[other] else (other, one)))
            for one, other in combinations(range(len(completions)), 2)
            if ratings[one] != ratings[other] and texts[one] != texts[other]
        ]
        ranked.sort(key=lambda pair: -pair[0])
        image = one_of(line, "img_path", "image")
        taken = ranked[:MAX_PAIRS]
        for place, (margin, better, worse) in enumerate(taken, start=1):
            own = {
                f"{side}_{name}": value
                for side, at in (("chosen", better), ("rejected", worse))
                for name, value in completions[at].items()
                if name not in ("response", "annotations") and value is not None
            }
            yield pair_of(
                line,
                prompt=line.get("prompt"),
                chosen=texts[better],
                rejected=texts[worse],
                images=image,
                videos=None,
                id=None if line.get("id") is None else f"{line['id']}/{better}-{worse}",
                margin=margin,
                metadata={**own, "chosen_rating": ratings[better], "rejected_rating": ratings[worse]},
                inner={name: value for name, value in own.items() if not name.endswith("_model")},
                dropped=len(ranked) - len(taken) if place == len(taken) else 0,
            )


def _completions(given: Any) -> list[Line]:
    if isinstance(given, Mapping):
        columns = {name: value for name, value in given.items() if isinstance(value, list)}
        if len(columns) < len(given) or len({len(value) for value in columns.values()}) != 1:
            raise ValueError("'completions' is an object whose fields are not lists of one length. Give a list of objects.")
        given = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(given, list) or not all(isinstance(one, Mapping) for one in given):
        raise ValueError(f"'completions' must be a list, each an object; got {json_kind(given)}.")
    if not 2 <= len(given) <= MAX_RESPONSES:
        raise ValueError(f"'completions' has {len(given)} entries; expected 2 to {MAX_RESPONSES}.")
    return given


def _rating(completion: Line, place: int) -> float:
    annotations, total = completion.get("annotations"), 0.0
    if not isinstance(annotations, Mapping):
        raise ValueError(f"entry {place + 1} of 'completions' has no object 'annotations'.")
    for aspect in ASPECTS:
        given = annotations.get(aspect)
        rating = given.get("Rating") if isinstance(given, Mapping) else given
        try:
            value = float(rating) if isinstance(rating, (str, int, float)) and not isinstance(rating, bool) else math.nan
        except (ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"entry {place + 1} of 'completions' has no number as its rating of {aspect!r}. Fix it or leave it out."
            )
        total += value
    return total / len(ASPECTS)


# Conversations


class _ShareGPT(Format):
    """LLaMA-Factory's ranking data: ``conversations`` of ``{from, value}``, or ``messages`` of ``{role, content}``."""

    NAME = "sharegpt"
    NEEDS = "conversations (or messages), chosen, rejected; optional: images or videos"
    USES = (*COMMON, "conversations", "messages")

    def matches(self, line: Line) -> bool:
        if "conversations" in line:
            return True
        has_prompt = line.get("prompt") not in (None, "", [])  # beside it, messages only repeat TRL's prompt and completion
        return "messages" in line and ("chosen" in line or "rejected" in line) and not has_prompt

    def read(self, line: Line) -> Iterator[Found]:
        refuse(line, ("tools", "audios"), CANNOT)
        turns = one_of(line, "conversations", "messages")
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"'conversations' must be a list of turns; got {'an empty one' if turns == [] else json_kind(turns)}.")
        prompt = [message_of(turn, f"turn {place + 1}") for place, turn in enumerate(turns)]
        if (role := prompt[-1]["role"]) not in ("user", "tool"):
            if not ({"chosen", "rejected"} & line.keys()):
                raise ValueError(
                    "this is a conversation: it has no 'chosen' and 'rejected'. Train on conversations with mpo sft, without "
                    "data.from_preferences."
                )
            raise ValueError(f"the last turn is the {role}'s, but 'chosen' and 'rejected' reply to a human. Remove that turn.")
        sides = {side: line.get(side) for side in ("chosen", "rejected")}
        sides = {side: [message_of(one, f"{side!r}")] if isinstance(one, Mapping) else one for side, one in sides.items()}
        yield pair_of(line, prompt=prompt, **sides)


class _Swift(Format):
    """ms-swift's RLHF data.

    A completion is all that follows the last turn of the user. ``rejected_response`` replaces all of it; ``rejected_messages`` are
    the whole conversation, which has the same prompt. ``rejected_images`` must equal ``images``: a pair has one set of images.
    """

    NAME = "swift"
    NEEDS = "messages (the last one of the assistant) and rejected_response or rejected_messages; optional: images or videos"
    _REJECTED = ("rejected_response", "rejected_messages")
    USES = (*COMMON, *_REJECTED, "messages", "rejected_images", "rejected_videos", "margin")

    def matches(self, line: Line) -> bool:
        return "messages" in line and any(name in line for name in (*self._REJECTED, "rejected_images"))

    def read(self, line: Line) -> Iterator[Found]:
        refuse(line, ("tools", "objects", "audios", "rejected_tools", "rejected_audios"), CANNOT)
        for kind in ("images", "videos"):
            if line.get(f"rejected_{kind}") not in (None, line.get(kind)):
                raise ValueError(
                    f"'rejected_{kind}' differ from {kind!r}, but a pair has one set of them. Remove 'rejected_{kind}'."
                )
        prompt, chosen = self._split(line.get("messages"), "messages")
        rejected = one_of(line, *self._REJECTED)
        if is_nothing(line.get("rejected_response")) and line.get("rejected_messages") is not None:
            other_prompt, rejected = self._split(rejected, "rejected_messages")
            if other_prompt != prompt:
                found = "'rejected_messages' differ from 'messages' up to the last turn of the user"
                raise ValueError(f"{found}, but a pair has one prompt. Leave the record out.")
        yield pair_of(line, prompt=prompt, chosen=chosen, rejected=rejected, margin=line.get("margin"))

    @staticmethod
    def _split(messages: Any, name: str) -> tuple[list[Any], list[Any]]:
        if not isinstance(messages, list) or len(messages) < 2:
            found = f"a list of {len(messages)}" if isinstance(messages, list) else json_kind(messages)
            raise ValueError(f"{name!r} must be a list of at least two messages, the last one the completion; got {found}.")
        last = messages[-1]
        if not isinstance(last, Mapping) or last.get("role") != "assistant":
            raise ValueError(f"the last of {name!r} must be a message of the assistant, the completion; got {last!r:.100}.")
        by_user = [place for place, one in enumerate(messages) if isinstance(one, Mapping) and one.get("role") == "user"]
        start = by_user[-1] + 1 if by_user else len(messages) - 1  # without a user it is refused later, as in all formats
        return messages[:start], messages[start:]


# TRL


class _TRL(Format):
    """TRL's preference formats, and saved rows of `load_preferences`, which keep all their columns.

    Without ``prompt``, the common prefix of the completions is the prompt. This holds for messages, and for text only if the format
    is given: any two texts may begin alike, so a line that lost its prompt would look the same. It also holds for messages that
    begin with a text ``prompt`` (as in UltraFeedback).
    """

    NAME = "trl"
    NEEDS = (
        "prompt, chosen, rejected as text or messages; or no prompt, and messages (text with format=trl) that begin with it; "
        "optional: images"
    )
    _OWN = ("prompt_id", "source", "ground_truth", "margin")
    USES = (*COMMON, *_OWN, "prompt")

    def uses(self, line: Line) -> tuple[str, ...]:
        return (*self.USES, *(["answer"] if line.get("ground_truth") is None else []))  # other files call it so

    def matches(self, line: Line) -> bool:
        return "prompt" in line or (isinstance(line.get("chosen"), list) and isinstance(line.get("rejected"), list))

    def read(self, line: Line) -> Iterator[Found]:
        refuse(line, ("tools", "chat_template_kwargs"), TRL_CANNOT)
        prompt, chosen, rejected = (line.get(name) for name in ("prompt", "chosen", "rejected"))
        is_prefix = prompt is None and chosen and rejected and ("prompt" not in line or isinstance(chosen, list))
        if is_prefix or (isinstance(prompt, str) and _begins_with(chosen, prompt) and _begins_with(rejected, prompt)):
            prompt, chosen, rejected = _split_common_prefix(chosen, rejected)
        own: dict[str, Any] = {name: line.get(name) for name in self._OWN}
        if own["ground_truth"] is None:
            own["ground_truth"] = line.get("answer")
        yield pair_of(line, prompt=prompt, chosen=chosen, rejected=rejected, **own)


def _begins_with(conversation: Any, prompt: str) -> bool:
    """Whether a conversation begins with the prompt as a user's turn, possibly after a system message."""
    if not isinstance(conversation, list):
        return False
    turns = [turn for turn in conversation[:2] if isinstance(turn, Mapping) and turn.get("role") != "system"]
    return bool(turns) and turns[0].get("role") == "user" and text_of(turns[0]).strip() == prompt.strip()


def _split_common_prefix(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise ValueError("without 'prompt', 'chosen' and 'rejected' must be both text or both lists of messages. Add 'prompt'.")
    shorter = min(len(chosen), len(rejected))
    length = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    if isinstance(chosen, str) and 0 < length < shorter and chosen[length - 1] == " ":
        length -= 1  # as TRL does: the space belongs to the completion
    if isinstance(chosen, list) and length == shorter and shorter:
        length -= 1  # equal completions: reported later, by the checks of all formats
    if not length:
        raise ValueError("there is no prompt: 'chosen' and 'rejected' do not begin with the same one. Add 'prompt'.")
    return chosen[:length], chosen[length:], rejected[length:]


# All formats

FORMATS = {one.NAME: one for one in (_Swift(), _ShareGPT(), _VLFeedback(), _RLAIFV(), _RLHFV(), _MMPR(), _TRL())}
"""In the order of detection: the more specific formats come first."""


def detect(line: Line, formats: Mapping[str, Format] = FORMATS, noun: str = "pair") -> Format:
    """Find the format of a line, of several, by the fields that the line has; ``noun`` says what the line should hold.

    Raises ValueError for a line in no known format (the message lists the formats), and for a line with two prompts.
    """
    given = {name: value for name, value in line.items() if not is_nothing(value)}
    is_pair = "completions" in given or "text" in given or ("chosen" in given and "rejected" in given) or noun != "pair"
    for fields in (given, line) if is_pair else (line,):  # in a pair, a field that holds nothing does not tell the format
        for one in formats.values():
            if one.matches(fields):
                return one
    known = "; ".join(f"{name}: {needs}" for name, needs in {one.NAME: one.NEEDS for one in formats.values()}.items())
    has = ", ".join(map(repr, list(line)[:20])) or "nothing"
    raise ValueError(f"no {noun} in any known format: the line has {has}. Use one of these, with the fields they need: {known}.")


def check_format(name: str | None, formats: Mapping[str, Format] = FORMATS) -> None:
    """Check the name of a format. Raises ValueError for an unknown name; the message lists the formats."""
    if name is not None and name not in formats:
        raise ValueError(f"format is one of {', '.join(formats)}, or null to detect it; got {name!r}.")


def _has_question(line: Line) -> bool:
    other = next((name for name in ("prompt", "messages", "conversations") if line.get(name) not in (None, "", [])), None)
    if other is not None and line.get("question") not in (None, ""):
        raise ValueError(
            f"the line has both 'question' and {other!r}, either of which may be the prompt. Keep one, or set format=."
        )
    return "question" in line
