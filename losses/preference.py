"""Preference losses L_p: the chosen completion relative to the rejected one.

Symbols: u_c = log pi(y_c|x) - log pi_0(y_c|x) and u_r likewise are the log-ratios of policy and reference; s = f(u) their scores
under an f-divergence (s = u by default); m = beta (s_c - s_r) the margin; sigma the logistic function; eps the label smoothing.
Losses of both rewards r_c and r_r (`BetaLoss`), not only of their difference, are not defined for other f-divergences.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from mpo.losses.divergence import Divergence
from mpo.losses.pairs import BetaLoss, PairLogps, PairLoss, positive

REVERSE_KL = Divergence()


class _Margin(BetaLoss):
    """A loss of the margin m = beta (s_c - s_r)."""

    takes: ClassVar[tuple[str, ...]] = ("beta", "divergence")

    def __init__(self, beta: float = 0.1, divergence: Divergence = REVERSE_KL) -> None:
        super().__init__(beta)
        self.divergence = divergence

    def margin(self, pairs: PairLogps) -> Tensor:
        """Shape (pairs,)."""
        return self.beta * (self.divergence(pairs.chosen_logratio) - self.divergence(pairs.rejected_logratio))


class _SmoothedMargin(_Margin):
    """A loss of the margin with label smoothing eps: the assumed fraction of pairs with a flipped label."""

    takes = ("beta", "divergence", "label_smoothing")
    smoothing_range = "[0, 0.5)"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, divergence: Divergence = REVERSE_KL) -> None:
        super().__init__(beta, divergence)
        self.label_smoothing = _smoothing(self, label_smoothing)


class DPO(_Margin):
    """Direct Preference Optimization: -log sigma(m). arXiv 2305.18290, equation 7."""

    name = "sigmoid"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        return -F.logsigmoid(self.margin(pairs))


class Hinge(_Margin):
    """Hinge loss of SLiC (arXiv 2305.10425), as RSO uses it (arXiv 2309.06657): max(0, 1 - m)."""

    name = "hinge"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        return torch.relu(1 - self.margin(pairs))


class CDPO(_SmoothedMargin):
    """Conservative DPO: -(1-eps) log sigma(m) - eps log sigma(-m).

    E. Mitchell, "A note on DPO with noisy preferences & relationship to IPO", 2023.
    """

    name = "cdpo"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        return _smoothed(self.margin(pairs), self.label_smoothing)


class RobustDPO(_SmoothedMargin):
    """Provably robust DPO: (-(1-eps) log sigma(m) + eps log sigma(-m)) / (1 - 2 eps). arXiv 2403.00409."""

    name = "robust"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        margin, eps = self.margin(pairs), self.label_smoothing
        return (eps * F.logsigmoid(-margin) - (1 - eps) * F.logsigmoid(margin)) / (1 - 2 * eps)


class EXO(_SmoothedMargin):
    """Efficient Exact Optimization with two completions: KL(p || q), arXiv 2402.00856, equation 16.

    p = (sigma(m), sigma(-m)) is the policy's preference and q = (1-eps, eps) the label's; eps > 0, in the paper 1e-3.
    """

    name = "exo_pair"
    smoothing_range = "(0, 0.5)"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: Divergence = REVERSE_KL) -> None:
        super().__init__(beta, label_smoothing, divergence)

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        margin, eps = self.margin(pairs), self.label_smoothing
        log_p_chosen, log_p_rejected = F.logsigmoid(margin), F.logsigmoid(-margin)
        return margin.sigmoid() * (log_p_chosen - math.log1p(-eps)) + (-margin).sigmoid() * (log_p_rejected - math.log(eps))


class DiscoPOP(_Margin):
    """Discovered preference optimization: a blend of logistic and exponential loss. arXiv 2406.08414, equation 5.

    (1 - w) (-log sigma(m)) + w e^-m with w = sigma(m / tau).
    """

    name = "discopop"
    takes = ("beta", "divergence", "tau")

    def __init__(self, beta: float = 0.1, tau: float = 0.05, divergence: Divergence = REVERSE_KL) -> None:
        super().__init__(beta, divergence)
        self.tau = positive("discopop_tau", tau)

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        margin = self.margin(pairs)
        # w e^-m as one exponential: for very negative m, w is 0 and e^-m infinite, and 0 * inf is NaN.
        exponential = torch.exp(F.logsigmoid(margin / self.tau) - margin)
        return exponential - (-margin / self.tau).sigmoid() * F.logsigmoid(margin)


class _PerToken(_Margin):
    """A loss of scores per token: s_c / |y_c| - s_r / |y_r|."""

    def per_token_difference(self, pairs: PairLogps) -> Tensor:
        """Shape (pairs,)."""
        chosen = self.divergence(pairs.chosen_logratio) / pairs.chosen_length
        return chosen - self.divergence(pairs.rejected_logratio) / pairs.rejected_length


class IPO(_PerToken):
    """Identity Preference Optimization: (s_c/|y_c| - s_r/|y_r| - 1/(2 beta))^2. arXiv 2310.12036, equation 17.

    Log-ratios are averaged over tokens, as in its authors' experiments.
    """

    name = "ipo"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        return (self.per_token_difference(pairs) - 1 / (2 * self.beta)).square()


class SigmoidNorm(_PerToken):
    """Length-normalised DPO: -log sigma(beta (s_c/|y_c| - s_r/|y_r|)). Tulu 3, arXiv 2411.15124."""

    name = "sigmoid_norm"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        return -F.logsigmoid(self.beta * self.per_token_difference(pairs))


class NCA(BetaLoss):
    """Noise contrastive alignment of pairs: -log sigma(r_c) - (log sigma(-r_c) + log sigma(-r_r)) / 2. arXiv 2402.05369."""

    name = "nca_pair"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


class SPPO(BetaLoss):
    """Self-play preference optimization, hard labels: (u_c - 1/(2 beta))^2 + (u_r + 1/(2 beta))^2. arXiv 2405.00675, eq. 4.7."""

    name = "sppo_hard"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        target = 1 / (2 * self.beta)
        return (pairs.chosen_logratio - target).square() + (pairs.rejected_logratio + target).square()


class APOZero(BetaLoss):
    """Anchored preference optimization, chosen up and rejected down: 1 - sigma(r_c) + sigma(r_r). arXiv 2408.06266, equation 7."""

    name = "apo_zero"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return (-chosen).sigmoid() + rejected.sigmoid()


class APODown(BetaLoss):
    """Anchored preference optimization, both down: sigma(r_c) + 1 - sigma(r_c - r_r). arXiv 2408.06266, equation 8."""

    name = "apo_down"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return chosen.sigmoid() + (rejected - chosen).sigmoid()


class _Sorted(BetaLoss):
    """Smoothed DPO on the difference of two sorted samples (optimal transport in one dimension). arXiv 2406.05882.

    Values are by rank, not by pair.
    """

    scope = "batch"
    takes = ("beta", "label_smoothing")
    takes_weight = False
    smoothing_range = "[0, 0.5)"

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__(beta)
        self.label_smoothing = _smoothing(self, label_smoothing)

    def of_sorted(self, upper: Tensor, lower: Tensor) -> Tensor:
        """Loss of the sorted samples, by rank, shape (pairs,)."""
        return _smoothed(self.beta * (upper.sort().values - lower.sort().values), self.label_smoothing)


class AOT(_Sorted):
    """Alignment via Optimal Transport, paired: sorts log pi_c - log pi_r of the policy against the reference's."""

    name = "aot"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        ref_chosen, ref_rejected = pairs.reference
        return self.of_sorted(pairs.chosen - pairs.rejected, ref_chosen - ref_rejected)


class AOTUnpaired(_Sorted):
    """Alignment via Optimal Transport, unpaired: sorts u_c against u_r."""

    name = "aot_unpaired"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        return self.of_sorted(pairs.chosen_logratio, pairs.rejected_logratio)


class ORPO(BetaLoss):
    """Odds-ratio loss: -beta log sigma(log odds_c - log odds_r). arXiv 2403.07691, equation 7; needs no reference.

    odds = p / (1 - p) with p = pi(y|x)^(1/|y|); beta is the paper's lambda. Its L_SFT is `SFT` in the mixture.
    """

    name = "orpo"
    needs_reference = False

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        chosen = _log_odds(pairs.chosen / pairs.chosen_length)
        return -self.beta * F.logsigmoid(chosen - _log_odds(pairs.rejected / pairs.rejected_length))


def _log_odds(logp: Tensor) -> Tensor:
    # 1 - e^logp is 0 where the model is certain; the clamp keeps its logarithm finite.
    return logp - torch.log(-torch.expm1(logp.clamp(max=-1e-7)))


def _smoothed(margin: Tensor, eps: float) -> Tensor:
    return -(1 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)


def _smoothing(loss: PairLoss, eps: float) -> float:
    allowed = getattr(loss, "smoothing_range")  # noqa: B009
    if not 0 <= eps < 0.5 or (eps == 0 and allowed.startswith("(")):
        raise ValueError(f"label_smoothing of {loss.name!r} must be in {allowed}; got {eps}.")
    return eps
