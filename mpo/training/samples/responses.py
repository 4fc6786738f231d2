"""Generate responses from a model in training, without changing its state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from mpo.batching.randomness import eval_mode
from mpo.encoding.encoder import PairEncoder
from mpo.encoding.turns import Record, end_of_turn_token


@dataclass(frozen=True)
class Response:
    """A sampled response without its end token, and measures of degeneration.

    Attributes:
        text: with special tokens, which a good response does not contain.
        tokens: number of tokens, with the end token.
        finished: whether it ended before the token limit.
        repetition: the fraction of its 4-grams that occur earlier in it (`repeated_fraction`).
    """

    text: str
    tokens: int
    finished: bool
    repetition: float


def generate_responses(
    model: Any,
    processing_class: Any,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    tile_budget: str = "prompt",
    synced: bool = False,
) -> list[Response]:
    """Generate a response to the prompt of each record, as one batch; prompts are tokenized as in training.

    Random state, training mode and weights are unchanged.

    Args:
        model: on its device, with its usual attention.
        processing_class: its processor, or tokenizer.
        records: with ``prompt`` and ``images`` as in training. Their completions are ignored.
        max_new_tokens: the longest response, in tokens.
        temperature: 0 is greedy. Repetition penalties of the checkpoint's generation config are disabled: they would hide
            what the model has learned to repeat.
        seed: random seed of the sampling.
        tile_budget: as in `MPOConfig`.
        synced: the weights are sharded over several ranks, all of which call this with the same arguments.
    """
    ends = _ends(model, processing_class)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    inputs = _prompts(processing_class, records, pad, tile_budget)
    decoding: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        decoding = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if isinstance(model, FSDPModule) and is_peft_model(model):
        # Without it, weights outside the layers would stay sharded.
        register_fsdp_forward_method(model, "generate")  # type: ignore[arg-type]
    with _isolated(model, seed):
        rows = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            **decoding,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            synced_gpus=synced,
        )
    return [_response(row, tokenizer, ends) for row in rows[:, inputs["input_ids"].shape[1] :].tolist()]


def repeated_fraction(tokens: Sequence[int], size: int = 4) -> float:
    """The fraction of n-grams of `size` tokens that occur earlier in the same text; 0 for a text shorter than `size`.

    >>> repeated_fraction([7, 7, 7, 7, 7, 7, 7, 7])  # five equal 4-grams
    0.8
    >>> repeated_fraction([1, 2, 3, 4, 1, 2, 3, 5])
    0.0
    """
    grams = [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(responses: Sequence[Response]) -> dict[str, float]:
    """The logged numbers of some responses: mean length in tokens, fraction of truncated ones, and mean repetition."""
    count = len(responses)
    return {
        "samples/length": sum(response.tokens for response in responses) / count,
        "samples/unfinished": sum(not response.finished for response in responses) / count,
        "samples/repetition": sum(response.repetition for response in responses) / count,
    }


def _ends(model: Any, processing_class: Any) -> list[int]:
    """Tokens that end a response: the end-of-turn token of training first, then those of the checkpoint."""
    of_checkpoint = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    several = of_checkpoint if isinstance(of_checkpoint, list) else [of_checkpoint]
    return [int(end) for end in dict.fromkeys([end_of_turn_token(processing_class), *several]) if end is not None]


def _prompts(processing_class: Any, records: Sequence[Record], pad: int, tile_budget: str) -> dict[str, Tensor]:
    """Left-padded prompts and their images."""
    prompts, images, order = PairEncoder(processing_class, tile_budget=tile_budget).prompts(records)
    if order is not None:
        images["pixel_values"] = images["pixel_values"][order]
    width = max(len(ids) for ids, _ in prompts)

    def padded(rows: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([[fill] * (width - len(row)) + row for row in rows])

    inputs = {
        "input_ids": padded([ids for ids, _ in prompts], pad),
        "attention_mask": padded([[1] * len(ids) for ids, _ in prompts], 0),
    }
    for name in {name for _, extra in prompts for name in extra}:
        inputs[name] = padded([extra[name].tolist() if name in extra else [0] * len(ids) for ids, extra in prompts], 0)
    return inputs | images


def _response(row: list[int], tokenizer: Any, ends: list[int]) -> Response:
    end = next((place for place, token in enumerate(row) if token in ends), None)
    ids = row[:end]
    tokens = len(ids) if end is None else end + 1
    return Response(tokenizer.decode(ids, skip_special_tokens=False), tokens, end is not None, repeated_fraction(ids))


@contextlib.contextmanager
def _isolated(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode, no gradients and a forked random state; all are restored on exit."""
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
