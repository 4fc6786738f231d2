"""Read TRL's preference formats: ``prompt``, ``chosen``, ``rejected`` as text or messages, images in ``images``.

Without ``prompt``, the common prefix of the completions is the prompt. This holds for messages, and for text only if the format is
given: any two texts may begin alike, so a line that lost its prompt would look the same. It also holds for messages that begin with
a text ``prompt`` (as in UltraFeedback). Saved rows of `load_preferences` are in this format too and keep all their columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mpo.data.pairs import OWN_DATA_SET, FoundPair, images, one_of, refuse, rest
from mpo.io import BadRecord, parse_json

NAME = "trl"
NEEDS = (
    "prompt, chosen, rejected as text or messages; or no prompt, and messages (text with format=trl) that begin with it; optional: "
    "images"
)
_OWN = ("id", "prompt_id", "source", "ground_truth", "margin", "tiles", "augment")
_USED = (*_OWN, "prompt", "chosen", "rejected", "image", "images", "video", "videos", "frames", "system", "metadata")
_CANNOT = f"records have no field for it. {OWN_DATA_SET.rstrip('.')}"


def matches(line: Mapping[str, Any]) -> bool:
    """Whether a line is in this format."""
    return "prompt" in line or (isinstance(line.get("chosen"), list) and isinstance(line.get("rejected"), list))


def read(line: Mapping[str, Any]) -> Iterator[FoundPair]:
    """Read the pair of a line."""
    refuse(line, {"tools": _CANNOT, "chat_template_kwargs": _CANNOT})
    prompt, chosen, rejected = (line.get(name) for name in ("prompt", "chosen", "rejected"))
    if prompt is None and chosen and rejected and ("prompt" not in line or isinstance(chosen, list)):
        prompt, chosen, rejected = _split_common_prefix(chosen, rejected)
    elif isinstance(prompt, str) and _begins_with(chosen, prompt) and _begins_with(rejected, prompt):
        prompt, chosen, rejected = _split_common_prefix(chosen, rejected)
    metadata = line.get("metadata")
    own = parse_json(metadata, "'metadata'") if isinstance(metadata, str) and metadata else metadata
    frames = line.get("frames")
    used = (
        _USED if isinstance(frames, Mapping) else [name for name in _USED if name != "frames"]
    )  # in other files, frames may mean images
    named: dict[str, Any] = {name: line.get(name) for name in _OWN}
    if named["ground_truth"] is None:  # other files call it 'answer'
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


def _begins_with(conversation: Any, prompt: str) -> bool:
    """Whether a conversation begins with the prompt as a user's turn, possibly after a system message."""
    if not isinstance(conversation, list):
        return False
    turns = [turn for turn in conversation[:2] if isinstance(turn, Mapping) and turn.get("role") != "system"]
    return bool(turns) and turns[0].get("role") == "user" and _text(turns[0].get("content")) == prompt.strip()


def _text(content: Any) -> str | None:
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    return content.strip() if isinstance(content, str) else None


def _split_common_prefix(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Split the common prefix, which is the prompt, from both completions."""
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise BadRecord(
            "", "without 'prompt', 'chosen' and 'rejected' must be both text or both lists of messages. Add 'prompt', or fix them."
        )
    shorter = min(len(chosen), len(rejected))
    length = next((place for place in range(shorter) if chosen[place] != rejected[place]), shorter)
    if isinstance(chosen, str) and 0 < length < shorter and chosen[length - 1] == " ":
        length -= 1  # as TRL does: the space belongs to the completion
    if isinstance(chosen, list) and length == shorter and shorter:
        length -= 1  # equal completions: reported later, by the checks of all formats
    if not length:
        raise BadRecord("", "there is no prompt: 'chosen' and 'rejected' do not begin with the same one. Add 'prompt'.")
    return chosen[:length], chosen[length:], rejected[length:]
