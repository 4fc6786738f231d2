"""TRL's preference formats: ``prompt``, ``chosen``, ``rejected`` as text or messages, images in ``images``.

Without ``prompt``, the answers begin with it, and what they have in common is the prompt: so are messages read, and text if the
format is given. (Any two answers may begin alike, so a line that lost its question would look the same.) So are messages that begin
with a ``prompt`` of text too (UltraFeedback's form). Rows that `load_preferences` made, and that were saved, are of this format as
well and keep all that they have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import OWN_DATA_SET, BadRecord, FoundPair, images, one_of, parse_json, refuse, rest

NAME = "trl"
NEEDS = (
    "prompt, chosen, rejected as text or messages; images, where there are some; or no prompt, and messages (text with format=trl) "
    "that begin with it"
)
_OWN = ("id", "prompt_id", "source", "ground_truth", "margin", "tiles", "augment")
_USED = (*_OWN, "prompt", "chosen", "rejected", "image", "images", "video", "videos", "frames", "system", "metadata")
_CANNOT = f"records have no place for it. {OWN_DATA_SET.rstrip('.')}"


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line looks like it."""
    return "prompt" in line or (isinstance(line.get("chosen"), list) and isinstance(line.get("rejected"), list))


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """The pair of a line."""
    refuse(line, {"tools": _CANNOT, "chat_template_kwargs": _CANNOT})
    prompt, chosen, rejected = (line.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is None and chosen and rejected and ("prompt" not in line or isinstance(chosen, list)):
        prompt, chosen, rejected = _common_start(chosen, rejected)
    elif isinstance(prompt, str) and _asks(chosen, prompt) and _asks(rejected, prompt):
        prompt, chosen, rejected = _common_start(chosen, rejected)
    metadata = line.get("metadata")
    own = parse_json(metadata, "'metadata'") if isinstance(metadata, str) and metadata else metadata
    frames = line.get("frames")
    used = _USED if isinstance(frames, Mapping) else [name for name in _USED if name != "frames"]  # others may mean images
    named: dict[str, Any] = {name: line.get(name) for name in _OWN}
    if named["ground_truth"] is None:  # other files call it ``answer``
        named["ground_truth"], used = line.get("answer"), [*used, "answer"]
    yield FoundPair(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        images=images(line),
        videos=one_of(line, "video", "videos"),
        frames=frames if isinstance(frames, Mapping) else None,
        system=line.get("system"),
        metadata={**(own if isinstance(own, dict) else {} if own in (None, "") else {"metadata": own}), **rest(line, used)},
        **named,
    )


def _asks(conversation: Any, prompt: str) -> bool:
    """Whether a conversation begins with the prompt as a user's turn, after a system message or not."""
    if not isinstance(conversation, list):
        return False
    turns = [turn for turn in conversation[:2] if isinstance(turn, Mapping) and turn.get("role") != "system"]
    return bool(turns) and turns[0].get("role") == "user" and _text(turns[0].get("content")) == prompt.strip()


def _text(content: Any) -> str | None:
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    return content.strip() if isinstance(content, str) else None


def _common_start(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Cut off what both answers begin with: the prompt."""
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise BadRecord("", "without 'prompt', 'chosen' and 'rejected' are both text or both lists of messages.")
    shorter = min(len(chosen), len(rejected))
    length = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    if isinstance(chosen, str) and 0 < length < shorter and chosen[length - 1] == " ":
        length -= 1  # as TRL does: the space belongs to the answer
    if isinstance(chosen, list) and length == shorter and shorter:
        length -= 1  # answers that are the same: said with the others, by the checks
    if not length:
        raise BadRecord("", "there is no prompt: 'chosen' and 'rejected' do not begin with the same one.")
    return chosen[:length], chosen[length:], rejected[length:]
