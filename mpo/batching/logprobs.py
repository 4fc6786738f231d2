"""Log-probs of given completions under a model: for scorers, and for responses that were sampled elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpo.batching.attention import packed_attention
from mpo.batching.batch import Batch, packed_batch, padded_batch
from mpo.batching.layout import Row, lay_out
from mpo.batching.logits_to_keep import KEYWORD, add_logits_to_keep
from mpo.batching.randomness import eval_mode
from mpo.encoding.chat import probe
from mpo.encoding.encoder import Encoded, Encoder
from mpo.encoding.images import in_order
from mpo.encoding.labels import Completion, label_turn
from mpo.encoding.turns import Record, Rendered, describe
from mpo.models.control_tokens import check_texts
from mpo.models.packable import fixed_context, why_not

if TYPE_CHECKING:
    from mpo.generation.generator import Request

CHUNK = 512
"""Positions whose log-probs are computed at once, in float32."""


def prompt_record(request: Request, name: str) -> Record:
    """A request, `name`, as a record of the encoder: a prefix is a message of the assistant, which a completion continues."""
    record: Record = {"id": name, "prompt": list(request.messages), "images": list(request.images)}
    if request.videos:
        record["videos"] = list(map(str, request.videos))
    if request.prefix:
        record["prompt"].append({"role": "assistant", "content": [{"type": "text", "text": request.prefix}]})
    return record


def completion_logprobs(
    model: Any,
    processor: Any,
    requests: Sequence[Request],
    completions: Sequence[Sequence[str]],
    *,
    max_tokens_per_batch: int = 8192,
    tile_budget: str = "prompt",
    layout: str | None = None,
    tower: Any = None,
) -> list[list[Tensor]]:
    """Compute the log-prob of every token of given completions.

    In packed rows the completions of a request share its prompt and its images, which are computed once. The prompt, with the
    request's prefix, has the tokens that it has for generation; a completion that would merge with its last one is tokenized alone.

    Args:
        model: the model, on its device, with its usual attention; it is in evaluation mode meanwhile.
        processor: its processor, or its tokenizer for prompts without images.
        requests: what was asked.
        completions: for each request, its completions as text, without the request's prefix; none is empty.
        max_tokens_per_batch: the most tokens of one forward pass, unless a single request has more.
        tile_budget: as in `MPOConfig`.
        layout: ``"packed"`` or ``"padded"``; None for packed rows where the model allows them.
        tower: a `mpo.training.features.use.CachedTower` of the model, or None.

    Returns:
        for each request and completion, shape (tokens,) float32 on the CPU: the log-probs of its tokens up to and including the one
        that ends the turn.

    Raises:
        ValueError: for what cannot be encoded or is beyond the context, and for packed rows in a model that they do not fit.
    """
    _check(requests, completions, max_tokens_per_batch)
    packs = _packs(model, layout)
    add_logits_to_keep((model.get_base_model() if hasattr(model, "get_base_model") else model).base_model)
    encode = _Continued(processor, tile_budget=tile_budget, context=fixed_context(model), features=getattr(tower, "cache", None))
    found: dict[tuple[int, str], Tensor] = {}
    waiting: list[tuple[list[tuple[int, str]], Row, dict[str, Tensor]]] = []

    def flush() -> None:
        if waiting:
            keys, rows, images = zip(*waiting, strict=True)
            with packed_attention(model):
                found.update(zip(chain.from_iterable(keys), _packed(model, rows, images), strict=True))
            waiting.clear()

    with eval_mode(model), torch.no_grad():
        for keys, encoded, images in _encoded(encode, requests, completions, model, tower):
            ends_in_image = bool(images) and encoded.prompt_ids[-1] == getattr(processor, "image_token_id", None)
            if not packs or encoded.extra or ends_in_image:
                values = _padded(model, encoded, images, max_tokens_per_batch, encode.tokenizer.pad_token_id)
                found.update(zip(keys, values, strict=True))
                continue
            row = lay_out(encoded.prompt_ids, encoded.completions)
            if sum(len(other.tokens) for _, other, _ in waiting) + len(row.tokens) > max_tokens_per_batch:
                flush()
            waiting.append((keys, row, images))
        flush()
    return [[found[number, text] for text in given] for number, given in enumerate(completions)]


def _check(requests: Sequence[Request], completions: Sequence[Sequence[str]], max_tokens_per_batch: Any) -> None:
    if len(requests) != len(completions):
        raise ValueError(f"Expected completions for every request; got {len(requests)} requests and {len(completions)} of these.")
    for given in completions:
        if isinstance(given, str) or not all(isinstance(text, str) for text in given):
            raise ValueError(f"Expected a list of texts for every request; got {given!r:.80}.")
    if isinstance(max_tokens_per_batch, bool) or not isinstance(max_tokens_per_batch, int) or max_tokens_per_batch < 1:
        raise ValueError(f"Expected max_tokens_per_batch to be 1 or more; got max_tokens_per_batch={max_tokens_per_batch!r}.")


def _packs(model: Any, layout: str | None) -> bool:
    reason = why_not(model)
    if layout == "packed" and reason is not None:
        raise ValueError(f"Completions cannot share their prompt in this model: {reason}. Set layout='padded'.")
    if layout not in (None, "packed", "padded"):
        raise ValueError(f"Expected layout to be packed, padded or None; got layout={layout!r}.")
    return layout != "padded" and reason is None


def _encoded(
    encode: _Continued, requests: Sequence[Request], completions: Sequence[Sequence[str]], model: Any, tower: Any
) -> Iterator[tuple[list[tuple[int, str]], Encoded, dict[str, Tensor]]]:
    """Encode each request with its different completions; yield their keys (its number, the text), the tokens, and the images."""
    for number, (request, given) in enumerate(zip(requests, completions, strict=True)):
        if texts := list(dict.fromkeys(given)):
            record, encode.texts = prompt_record(request, f"request {number}"), texts
            (encoded,), images, order = encode([record], sides=())
            check_prompt(describe(record), encoded, request.prefix or "", encode.tokenizer, context_of(model))
            yield [(number, text) for text in texts], encoded, in_order(images, order, tower, model.device)


@dataclass
class _Continued(Encoder):
    """Encode prompts as for generation, and after each one `texts` with what ends a turn: as a model would have sampled them."""

    texts: Sequence[str] = ()

    def encode_text(
        self, rendered: Rendered, where: str, tokenize: Callable[[str, bool], list[int]] | None = None
    ) -> tuple[list[int], list[Completion]]:
        """The prompt's tokens are the same whatever is after it; where the two would merge, a completion is tokenized alone."""
        encode, after, found = tokenize or self.tokenize, probe(self.processing_class).after, []
        prompt = encode(rendered.prompt, False)
        for place, text in enumerate(self.texts):
            if not text.strip():
                raise ValueError(f"{where}: completion {place} is empty. Give it a text or leave it out.")
            check_texts({f"completion {place}": text}, 0, self.processing_class, where)
            whole = encode(rendered.prompt + text + after, False)
            ids = whole[len(prompt) :] if whole[: len(prompt)] == prompt else encode(text + after, False)
            ids = ids[: sum(label_turn(ids, self._end_of_turn))]
            found.append(Completion(ids, [True] * len(ids)))
        return prompt, found


def context_of(model: Any) -> int | None:
    """The length of a model's context in tokens; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def check_prompt(where: str, encoded: Encoded, prefix: str, tokenizer: Any, context: int | None) -> None:
    """Refuse a prompt whose completions, or one token, are beyond the context, or whose template cuts off its prefix's end."""
    ids = encoded.prompt_ids
    if context is not None and len(ids) + max(encoded.longest(), 1) > context:
        found = f"its prompt has {len(ids)} tokens (image tokens included), and the context of {context} leaves "
        found += f"no room for a completion of {encoded.longest()}" if encoded.completions else "none for a response"
        raise ValueError(f"{where}: {found}. Use fewer or smaller images, fewer tiles, or a shorter text.")
    space = prefix[len(prefix.rstrip()) :]
    if space and not tokenizer.decode(ids[-len(space) - 1 :]).endswith(space):
        found = f"the chat template cuts off the white space at the end of the prefix {prefix[-20:]!r}"
        raise ValueError(f"{where}: {found}. End the prefix before it.")


def _packed(model: Any, rows: Sequence[Row], images: Sequence[dict[str, Tensor]]) -> Sequence[Tensor]:
    shown = [tensors for tensors in images if tensors]
    pixels = {name: torch.cat([tensors[name] for tensors in shown]) for name in (shown[0] if shown else ())}
    return _at_labels(model, packed_batch(rows), pixels)


def _padded(model: Any, encoded: Encoded, images: dict[str, Tensor], max_tokens: int, padding: int | None) -> Iterator[Tensor]:
    width = len(encoded.prompt_ids) + encoded.longest()
    size = max(1, max_tokens // width)
    for first in range(0, len(encoded.completions), size):
        part = encoded.completions[first : first + size]
        batch = padded_batch([(encoded, completion) for completion in part], padding or 0, multiple=width)  # which all have
        yield from _at_labels(model, batch, {name: torch.cat([value] * len(part)) for name, value in images.items()})


def _at_labels(model: Any, batch: Batch, images: dict[str, Tensor]) -> Sequence[Tensor]:
    moved = {name: value.to(model.device) for name, value in {**batch.model_inputs, **images}.items()}
    logits = model(**moved, **{KEYWORD: batch.positions_to_keep.to(model.device)}, use_cache=False).logits[0]
    parts = zip(torch.split(logits, CHUNK), torch.split(batch.shift_labels[0].to(model.device), CHUNK), strict=True)
    values = torch.cat([part.float().log_softmax(dim=-1).gather(1, label.unsqueeze(1)).squeeze(1) for part, label in parts])
    return torch.split(values.cpu()[batch.labelled.node], batch.labelled.lengths.tolist())
