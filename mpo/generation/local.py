"""Generate text with a transformers model in this process; the model may be in training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mpo.batching.randomness import eval_mode
from mpo.encoding.encoder import Encoder
from mpo.encoding.turns import Record, end_of_turn_token
from mpo.generation.before import OnText, Question, Reply, Response, check_decoding
from mpo.models.family import known_family

TILE_BUDGETS = ("prompt", "image")


class LocalGenerator:
    """Sample responses from a transformers model, in left-padded batches; prompts are encoded as in training.

    Weights, training mode and random state are unchanged. Of the checkpoint's generation config only the tokens that end a
    response are used: a response is a sample of the model's own distribution.

    For InternVL a prompt and its images are computed once, whatever the number of responses: its key-value cache is copied
    for each of them. (`generate(num_return_sequences=n)` computes the prompt n times, and before transformers had
    `mm_encoder_outputs` for InternVL it mixed up the tiles of images with several tiles.) Other models repeat the prompt.

    Args:
        model: the model, on its device, with its usual attention.
        processor: its processor, or its tokenizer for prompts without images.
        responses_per_batch: the largest number of responses generated in one batch.
        progress: label of the progress bar; None for no bar.
        tile_budget: whether the tile limit applies per prompt or per image, as in `MPOConfig`.
        sharded: the weights are sharded over several ranks, all of which make the same calls.

    Raises:
        ValueError: for an invalid argument.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        responses_per_batch: int = 64,
        progress: str | None = None,
        tile_budget: str = "prompt",
        sharded: bool = False,
    ) -> None:
        if responses_per_batch < 1:
            raise ValueError(f"responses_per_batch must be 1 or more, not {responses_per_batch}.")
        if tile_budget not in TILE_BUDGETS:
            raise ValueError(f"Expected tile_budget to be {' or '.join(TILE_BUDGETS)}; got tile_budget={tile_budget!r}.")
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.responses_per_batch = responses_per_batch
        self.progress = progress
        self.sharded = sharded
        self._encoder = Encoder(processor, tile_budget=tile_budget)
        self._ends = _end_tokens(model, processor)
        self._pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._ends[0]

    def generate(
        self,
        questions: Sequence[Question],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> list[list[str]]:
        """Sample `n` responses to every question; see `mpo.generation.generator.Generator` and `respond`.

        Returns:
            For each question, in order, its `n` responses without special tokens.
        """
        settings: dict[str, Any] = {"n": n, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
        responses = self.respond([_record(question) for question in questions], **settings, top_k=top_k, top_p=top_p)
        return [[self.tokenizer.decode(one.ids, skip_special_tokens=True) for one in several] for several in responses]

    def respond(
        self,
        records: Sequence[Record],
        *,
        n: int = 1,
        temperature: float = 1.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
        top_k: int = 0,
        top_p: float = 1.0,
        on_text: OnText | None = None,
    ) -> list[list[Response]]:
        """Sample `n` responses to the prompt of every record.

        Args:
            records: with ``prompt`` and ``images`` as in training. Their completions are ignored.
            n: responses per prompt; must be 1 at temperature 0, where all would be the same.
            temperature: 0 is greedy, 1 samples from the model's own distribution.
            max_new_tokens: the longest response, in tokens.
            seed: random seed of the sampling. Every batch draws from the seed and its own position, so responses also depend on
                `responses_per_batch`.
            top_k: sample from the `top_k` most likely tokens; 0 for all.
            top_p: sample from the smallest set of most likely tokens with this total probability.
            on_text: called with the response's text, without special tokens, as it comes; for one record and n=1.

        Returns:
            for each record, in order, its `n` responses.

        Raises:
            ValueError: for invalid arguments, and for a prompt that cannot be encoded.
        """
        check_decoding(n=n, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, top_k=top_k, top_p=top_p)
        if on_text is not None and (len(records) != 1 or n != 1):
            raise ValueError(f"on_text needs one record and n=1; got {len(records)} records and n={n}.")
        decoding: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if temperature > 0:
            decoding = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        size = max(1, self.responses_per_batch // n)
        responses: list[list[Response]] = []
        with (
            _unchanged(self.model),
            tqdm(total=len(records), desc=self.progress, disable=self.progress is None, unit="question") as bar,
        ):
            for first in range(0, len(records), size):
                batch = records[first : first + size]
                torch.manual_seed(hash((seed, first)) & 0x7FFF_FFFF_FFFF_FFFF)
                if on_text is not None:
                    decoding["streamer"] = _Streamer(self.tokenizer, self._ends, on_text)
                rows, prompts = self._rows(batch, n, max_new_tokens=max_new_tokens, **decoding)
                found = [self._response(row, prompts[place // n]) for place, row in enumerate(rows.tolist())]
                responses += [found[place : place + n] for place in range(0, len(found), n)]
                bar.update(len(batch))
        return responses

    def ask(
        self,
        question: Question,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 1024,
        seed: int = 0,
        top_p: float = 1.0,
        on_text: OnText | None = None,
    ) -> Reply:
        """Ask one question; arguments and errors as in `respond`."""
        settings: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "top_p": top_p}
        ((response,),) = self.respond([_record(question)], **settings, on_text=on_text)
        text = self.tokenizer.decode(response.ids, skip_special_tokens=True)
        return Reply(text, "stop" if response.finished else "length", response.prompt_tokens, response.tokens)

    def encode(self, records: Sequence[Record]) -> dict[str, Tensor]:
        """Encode prompts as one left-padded batch, with their images, on the model's device.

        Raises:
            ValueError: for no records, and for a prompt that cannot be encoded.
        """
        if not records:
            raise ValueError("There are no records to encode. Give one or more.")
        prompts, images, order = self._encoder(records, sides=())
        if order is not None:
            images["pixel_values"] = images["pixel_values"][order]
        width = max(len(prompt.prompt_ids) for prompt in prompts)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([[fill] * (width - len(row)) + row for row in rows])

        inputs = {
            "input_ids": padded([prompt.prompt_ids for prompt in prompts], self._pad),
            "attention_mask": padded([[1] * len(prompt.prompt_ids) for prompt in prompts], 0),
        }
        for name in {name for prompt in prompts for name in prompt.extra}:
            rows = [one.extra[name].tolist() if name in one.extra else [0] * len(one.prompt_ids) for one in prompts]
            inputs[name] = padded(rows, 0)
        return {name: value.to(self.model.device) for name, value in (inputs | images).items()}

    def _rows(self, records: Sequence[Record], n: int, **settings: Any) -> tuple[Tensor, list[int]]:
        """The new tokens of `n` rows per record, padded on the right, and the number of tokens of each record's prompt."""
        shared = n > 1 and known_family(self.model.config).shares_prompt
        inputs: Mapping[str, Any] = self.encode(records if shared else [record for record in records for _ in range(n)])
        prompts = inputs["attention_mask"].sum(dim=1).tolist()[:: 1 if shared else n]
        if shared:
            inputs = self._prefill(inputs, n)
        if isinstance(self.model, FSDPModule) and is_peft_model(self.model):
            # Without it, weights outside the layers would stay sharded.
            register_fsdp_forward_method(self.model, "generate")  # type: ignore[arg-type]
        generated = self.model.generate(
            **inputs,
            **settings,
            eos_token_id=self._ends,
            pad_token_id=self._pad,
            use_cache=True,
            synced_gpus=self.sharded,
        )
        return generated[:, inputs["input_ids"].shape[1] :], prompts

    def _prefill(self, inputs: Mapping[str, Tensor], n: int) -> dict[str, Any]:
        """Compute each prompt without its last token once, and repeat the inputs and the cache `n` times for `generate`."""
        mask = inputs["attention_mask"]
        repeated = {name: inputs[name].repeat_interleave(n, dim=0) for name in ("input_ids", "attention_mask")}
        if mask.shape[1] == 1:  # prompts of one token, which has to stay
            return repeated
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config.get_text_config())
        self.model(
            input_ids=inputs["input_ids"][:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            pixel_values=inputs.get("pixel_values"),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(n)
        return {**repeated, "past_key_values": cache}

    def _response(self, row: list[int], prompt_tokens: int) -> Response:
        end = next((place for place, token in enumerate(row) if token in self._ends), None)
        ids = row[:end]
        return Response(self.tokenizer.decode(ids, skip_special_tokens=False), tuple(ids), end is not None, prompt_tokens)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Pass on the text of one response token by token: together what `decode` gives for all of its tokens.

    All tokens are decoded each time, since the text of a token depends on those before it: a character may take several tokens,
    and SentencePiece drops the space at the beginning of a text.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], on_text: OnText) -> None:
        self.tokenizer, self.ends, self.on_text = tokenizer, ends, on_text
        self.ids: list[int] | None = None  # the first call has the prompt
        self.shown = ""

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
        text = self.tokenizer.decode(self.ids or [], skip_special_tokens=True)
        if not final and text.endswith("\N{REPLACEMENT CHARACTER}"):  # a part of a character
            return
        if not final and getattr(self.tokenizer, "clean_up_tokenization_spaces", False):  # a space may go with the next token
            text = text[: max(text.rfind(" "), 0)]
        if len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


def _record(question: Question) -> Record:
    content = [*({"type": "image"} for _ in question.images), {"type": "text", "text": question.text}]
    system = [] if question.system is None else [{"role": "system", "content": question.system}]
    return {"prompt": [*system, {"role": "user", "content": content}], "images": list(question.images)}


def _end_tokens(model: Any, processor: Any) -> list[int]:
    """Tokens that end a response: the end-of-turn token of training first, then those of the checkpoint."""
    of_checkpoint = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = of_checkpoint if isinstance(of_checkpoint, list) else [of_checkpoint]
    return [int(end) for end in dict.fromkeys([end_of_turn_token(processor), *several]) if end is not None]


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Eval mode, no gradients, no settings of the checkpoint's generation config, a forked random state; restored on exit."""
    owner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    saved, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        owner.generation_config = saved
