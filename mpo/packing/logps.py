"""Token log-probs -> one sum per answer."""

import torch
from torch import Tensor


def sum_answers(token_logps: Tensor, scored: Tensor, ld_alpha: float | None = None) -> Tensor:
    """Sum the log-probs of each row's scored tokens, in float32.

    Args:
        token_logps: shape (rows, tokens), the log-prob of each token given those before it.
        scored: shape (rows, tokens), nonzero where a token belongs to the answer. Rows are the chosen answers, then the
            rejected ones, in the same order.
        ld_alpha: LD-DPO's alpha in [0, 1] (arXiv 2409.06411): tokens beyond the length of the shorter answer of a pair
            count with this weight. ``None``: all count fully.

    Returns:
        shape (rows,), float32.

    >>> token_logps = torch.tensor([[0.0, -1.0, -2.0, -4.0], [0.0, -8.0, 0.0, 0.0]])
    >>> scored = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0]])
    >>> sum_answers(token_logps, scored)
    tensor([-7., -8.])
    >>> sum_answers(token_logps, scored, ld_alpha=0.5)
    tensor([-4., -8.])
    """
    weights = scored.bool().float()
    if ld_alpha is not None:
        position = weights.cumsum(dim=1)
        chosen_lengths, rejected_lengths = weights.sum(dim=1).chunk(2)
        shared = torch.minimum(chosen_lengths, rejected_lengths).repeat(2).unsqueeze(1)
        weights = weights * torch.where(position <= shared, 1.0, ld_alpha)
    return (token_logps.float() * weights).sum(dim=1)
