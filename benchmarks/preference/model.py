"""A small InternVL with its pixels in memory: log-probs of each token, and sampling, without a data loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

Row = tuple[int, Sequence[int], Sequence[int]]
"""(number of the image, prompt tokens, completion tokens with the end of the turn)."""


class Pixels:
    """Tiles of the images of a split, shape (images, tiles, 3, height, width), and the prompts of its questions, in tokens."""

    def __init__(self, processor: Any, lines: Sequence[dict[str, Any]], questions: Sequence[str]) -> None:
        found = processor.image_processor(images=[line["image"] for line in lines], return_tensors="pt")["pixel_values"]
        self.tiles = found.view(len(lines), -1, *found.shape[1:])
        self.prompts = [prompt_tokens(processor, lines[0]["image"], question) for question in questions]
        self.lines = lines
        self.features: Tensor | None = None

    def freeze(self, model: Any) -> None:
        """Compute the features of all images once: the vision tower does not change any more."""
        with torch.no_grad():
            self.features = self.of(model, torch.arange(len(self)))

    def of(self, model: Any, images: Tensor) -> Tensor:
        """Features of images, shape (images, image tokens, width)."""
        if self.features is not None:
            return self.features[images]
        found = model.model.get_image_features(pixel_values=self.tiles[images].flatten(0, 1), return_dict=True).pooler_output
        return found.reshape(len(images), -1, found.shape[-1])

    def __len__(self) -> int:
        return len(self.lines)


def prompt_tokens(processor: Any, image: Any, question: str) -> list[int]:
    """Tokens of the prompt of a question about an image."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False)
    return processor(images=[image], text=[text], return_tensors="pt")["input_ids"][0].tolist()


def token_logps(model: Any, pixels: Pixels, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Log-probs of completion tokens.

    Args:
        model: an InternVL.
        pixels: the images.
        rows: rows; an image of several rows is encoded once.

    Returns:
        log-probs and mask, both of shape (rows, tokens of the longest completion).
    """
    images, inverse = torch.unique(torch.tensor([row[0] for row in rows]), return_inverse=True)
    features = pixels.of(model, images)[inverse]
    ids = pad_sequence([torch.tensor([*row[1], *row[2]]) for row in rows], batch_first=True)
    embedded = model.get_input_embeddings()(ids)
    in_prompt = torch.arange(ids.shape[1]) < torch.tensor([len(row[1]) for row in rows]).unsqueeze(1)  # a sample may have any token
    places = ((ids == model.config.image_token_id) & in_prompt).unsqueeze(-1)
    hidden = model.model.language_model(
        inputs_embeds=embedded.masked_scatter(places, features),
        use_cache=False,  # padding is on the right
    ).last_hidden_state
    lengths = [len(row[2]) for row in rows]
    starts = torch.tensor([len(row[1]) - 1 for row in rows]).unsqueeze(1)
    steps = torch.arange(max(lengths)).unsqueeze(0)
    mask = steps < torch.tensor(lengths).unsqueeze(1)
    index = (starts + steps).clamp(max=ids.shape[1] - 2)
    picked = hidden.gather(1, index.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
    targets = ids.gather(1, index + 1)
    logps = log_softmax(model.lm_head(picked).float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return logps * mask, mask


@torch.no_grad()
def sample(
    model: Any,
    pixels: Pixels,
    images: Sequence[int],
    *,
    n: int,
    temperature: float,
    seed: int,
    end: int,
    limit: int,
    batch: int = 600,
) -> list[list[list[int]]]:
    """Sample responses to the questions of images.

    Args:
        model: an InternVL.
        pixels: the images, with their questions.
        images: numbers of images.
        n: responses of each.
        temperature: temperature; 0: greedy.
        seed: random seed.
        end: the token that ends a turn.
        limit: longest response, in tokens.
        batch: responses in a batch.

    Returns:
        for each image, n responses in tokens, with the end of the turn where it was reached.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, list[list[int]]] = {}
    by_kind: dict[int, list[int]] = {}
    for image in images:
        by_kind.setdefault(pixels.lines[image]["kind"], []).append(image)
    for kind, members in by_kind.items():
        size = max(1, batch // n)
        for start in range(0, len(members), size):
            some = members[start : start + size]
            features = pixels.of(model, torch.tensor(some))
            ids = torch.tensor(pixels.prompts[kind]).expand(len(some), -1)
            embedded = model.get_input_embeddings()(ids)
            places = (ids == model.config.image_token_id).unsqueeze(-1)
            embedded = embedded.masked_scatter(places, features)
            cache = DynamicCache(config=model.config.text_config)
            hidden = model.model.language_model(inputs_embeds=embedded, cache=cache, use_cache=True).last_hidden_state
            logits = model.lm_head(hidden[:, -1]).repeat_interleave(n, 0)
            cache.batch_repeat_interleave(n)
            sampled, live = [], torch.ones(len(logits), dtype=torch.bool)
            for _ in range(limit):
                if temperature:
                    token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).squeeze(1)
                else:
                    token = logits.argmax(-1)
                sampled.append(torch.where(live, token, -1))
                live = live & (token != end)
                if not live.any():
                    break
                hidden = model.model.language_model(
                    inputs_embeds=model.get_input_embeddings()(token).unsqueeze(1), cache=cache, use_cache=True
                ).last_hidden_state
                logits = model.lm_head(hidden[:, -1])
            rows = torch.stack(sampled, 1).tolist()
            responses = [[token for token in row if token >= 0] for row in rows]
            for place, image in enumerate(some):
                found[image] = responses[place * n : (place + 1) * n]
    return [found[image] for image in images]
