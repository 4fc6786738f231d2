"""What is sent to an OpenAI-compatible server and read from its response; where servers differ (`KINDS`).

The differences were read in the source of vLLM, SGLang, LMDeploy and `transformers serve` 5.24, and tried on vLLM and the last.
"""

import json
import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from mpo.data.images import media_type, open_image
from mpo.data.paths import regular_file
from mpo.data.video import Frame, open_frames, with_frames
from mpo.generation.generator import Decoding, Request

OWN_FIELDS = frozenset("model messages prompt max_tokens temperature top_p top_k n seed stop logprobs stream".split())
"""Fields that settings of the generator decide."""
MAX_CHOICES = 128
"""Samples that are asked for at once: LMDeploy's and OpenAI's limit."""


@dataclass(frozen=True)
class Kind:
    """The ways of a kind of server."""

    name: str
    all_tokens: int | None = None  # its `top_k` for all tokens, since its default is another; None if it takes no `top_k`
    from_checkpoint: bool = False  # unless told otherwise, it decodes as the checkpoint's generation_config.json says
    tiles: str | None = None  # where it takes a tile limit: mm_processor_kwargs, max_dynamic_patch or image_url; None if nowhere
    takes_n: bool = True  # responses at once
    takes_logprobs: bool = True
    takes_stop: bool = True


KINDS = {
    kind.name: kind
    for kind in (
        Kind("vllm", all_tokens=-1, from_checkpoint=True, tiles="mm_processor_kwargs"),
        Kind("sglang", all_tokens=-1, from_checkpoint=True, tiles="max_dynamic_patch"),
        Kind("lmdeploy", all_tokens=0, tiles="image_url"),
        # It refuses fields that it does not know, and would fail (500) at `stop`. Its `generation_config` takes the others.
        Kind("transformers", all_tokens=0, from_checkpoint=True, takes_n=False, takes_logprobs=False, takes_stop=False),
        Kind("other"),
    )
}


def kind_of(model: Mapping[str, Any]) -> Kind:
    """The kind of a server, by an entry of its list of models.

    >>> kind_of({"id": "a", "owned_by": "vllm"}).name, kind_of({"id": "a", "status": {"value": "loaded"}}).name
    ('vllm', 'transformers')
    """
    owner = model.get("owned_by")
    if owner in ("vllm", "sglang", "lmdeploy"):
        return KINDS[owner]
    return KINDS["transformers" if isinstance(model.get("status"), Mapping) else "other"]


def check_understood(kind: Kind, url: str, decoding: Decoding, max_tiles: int | None) -> None:
    """Refuse settings that a kind of server would ignore: a ValueError names the setting and what to do."""
    said = "" if kind.name != "other" else " If it does, say which server it is: kind='vllm', for example."
    if decoding.top_k and kind.all_tokens is None:
        raise ValueError(f"{url} is not known to take top_k={decoding.top_k}. Leave it out, or use top_p.{said}")
    if decoding.logprobs and not kind.takes_logprobs:
        raise ValueError(f"{url} ({kind.name}) returns no log-probs, and logprobs=True. Use vLLM, SGLang or LMDeploy.")
    if max_tiles is not None and kind.tiles is None:
        raise ValueError(
            f"{url} ({kind.name}) is not known to take a tile limit, and max_tiles={max_tiles}. Leave it out, and set the limit "
            f"where the server is started, or max_patches in the model's preprocessor config.{said}"
        )


def decoding_fields(kind: Kind, decoding: Decoding, *, first: int, count: int) -> dict[str, Any]:
    """The fields of a request that say how to sample `count` responses, whose numbers begin at `first`.

    Everything that a server would take from the checkpoint is said: a response is a sample of the model's own distribution.
    """
    sampled = decoding.temperature > 0
    fields: dict[str, Any] = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}
    if sampled:
        fields |= {"top_p": decoding.top_p, "seed": decoding.seed + first}
    if count > 1 and kind.takes_n:
        fields["n"] = count
    if decoding.stop and kind.takes_stop:
        fields["stop"] = list(decoding.stop)
    top_k = decoding.top_k or kind.all_tokens
    if kind.name == "transformers":
        own = {"do_sample": sampled, "repetition_penalty": 1.0, **({"top_k": top_k} if sampled else {})}
        fields["generation_config"] = json.dumps(own)
    elif sampled and top_k is not None:
        fields["top_k"] = top_k
    if kind.from_checkpoint and kind.name != "transformers":
        fields |= {"repetition_penalty": 1.0, **({"min_p": 0.0} if sampled else {})}
    return fields


def chat_fields(kind: Kind, request: Request, *, max_tiles: int | None = None, continued: bool = True) -> dict[str, Any]:
    """The fields of a chat request: its messages, with images as data URLs; a prefix is a message of the assistant at the end.

    Videos become frames, as in training, of one tile each. With `continued` the prefix is to be gone on from, in vLLM's and
    SGLang's way. Raises ValueError for an image or a video that cannot be opened.
    """
    messages, images = request.messages, list(request.images)
    if request.videos:
        record = {"prompt": list(messages), "images": images, "videos": list(map(str, request.videos))}
        record = with_frames(record, where="the request")
        messages, images = record["prompt"], _opened(record["images"])
        max_tiles = 1 if kind.tiles else None
    urls = iter(_image_url(image, f"image {number} of {len(images)}") for number, image in enumerate(images, start=1))
    limit = {"max_dynamic_patch": max_tiles} if max_tiles is not None and images else {}
    of_image = limit if kind.tiles == "image_url" else {}
    sent = []
    for message in messages:
        parts = [
            {"type": "text", "text": part["text"]}
            if part["type"] == "text"
            else {"type": "image_url", "image_url": {"url": next(urls), **of_image}}
            for part in message["content"]
        ]
        alone = len(parts) == 1 and parts[0]["type"] == "text"
        sent.append({"role": message["role"], "content": parts[0]["text"] if alone else parts})
    fields: dict[str, Any] = {"messages": sent, **(limit if kind.tiles == "max_dynamic_patch" else {})}
    if limit and kind.tiles == "mm_processor_kwargs":
        fields["mm_processor_kwargs"] = limit
    if request.prefix:
        sent.append({"role": "assistant", "content": request.prefix})
        if continued:
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return fields


def _opened(images: Sequence[Any]) -> list[Any]:
    found = list(images)
    for path in dict.fromkeys(image.path for image in images if isinstance(image, Frame)):
        own = [place for place, image in enumerate(images) if isinstance(image, Frame) and image.path == path]
        for place, frame in zip(own, open_frames(path, [images[place] for place in own]), strict=True):
            jpeg = BytesIO()
            frame.save(jpeg, format="JPEG", quality=95)
            found[place] = jpeg.getvalue()
    return found


def _image_url(image: Any, where: str) -> str:
    """An image as a data URL: the bytes of a file as they are if `media_type` has a type for them, all else as PNG."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    content = image
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        where = f"{where}: {path}"
        try:
            with open(regular_file(path, where, "image"), "rb") as file:
                content = file.read()
        except OSError as error:
            raise ValueError(f"{where}: this image cannot be opened ({error.strerror}). Fix its permissions.") from error
    kind = None
    if isinstance(content, bytes | bytearray | memoryview):
        content = bytes(content)
        kind = media_type(content, where=where)
    if kind is None:
        png = BytesIO()
        open_image(content, where=where).save(png, format="PNG", compress_level=1)
        content, kind = png.getvalue(), "image/png"
    return f"data:{kind};base64,{b64encode(content).decode()}"


@dataclass(frozen=True)
class Choice:
    """One response of a server, as it was sent."""

    text: str
    finish_reason: str | None
    logprobs: tuple[float, ...] | None


def read_choices(data: Any) -> list[Choice]:
    """The choices of a response, or of a part of a streamed one, in order. Raises ValueError for anything else, or without any."""
    try:
        found = []
        for choice in sorted(data["choices"], key=lambda choice: choice.get("index", 0)):
            said = choice if "text" in choice else choice["delta"] if "delta" in choice else choice["message"]
            text = said.get("text" if "text" in choice else "content")
            if not isinstance(text, str | None):
                raise ValueError(f"a text is {text!r:.80}")
            found.append(Choice(text or "", choice.get("finish_reason"), _logprobs(choice.get("logprobs"))))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it has no choices: {data!r:.200}") from error
    if not found:
        raise ValueError("it has no choices")
    return found


def read_usage(data: Any) -> tuple[int | None, int | None]:
    """The numbers of prompt and completion tokens of a response; None where it does not say.

    >>> read_usage({"usage": {"prompt_tokens": 3, "completion_tokens": "x"}}), read_usage([])
    ((3, None), (None, None))
    """
    usage = data.get("usage") if isinstance(data, Mapping) else None
    counts = [usage.get(name) if isinstance(usage, Mapping) else None for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (count if isinstance(count, int) and count >= 0 else None for count in counts)
    return prompt, completion


def _logprobs(given: Any) -> tuple[float, ...] | None:
    if not given:
        return None
    values = [token["logprob"] for token in given["content"]] if given.get("content") else given.get("token_logprobs")
    return tuple(map(float, values)) if values else None
