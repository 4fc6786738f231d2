"""Quality loss L_q: classify each completion on its own as good or bad.

Symbols: r_c = beta (log pi(y_c|x) - log pi_0(y_c|x)) and r_r likewise are the rewards; delta is the reward shift.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from mpo.losses.pairs import BetaLoss, PairLogps

REWARD_SHIFTS = ("running_mean", "none")


class RewardShift(nn.Module):
    """delta: the mean of all rewards seen in training so far, including the current ones; 0 before the first.

    A cumulative mean over the detached rewards of every pair (r_c and r_r alike) on every rank, as in the official trainer of
    arXiv 2411.10442, but weighted by pairs. It is the same on all ranks. Sum and count are float64 buffers, so `state_dict`
    stores delta exactly. It is updated in training mode only, where every rank must call it equally often.

    >>> shift = RewardShift()
    >>> [shift(torch.tensor([reward])).item() for reward in (1.0, 3.0, 5.0)]
    [1.0, 2.0, 3.0]
    >>> shift.eval()(torch.tensor([100.0])).item()
    3.0
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @property
    def value(self) -> Tensor:
        """The current delta, a float64 scalar."""
        return self.total / self.count.clamp(min=1)

    def forward(self, rewards: Tensor) -> Tensor:
        """Return delta in the dtype of the rewards (any shape), in training mode after adding them to the mean."""
        if self.training:
            seen = rewards.detach().to(self.total.dtype)
            update = torch.stack([seen.sum(), torch.ones_like(seen).sum()])
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(update)
            self.total += update[0]
            self.count += update[1]
        return self.value.to(rewards.dtype)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Move to a device, but keep float64: `.to(bfloat16)` or `.half()` would round delta."""
        device = fn(torch.zeros((), device=self.total.device)).device  # the same device for a cast
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        self.total, self.count = self.total.to(device, dtype), self.count.to(device, dtype)
        return self


class BCO(BetaLoss):
    """Binary classifier optimization: -log sigma(r_c - delta) - log sigma(-(r_r - delta)).

    arXiv 2404.04656; arXiv 2411.10442, equations 5 to 7.

    Args:
        beta: scale of the rewards.
        reward_shift: ``"running_mean"`` for delta of `RewardShift`; ``"none"`` for delta = 0, as in TRL since 0.29.
    """

    name = "bco_pair"
    takes = ("beta", "reward_shift")

    def __init__(self, beta: float = 0.1, reward_shift: str = "running_mean") -> None:
        super().__init__(beta)
        if reward_shift not in REWARD_SHIFTS:
            raise ValueError(f"Expected reward_shift among {', '.join(REWARD_SHIFTS)}; got {reward_shift!r}.")
        self.shift = RewardShift() if reward_shift == "running_mean" else None

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        """Compute the loss of each pair, shape (pairs,); in training mode, delta is updated first."""
        chosen, rejected = self.rewards(pairs)
        delta = 0.0 if self.shift is None else self.shift(torch.cat([chosen, rejected]))
        return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)
