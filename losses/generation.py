"""The generation loss L_g: the likelihood of the chosen completion."""

from typing import Literal

from torch import Tensor
from typing_extensions import override

from mpo.losses.pairs import PairLogps, PairLoss

AVERAGES = ("completion", "token", "square")


class SFT(PairLoss):
    """Negative log-likelihood of the chosen completion.

    Args:
        average: ``"completion"``: -log pi(y_c|x) / |y_c| of each pair (arXiv 2411.10442, equation 8);
            ``"token"``: the sum over the batch's chosen completions divided by the number of their tokens, the same value for
            every pair (TRL);
            ``"square"``: -log pi(y_c|x) / sqrt(|y_c|), divided by the mean of sqrt(|y_c|) over the pairs of the optimiser step
            (InternVL 2.5, arXiv 2412.05271, section on loss re-weighting).
    """

    name = "sft"
    needs_reference = False
    takes = ("average",)

    def __init__(self, average: str = "completion") -> None:
        super().__init__()
        if average not in AVERAGES:
            raise ValueError(f"Expected sft_average among {', '.join(AVERAGES)}; got {average!r}.")
        self.average = average
        self.scope: Literal["pair", "batch"] = "batch" if average == "token" else "pair"

    @override
    def forward(self, pairs: PairLogps) -> Tensor:
        nll, tokens = -pairs.whole_chosen, pairs.chosen_length
        if self.average == "token":
            return (nll.sum() / tokens.sum()).expand(len(pairs))
        if self.average == "square":
            mean = tokens.sqrt().mean() if pairs.mean_sqrt_tokens is None else pairs.mean_sqrt_tokens
            return nll / tokens.sqrt() / mean
        return nll / tokens
