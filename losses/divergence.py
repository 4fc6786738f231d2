"""The f-divergence between policy and reference (f-DPO, arXiv 2309.16240)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_LARGEST_EXPONENT = 80.0  # exp of a larger one overflows float32


@dataclass(frozen=True)
class Divergence:
    """Map a log-ratio u = log pi/pi_0 to the score f'(pi/pi_0); losses with a divergence use differences of scores.

    reverse_kl: u (DPO itself). forward_kl: 1 - e^-u. js_divergence: log 2 + log sigmoid(u).
    alpha_divergence: (e^((alpha-1) u) - 1) / (alpha - 1), which is u for alpha = 1.

    Args:
        kind: one of `DIVERGENCES`.
        alpha: parameter of the alpha divergence.

    >>> Divergence()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    kind: str = "reverse_kl"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"Expected f_divergence_type among {', '.join(DIVERGENCES)}; got {self.kind!r}.")
        if not math.isfinite(self.alpha):
            raise ValueError(f"f_alpha_divergence_coef must be finite; got {self.alpha}.")

    def __call__(self, logratio: Tensor) -> Tensor:
        """Scores of log-ratios, of the same shape."""
        if self.kind == "forward_kl":
            return 1 - torch.exp(-logratio)
        if self.kind == "js_divergence":
            return math.log(2) + F.logsigmoid(logratio)
        if self.kind == "alpha_divergence" and abs(self.alpha - 1) >= 1e-6:
            exponent = ((self.alpha - 1) * logratio).clamp(max=_LARGEST_EXPONENT)
            return torch.expm1(exponent) / (self.alpha - 1)
        return logratio
