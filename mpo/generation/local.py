"""Generate text with a transformers model in this process; the model may be in training."""

import asyncio
import copy
import hashlib
import inspect
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from tqdm.auto import tqdm
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from mpo.batching.logprobs import check_prompt, completion_logprobs, context_of, prompt_record
from mpo.batching.randomness import eval_mode
from mpo.encoding.chat import is_processor
from mpo.encoding.encoder import Encoded, Encoder
from mpo.encoding.images import VISION_FEATURES, in_order
from mpo.encoding.keys import image_key
from mpo.encoding.labels import end_of_turn_token
from mpo.encoding.turns import Record, describe
from mpo.generation.calling import run_model
from mpo.generation.generator import (
    Decoding,
    GenerationError,
    Item,
    OnText,
    Request,
    Response,
    Usage,
    checked_requests,
    numbered,
    whole_number,
)
from mpo.generation.steps import Sampler, StopTexts, TextStream, text_after
from mpo.io import StoreError
from mpo.models.family import known_family

TILE_BUDGETS = ("prompt", "image")
PREFIX = "prefix"
"""Key of a record made from a request with a prefix."""
IDLE_SECONDS = 0.05
"""How long a batch that is not full waits for its next request."""
_CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else "past_key_values"
"""Name of the argument of the cached keys and values: transformers renamed it, and drops the old name in 5.40."""


@dataclass(frozen=True)
class Sample:
    """A sampled response, in tokens."""

    text: str  # special tokens included, without the token that ends it
    ids: tuple[int, ...]  # without the token that ends it
    finished: bool  # before the token limit
    prompt_tokens: int  # with those of the images
    tokens: int  # sampled ones, with the token that ends it
    logprobs: tuple[float, ...] | None = None  # of these, on demand
    last: int = 0  # token of the prompt


class LocalGenerator:
    """Sample responses from a transformers model, in left-padded batches; prompts are encoded as in training.

    Weights, training mode and random state are unchanged. Of the checkpoint's generation config only the tokens that end a
    response are used: a response is a sample of the model's own distribution. Log-probs are those of that distribution, whatever
    the temperature.

    A response depends on its request, the number of the sample and the seed alone, not on the batch: every row draws its own
    random numbers. What the hardware adds is rounding: a matrix product of another size may differ in its last bits, and where
    two tokens are as good as equal, the other one may be taken. In float32 this is rare; in bfloat16 and float16 long
    responses do differ between batch sizes, unless the kernels are batch-invariant.

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

    Attributes:
        usage: the tokens so far.
        concurrency: of a job's requests: a full batch of single responses.
        tower: the `mpo.training.features.use.CachedTower` of the model, or None; see `with_tower`.
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
        if tile_budget not in TILE_BUDGETS:
            raise ValueError(f"Expected tile_budget to be {' or '.join(TILE_BUDGETS)}; got tile_budget={tile_budget!r}.")
        self.model, self.processor = model, processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.responses_per_batch: int = whole_number("responses_per_batch", responses_per_batch)
        self.progress, self.sharded = progress, sharded
        self.tower: Any = None
        self.usage = Usage()
        self.concurrency = responses_per_batch
        self._encoder = Encoder(processor, tile_budget=tile_budget)
        self._ends = _end_tokens(model, processor)
        self._pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self._ends[0]
        self._context = context_of(model)
        self._busy = threading.RLock()  # two steps of a job may ask it from two threads

    def with_tower(self, tower: Any) -> Self:
        """Return this generator with a `mpo.training.features.use.CachedTower` of its model, for which every image is encoded once.

        All else, with the usage and the lock of the model, is shared with it.
        """
        other = copy.copy(self)
        other.tower, other._encoder = tower, replace(self._encoder, features=tower.cache)
        return other

    def generate(self, requests: Sequence[Request], **settings: Any) -> list[list[Response]]:
        """Sample responses; see `mpo.generation.generator.Generator.generate` for the settings."""
        decoding, requests = Decoding(**settings), checked_requests(requests)
        samples = [range(decoding.n)] * len(requests)
        sampled = self._sample([_record(request, number) for number, request in enumerate(requests)], samples, decoding)
        return [
            [self._response(request, one, decoding) for one in several] for request, several in zip(requests, sampled, strict=True)
        ]

    async def stream(
        self, requests: Iterable[Item] | AsyncIterable[Item], *, concurrency: int | None = None, **settings: Any
    ) -> AsyncIterator[tuple[int, int, Response | GenerationError]]:
        """Sample responses as they are asked for, batch by batch of `concurrency`; see `mpo.generation.generator.Generator`."""
        decoding = Decoding(**settings)
        size = whole_number("concurrency", concurrency, optional=True) or self.responses_per_batch
        waiting: list[tuple[int, Request, tuple[int, ...]]] = []
        items, ended = aiter(numbered(requests)), False
        following: asyncio.Task[Any] | None = None
        try:
            while not ended or waiting:
                if not ended and sum(len(samples) for _, _, samples in waiting) < size:
                    following = following or asyncio.ensure_future(anext(items, None))
                    await asyncio.wait([following], timeout=IDLE_SECONDS if waiting else None)
                    if following.done():
                        taken, following = following.result(), None
                        ended = taken is None
                        if taken is not None:
                            waiting.append((taken[0], *decoding.samples_of(taken[1])))
                        continue
                for found in await run_model(self, self._answer, waiting, decoding):  # also where the next ones wait for these
                    yield found
                waiting = []
        finally:
            if following is not None:
                following.cancel()

    def _answer(
        self, asked: Sequence[tuple[int, Request, tuple[int, ...]]], decoding: Decoding
    ) -> list[tuple[int, int, Response | GenerationError]]:
        """The responses of some requests; if one of them cannot be encoded, the others are asked without it."""
        try:
            records = [_record(request, number) for number, request, _ in asked]
            sampled = self._sample(records, [samples for *_, samples in asked], decoding)
        except StoreError:
            raise
        except ValueError as error:
            if len(asked) > 1:
                return [found for one in asked for found in self._answer([one], decoding)]
            return [(number, sample, GenerationError(str(error))) for number, _, samples in asked for sample in samples]
        return [
            (number, sample, self._response(request, one, decoding))
            for (number, request, samples), several in zip(asked, sampled, strict=True)
            for sample, one in zip(samples, several, strict=True)
        ]

    def ask(self, request: Request, *, on_text: OnText | None = None, **settings: Any) -> Response:
        """Ask one question; settings and errors as in `generate`. `on_text` is called with the response's text as it comes."""
        decoding = Decoding(**settings)
        ((sample,),) = self._sample([_record(request, 0)], [(0,)], decoding, on_text)
        return self._response(request, sample, decoding)

    def respond(self, records: Sequence[Record], **settings: Any) -> list[list[Sample]]:
        """Sample `n` responses, in tokens, to the prompt of each record, as training has them; its completions are ignored.

        Settings and errors are as in `generate`.
        """
        decoding = Decoding(**settings)
        return self._sample(records, [range(decoding.n)] * len(records), decoding)

    def logprobs(self, requests: Sequence[Request], completions: Sequence[Sequence[str]]) -> list[list[Tensor]]:
        """Compute the log-prob of every token of given completions; see `mpo.batching.logprobs.completion_logprobs`."""
        budget, tower = self._encoder.tile_budget, self.tower
        return completion_logprobs(self.model, self.processor, requests, completions, tile_budget=budget, tower=tower)

    def identity(self) -> dict[str, Any]:
        """The fingerprint of the weights, and what turns a request into the model's input."""
        hasher = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hasher.update(value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        images = getattr(self.processor, "image_processor", None)
        return {
            "weights": hasher.hexdigest(),
            "template": hashlib.sha256(str(getattr(self.processor, "chat_template", None)).encode()).hexdigest(),
            "max_tiles": getattr(images, "max_patches", None),
            "tile_budget": self._encoder.tile_budget,
        }

    def _sample(
        self, records: Sequence[Record], samples: Sequence[Sequence[int]], decoding: Decoding, on_text: OnText | None = None
    ) -> list[list[Sample]]:
        found: list[list[Sample]] = [[] for _ in records]
        with (
            self._busy,
            _unchanged(self.model),
            tqdm(total=sum(map(len, samples)), desc=self.progress, disable=self.progress is None, unit="response") as bar,
        ):
            for batch in _batches(samples, self.responses_per_batch):
                for place, sample in self._batch(records, batch, decoding, on_text):
                    found[place].append(sample)
                    bar.update()
        for several in found:
            if several:
                self.usage.add(len(several), several[0].prompt_tokens, sum(sample.tokens for sample in several))
        return found

    def _batch(
        self, records: Sequence[Record], batch: Sequence[tuple[int, Sequence[int]]], decoding: Decoding, on_text: OnText | None
    ) -> Iterator[tuple[int, Sample]]:
        prompts, inputs = self.encode([records[place] for place, _ in batch])
        counts = [len(numbers) for _, numbers in batch]
        if VISION_FEATURES in inputs or (max(counts) > 1 and known_family(self.model.config).shares_prompt):
            model_inputs = self._prefill(inputs, counts)
        elif max(counts) > 1:
            _, model_inputs = self.encode([records[place] for place, numbers in batch for _ in numbers])
        else:
            model_inputs = inputs
        numbered_prompts = [(prompt, one) for prompt, (_, numbers) in zip(prompts, batch, strict=True) for one in numbers]
        sampler = Sampler(decoding, [_noise_key(prompt, decoding.seed, number) for prompt, number in numbered_prompts])
        ends = StopTexts(self.tokenizer, decoding, model_inputs["input_ids"].shape[1], sum(counts))
        stream = None if on_text is None else TextStream(self.tokenizer, self._ends, decoding, on_text)
        if stream is not None and PREFIX in records[0]:
            stream.before = prompts[0].prompt_ids[-1:]
        if isinstance(self.model, FSDPModule) and is_peft_model(self.model):
            # Without it, weights outside the layers would stay sharded.
            register_fsdp_forward_method(self.model, "generate")  # type: ignore[arg-type]
        generated = self.model.generate(
            **model_inputs,
            do_sample=False,  # the sampler leaves one token
            max_new_tokens=decoding.max_new_tokens,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([ends] if decoding.stop else []),
            streamer=stream,
            eos_token_id=self._ends,
            pad_token_id=self._pad,
            use_cache=True,
            synced_gpus=self.sharded,
        )
        rows = generated[:, model_inputs["input_ids"].shape[1] :].tolist()
        logprobs = torch.stack(sampler.logprobs, dim=1).tolist() if decoding.logprobs else [None] * len(rows)
        places = [place for place, (_, numbers) in enumerate(batch) for _ in numbers]
        for place, row, stopped, logps in zip(places, rows, ends.tokens, logprobs, strict=True):
            ended = next((place for place, token in enumerate(row[:stopped]) if token in self._ends), None)
            ids, prompt = tuple(row[:stopped][:ended]), prompts[place].prompt_ids
            text, tokens = self.tokenizer.decode(ids, skip_special_tokens=False), len(ids) + (ended is not None)
            own = None if logps is None else tuple(logps[:tokens])
            finished = stopped is not None or ended is not None
            yield batch[place][0], Sample(text, ids, finished, len(prompt), tokens, own, prompt[-1])

    def _response(self, request: Request, sample: Sample, decoding: Decoding) -> Response:
        text = text_after(self.tokenizer, [sample.last] if request.prefix else [], sample.ids)
        finish = "stop" if sample.finished else "length"
        return Response(decoding.before_stop(text), finish, sample.prompt_tokens, sample.tokens, sample.logprobs)

    def encode(self, records: Sequence[Record]) -> tuple[list[Encoded], dict[str, Tensor]]:
        """Encode prompts, also as one left-padded batch with their images on the model's device. ValueError for what cannot be."""
        if not records:
            raise ValueError("There are no records to encode. Give one or more.")
        if not is_processor(self.processor) and (shown := next((one for one in records if one.get("images")), None)):
            raise ValueError(f"{describe(shown)} has images, and the generator has only a tokenizer. Give it the processor.")
        prompts, images, order = self._encoder(records, sides=())
        for record, prompt in zip(records, prompts, strict=True):
            check_prompt(describe(record), prompt, record.get(PREFIX, ""), self.tokenizer, self._context)
        images = in_order(images, order, self.tower, self.model.device)
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
        return prompts, {name: value.to(self.model.device) for name, value in (inputs | images).items()}

    def _prefill(self, inputs: Mapping[str, Tensor], counts: list[int]) -> dict[str, Any]:
        """Compute each prompt without its last token once, and repeat inputs and cache `counts` times for `generate`."""
        mask = inputs["attention_mask"]
        rows = torch.repeat_interleave(torch.tensor(counts)).to(mask.device)
        repeated = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
        if mask.shape[1] == 1:  # prompts of one token, which has to stay
            return repeated
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        cache = DynamicCache(config=self.model.config.get_text_config())
        self.model(
            input_ids=inputs["input_ids"][:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=positions[:, :-1],
            use_cache=True,
            logits_to_keep=1,
            **{name: inputs[name] for name in ("pixel_values", VISION_FEATURES) if name in inputs},
            **{_CACHE: cache},
        )
        cache.batch_select_indices(rows)
        return {**repeated, _CACHE: cache}


def _record(request: Request, number: int) -> Record:
    record = prompt_record(request, f"request {number}")
    return {**record, PREFIX: request.prefix} if request.prefix else record


def _batches(samples: Sequence[Sequence[int]], size: int) -> Iterator[list[tuple[int, Sequence[int]]]]:
    """Batches of at most `size` responses: the places of records with sample numbers; those of a record together if they fit.

    >>> list(_batches([(0, 1), (0,), (0, 1, 2)], 2))
    [[(0, (0, 1))], [(1, (0,))], [(2, (0, 1))], [(2, (2,))]]
    """
    batch: list[tuple[int, Sequence[int]]] = []
    for place, numbers in enumerate(samples):
        for first in range(0, len(numbers), size):
            part = numbers[first : first + size]
            if batch and sum(len(others) for _, others in batch) + len(part) > size:
                yield batch
                batch = []
            batch.append((place, part))
    if batch:
        yield batch


def _noise_key(prompt: Encoded, seed: int, number: int) -> int:
    hasher = hashlib.blake2b(repr((prompt.prompt_ids, seed, number)).encode(), digest_size=8)
    for image in prompt.images:
        hasher.update(image_key(image))
    return int.from_bytes(hasher.digest(), "little", signed=True)


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
