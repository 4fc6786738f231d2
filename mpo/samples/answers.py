"""A model in training answers a few prompts, and is then exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from mpo.packing.encode import PairEncoder
from mpo.packing.randomness import eval_mode
from mpo.packing.turns import Record, end_of_turn_token


@dataclass(frozen=True)
class Answer:
    """An answer, its end left out, and what tells whether the model still works.

    Attributes:
        text: special tokens included, since a good answer has none.
        tokens: how many, the one that ends it included.
        finished: it ended by itself, not at the limit.
        repetition: the share of its 4-grams that stood before in it (`repeated_share`).
    """

    text: str
    tokens: int
    finished: bool
    repetition: float


def generate_answers(
    model: Any,
    processing_class: Any,
    records: Sequence[Record],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    tile_budget: str = "prompt",
    synced: bool = False,
) -> list[Answer]:
    """Answer the prompts of some records, as one batch; the prompts' tokens are those of training.

    Random numbers, training mode and weights are left as they were.

    Args:
        model: on its device, with its usual attention.
        processing_class: its processor, or tokenizer.
        records: what to ask; ``prompt``, ``images``, as in training. Answers, where they are there, are not looked at.
        max_new_tokens: the longest answer, in tokens.
        temperature: 0 is greedy. Penalties and limits on what may come next, which a checkpoint may ask for, are left out: they
            would hide what a model has learned to repeat.
        seed: of the sampling.
        tile_budget: as of `MPOConfig`.
        synced: the weights are in pieces on several ranks, all of which call this with the same arguments.
    """
    ends = _ends(model, processing_class)
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    inputs = _prompts(processing_class, records, pad, tile_budget)
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if temperature > 0:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if isinstance(model, FSDPModule) and is_peft_model(model):
        register_fsdp_forward_method(model, "generate")  # type: ignore[arg-type]  # or what stands outside of the layers would stay in pieces
    with _undisturbed(model, seed):
        rows = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            **choice,
            max_new_tokens=max_new_tokens,
            eos_token_id=ends,
            pad_token_id=pad,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            synced_gpus=synced,
        )
    return [_answer(row, tokenizer, ends) for row in rows[:, inputs["input_ids"].shape[1] :].tolist()]


def repeated_share(tokens: Sequence[int], size: int = 4) -> float:
    """The share of n-grams of `size` tokens that stood before in the same text; 0 for a text too short to have any.

    >>> repeated_share([7, 7, 7, 7, 7, 7, 7, 7])  # five 4-grams, all alike
    0.8
    >>> repeated_share([1, 2, 3, 4, 1, 2, 3, 5])
    0.0
    """
    grams = [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """What is logged of some answers: mean length in tokens, the share that did not end by itself, and mean repetition."""
    count = len(answers)
    return {
        "samples/length": sum(answer.tokens for answer in answers) / count,
        "samples/unfinished": sum(not answer.finished for answer in answers) / count,
        "samples/repetition": sum(answer.repetition for answer in answers) / count,
    }


def _ends(model: Any, processing_class: Any) -> list[int]:
    """Tokens that end an answer: the one that ends it in training first, then those of the checkpoint."""
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


def _answer(row: list[int], tokenizer: Any, ends: list[int]) -> Answer:
    end = next((place for place, token in enumerate(row) if token in ends), None)
    ids = row[:end]
    tokens = len(ids) if end is None else end + 1
    return Answer(tokenizer.decode(ids, skip_special_tokens=False), tokens, end is not None, repeated_share(ids))


@contextlib.contextmanager
def _undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode, no gradients, and random numbers of its own; after it every module and generator is as it was before."""
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
