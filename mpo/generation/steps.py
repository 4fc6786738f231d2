"""What a local generator does at each step of transformers' `generate`: choose a token, look for the end, pass the text on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer

from mpo.generation.generator import Decoding, OnText


class Sampler(LogitsProcessor):  # type: ignore[misc]
    """Choose each row's next token with random numbers of its own, and leave no other.

    A sample is the largest logit after Gumbel noise is added (the Gumbel-max trick), where the noise is a function of the row's
    key (64 bits), the step and the token: it is the same in any batch, on any device. At temperature 0 there is none.
    """

    def __init__(self, decoding: Decoding, keys: Sequence[int]) -> None:
        self.decoding, self.step = decoding, 0
        self.keys = torch.tensor(keys, dtype=torch.int64).unsqueeze(1)
        self.logprobs: list[Tensor] = []  # at each step, of the chosen tokens in the model's own distribution, shape (rows,)
        self._warpers: list[LogitsProcessor] = [TopKLogitsWarper(decoding.top_k)] if decoding.top_k else []
        self._warpers += [TopPLogitsWarper(decoding.top_p)] if decoding.top_p < 1 else []

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """Choose tokens by their logits, shape (rows, vocabulary)."""
        if scores.isnan().any():
            raise ValueError("The model's logits are not numbers (nan). Check its weights, or load it in bfloat16 or float32.")
        warped = scores - scores.amax(dim=-1, keepdim=True)  # so that no division overflows
        if self.decoding.temperature > 0:
            warped = warped / max(self.decoding.temperature, 1e-30)
        for warper in self._warpers:
            warped = warper(input_ids, warped)
        if self.decoding.temperature > 0:
            self.keys = self.keys.to(scores.device)
            warped = warped + gumbel_noise(self.keys, self.step, scores.shape[1]).to(warped.dtype)
        chosen = warped.argmax(dim=-1, keepdim=True)
        if self.decoding.logprobs:
            self.logprobs.append(scores.float().log_softmax(dim=-1).gather(1, chosen).squeeze(1))
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def gumbel_noise(keys: Tensor, step: int, vocabulary: int) -> Tensor:
    """Gumbel noise from a counter: the finalizer of SplitMix64 (Steele et al. 2014) on a row's key, the step and the token.

    `keys` of the rows have shape (rows, 1) int64; `step` is the number of the token in the response, from 0; `vocabulary`, V, that
    of all tokens. Returns shape (rows, V); float64, or float32 on a device without it.

    >>> keys = torch.tensor([[5], [6]])
    >>> torch.equal(gumbel_noise(keys, 3, 4)[1:], gumbel_noise(keys[1:], 3, 4))
    True
    """
    counter = step * vocabulary + torch.arange(vocabulary, device=keys.device)
    bits = _mixed(_mixed(keys) + counter * -0x61C8864680B583EB)  # products wrap around, as in unsigned 64 bits
    digits, dtype = (22, torch.float32) if keys.device.type == "mps" else (52, torch.float64)
    uniform = _shifted(bits, 64 - digits).to(dtype).add_(0.5).mul_(2.0**-digits)  # between 0 and 1, both excluded
    return uniform.log_().neg_().log_().neg_()


def _mixed(bits: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ _shifted(bits, shift)) * factor
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, count: int) -> Tensor:
    return (bits >> count) & ((1 << (64 - count)) - 1)


class StopTexts(StoppingCriteria):  # type: ignore[misc]
    """End a row whose text, after a prompt of so many tokens, has come to one of the texts that end a response (`decoding`)."""

    def __init__(self, tokenizer: Any, decoding: Decoding, prompt_length: int, rows: int) -> None:
        self.tokenizer, self.decoding, self.prompt_length = tokenizer, decoding, prompt_length
        self.tokens: list[int | None] = [None] * rows  # of each response when it ended this way
        self._tail = max((len(text.encode()) for text in decoding.stop), default=0) + 8  # tokens that may hold such a text

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows have ended, shape (rows,)."""
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if self.tokens[row] is None:
                text = self.tokenizer.decode(ids[-self._tail :], skip_special_tokens=True)
                if self.decoding.before_stop(text) != text:
                    self.tokens[row] = len(ids)
        return torch.tensor([tokens is not None for tokens in self.tokens], device=input_ids.device)


class TextStream(BaseStreamer):  # type: ignore[misc]
    """Pass on the text of one response token by token: together what `decode` gives for all of its tokens.

    All tokens are decoded each time, since the text of a token depends on those before it: a character may take several tokens,
    and SentencePiece drops the space at the beginning of a text. It ends at one of the tokens `ends`.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], decoding: Decoding, on_text: OnText) -> None:
        self.tokenizer, self.ends, self.decoding, self.on_text = tokenizer, ends, decoding, on_text
        self.ids: list[int] | None = None  # the first call has the prompt
        self.before: list[int] = []  # the prompt's last token, where its text goes on
        self.shown = ""
        self._held = max(map(len, decoding.stop), default=1) - 1  # characters that may begin a text that ends it

    def put(self, value: Tensor) -> None:
        """Take the next token."""
        if self.ids is None:
            self.ids = []
        elif int(value) not in self.ends:
            self.ids.append(int(value))
            self._show(final=False)

    def end(self) -> None:
        """Pass on the rest."""
        self._show(final=True)

    def _show(self, *, final: bool) -> None:
        text = self.decoding.before_stop(text_after(self.tokenizer, self.before, self.ids or []))
        if not final and text.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of a character
            return
        if not final and getattr(self.tokenizer, "clean_up_tokenization_spaces", False):  # a space may go with the next token
            text = text[: max(text.rfind(" "), 0)]
        if not final:
            text = text[: len(text) - self._held]
        if len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


def text_after(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of a response that goes on from a prompt's last token (`before`; none where a text begins), without special tokens.

    SentencePiece drops the space at the beginning of a text, which belongs between a prefix and what goes on from it.
    """
    whole, first = (str(tokenizer.decode(part, skip_special_tokens=True)) for part in ([*before, *ids], list(before)))
    return whole[len(first) :] if whole.startswith(first) else str(tokenizer.decode(list(ids), skip_special_tokens=True))
