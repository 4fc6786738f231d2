"""Generate text with a transformers model in this process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from mpo.batching.randomness import eval_mode
from mpo.data.images import open_image
from mpo.encoding.images import process
from mpo.encoding.tiles import tile_limits
from mpo.generation.generator import Question

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, ProcessorMixin


class LocalGenerator:
    """Sample responses from a transformers vision-language model, in left-padded batches.

    For InternVL a prompt and its images are computed once, whatever the number of responses: its key-value cache is copied
    for each of them. (`generate(num_return_sequences=n)` computes the prompt n times, and before transformers had
    `mm_encoder_outputs` for InternVL it mixed up the tiles of images with several tiles.) Other models repeat the prompt.

    Args:
        model: the model. It stays on its device, and its training mode is restored.
        processor: its processor.
        responses_per_batch: the largest number of responses generated in one batch.
        progress: label of the progress bar; None for no bar.
        tile_budget: whether the tile limit applies per prompt or per image, as in `MPOConfig`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        responses_per_batch: int = 64,
        progress: str | None = None,
        tile_budget: str = "prompt",
    ) -> None:
        if responses_per_batch < 1:
            raise ValueError(f"responses_per_batch must be 1 or more, not {responses_per_batch}.")
        self.model = model
        self.processor = processor
        self.responses_per_batch = responses_per_batch
        self.progress = progress
        self.tile_budget = tile_budget

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
        """Sample `n` responses to every question; see `mpo.generation.generator.Generator`.

        Args:
            questions: what to ask.
            n: responses per question; must be 1 at temperature 0, where all would be the same.
            temperature: 0 is greedy, 1 samples from the model's own distribution.
            max_new_tokens: the longest response, in tokens.
            seed: random seed of the sampling; the caller's random state is restored. Every batch draws from the seed and its
                own position, so responses also depend on `responses_per_batch`.
            top_k: sample from the `top_k` most likely tokens; 0 for all.
            top_p: sample from the smallest set of most likely tokens with this total probability.

        Returns:
            For each question, in order, its `n` responses without special tokens.

        Raises:
            ValueError: for invalid arguments, or an image that cannot be opened.
        """
        if n < 1 or temperature < 0 or max_new_tokens < 1:
            raise ValueError(
                f"n and max_new_tokens must be 1 or more and temperature 0 or more; got n={n}, max_new_tokens={max_new_tokens}, "
                f"temperature={temperature}."
            )
        if temperature == 0 and n > 1:
            raise ValueError(f"temperature=0 gives the same response {n} times, with n={n}. Set n=1, or a temperature above 0.")
        decoding = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if temperature > 0:
            decoding = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        questions_per_batch = max(1, self.responses_per_batch // n)
        responses: list[list[str]] = []
        with (
            _evaluating(self.model, seed) as seed_batch,
            tqdm(total=len(questions), desc=self.progress, disable=self.progress is None, unit="question") as bar,
        ):
            for first in range(0, len(questions), questions_per_batch):
                batch = questions[first : first + questions_per_batch]
                seed_batch(first)
                texts = self._respond(batch, n, max_new_tokens=max_new_tokens, **decoding)
                responses += [texts[i : i + n] for i in range(0, len(texts), n)]
                bar.update(len(batch))
        return responses

    def _respond(self, questions: Sequence[Question], n: int, **settings: Any) -> list[str]:
        shared = n > 1 and self.model.config.model_type == "internvl"
        if not shared:
            questions = [question for question in questions for _ in range(n)]
        inputs = self._encode(questions).to(self.model.device)
        if shared:
            prompts = self._prefill(inputs, n)
        else:
            prompts = {"input_ids": inputs.pop("input_ids"), **inputs}
        generated = self.model.generate(**prompts, **settings)
        new_tokens = generated[:, prompts["input_ids"].shape[1] :]
        return self.processor.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)

    def _encode(self, questions: Sequence[Question]) -> Any:
        prompts, images = [], []
        for question in questions:
            content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.text}]
            turn = [{"role": "user", "content": content}]
            prompts.append(self.processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))
            images.append([open_image(image) for image in question.images])
        options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        options["add_special_tokens"] = False  # the chat template writes them, as in training
        if not any(images):
            return self.processor(text=prompts, **options)
        limits = [tile_limits({}, len(own), self.processor, "a question", budget=self.tile_budget) for own in images]
        inputs, order = process(self.processor, text=prompts, images=images, limits=limits, **options)
        if order is not None:
            inputs["pixel_values"] = inputs["pixel_values"][order]
        return inputs

    def _prefill(self, inputs: dict[str, torch.Tensor], n: int) -> dict[str, Any]:
        """Compute each prompt without its last token once, and repeat the inputs and the cache `n` times for `generate`."""
        mask = inputs["attention_mask"]
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
        return {
            "input_ids": inputs["input_ids"].repeat_interleave(n, dim=0),
            "attention_mask": mask.repeat_interleave(n, dim=0),
            "past_key_values": cache,
        }


@contextmanager
def _evaluating(model: PreTrainedModel, seed: int) -> Iterator[Any]:
    """Eval mode, no gradients, a forked random state; yields a function that seeds it for the batch at a position."""
    cuda = [model.device] if model.device.type == "cuda" else []
    with eval_mode(model), torch.no_grad(), torch.random.fork_rng(devices=cuda):
        yield lambda position: torch.manual_seed(hash((seed, position)) & 0x7FFF_FFFF_FFFF_FFFF)
