"""Pairs of text and of images for the tests."""

import functools

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

TEXTS = [
    "What is the sum of the numbers? 2 plus 3 is 5. Final answer: 5",
    "Which number is the largest, and which is the smallest? Final answer: 9",
    "The picture shows a cat on a chair, not a dog under a table.",  # seeds and tolerances depend on this text
]


def messages(text: str, role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def make_image(seed: int, width: int = 64, height: int = 32) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def completion_mask(batch) -> torch.Tensor:
    """Shape (2P, T): 1 for the labelled tokens of a batch of padded rows."""
    mask = torch.zeros_like(batch["input_ids"]).flatten()
    mask[batch.positions_to_keep.index + 1] = 1
    return mask.view_as(batch["input_ids"])


@functools.cache
def text_pairs(count: int) -> Dataset:
    """Pairs with completions of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt": messages(f"What is {i} plus {i}?", "user"),
                "chosen": messages(f"{i} plus {i} is {2 * i}." + " So it is." * (i % 2) + f" Final answer: {2 * i}", "assistant"),
                "rejected": messages(f"The answer is {i}" + " not" * (i % 3), "assistant"),
            }
            for i in range(count)
        ]
    )


@functools.cache
def image_pairs(count: int) -> Dataset:
    """Pairs with one image each, of one or two tiles."""
    rows = text_pairs(count).to_list()
    return Dataset.from_list([{**row, "images": [make_image(i, width=32 + 32 * (i % 2))]} for i, row in enumerate(rows)])


@functools.cache
def mixed_pairs(count: int) -> Dataset:
    """Pairs with one image and with none, in turn."""
    rows = image_pairs(count).to_list()
    return Dataset.from_list([{**row, "images": row["images"][: (i + 1) % 2]} for i, row in enumerate(rows)])


def perturbed(model: torch.nn.Module, scale: float = 0.05, seed: int = 1) -> torch.nn.Module:
    """The same model with noise on every weight, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def sum_completions(token_logps: torch.Tensor, loss_mask: torch.Tensor, ld_alpha: float | None = None) -> torch.Tensor:
    """Sum the log-probs of each row's labelled tokens, in float32.

    Args:
        token_logps: shape (rows, tokens), the log-prob of each token given those before it.
        loss_mask: shape (rows, tokens), nonzero where a token belongs to the completion. Rows are the chosen completions, then
            the rejected ones, in the same order.
        ld_alpha: LD-DPO's alpha in [0, 1] (arXiv 2409.06411): tokens beyond the length of the shorter completion of a pair
            have this weight. ``None``: all have weight 1.

    Returns:
        shape (rows,), float32.

    >>> token_logps = torch.tensor([[0.0, -1.0, -2.0, -4.0], [0.0, -8.0, 0.0, 0.0]])
    >>> loss_mask = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    >>> sum_completions(token_logps, loss_mask)
    tensor([-7., -8.])
    >>> sum_completions(token_logps, loss_mask, ld_alpha=0.5)
    tensor([-4., -8.])
    """
    weights = loss_mask.bool().float()
    if ld_alpha is not None:
        position = weights.cumsum(dim=1)
        chosen_lengths, rejected_lengths = weights.sum(dim=1).chunk(2)
        shared = torch.minimum(chosen_lengths, rejected_lengths).repeat(2).unsqueeze(1)
        weights = weights * torch.where(position <= shared, 1.0, ld_alpha)
    return (token_logps.float() * weights).sum(dim=1)
