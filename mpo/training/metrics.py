"""Logged metrics: sums of micro-batches, added up over a logging window on the device and read with one transfer."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpo.batching.batch import Batch
from mpo.losses import PairLogps

Fraction = tuple[Tensor | float, Tensor | float]
"""A sum and its denominator: a number of pairs or tokens."""
OverRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


class Meter:
    """Add up fractions until they are read.

    >>> meter = Meter()
    >>> meter.add({"loss": (torch.tensor(6.0), 2)})
    >>> meter.add({"loss": (torch.tensor(1.0), 1)})
    >>> meter.read()
    {'loss': (7.0, 3.0)}
    >>> meter.read()
    {}
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Drop everything added, and restart the clock."""
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._started = time.perf_counter()
        self.waited = 0.0

    def add(self, fractions: Mapping[str, Fraction]) -> None:
        """Add to the window. The same names must come at every call between two reads."""
        names = list(fractions)
        device = next((n.device for n, _ in fractions.values() if isinstance(n, Tensor)), torch.device("cpu"))
        dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64
        flat = [torch.as_tensor(part, device=device).detach().to(dtype) for pair in fractions.values() for part in pair]
        sums = torch.stack(flat).view(-1, 2)
        if self._sums is None:
            self._names, self._sums = names, sums
        else:
            assert names == self._names, f"{names} added to a window of {self._names}"
            self._sums = self._sums.to(sums.device) + sums

    def state(self, over_ranks: OverRanks | None = None) -> dict[str, Any]:
        """Return the current window over all ranks as plain numbers, for a checkpoint. Every rank must call it."""
        return {"seconds": self.seconds, "waited": self.waited, "sums": self._read(over_ranks)}

    def _read(self, over_ranks: OverRanks | None) -> dict[str, Any]:
        if self._sums is None:
            return {}
        return dict(zip(self._names, (over_ranks(self._sums) if over_ranks else self._sums).tolist(), strict=True))

    def restore(self, state: Mapping[str, Any], share: float = 1.0) -> None:
        """Continue with a window that `state` returned.

        Args:
            state: the window of all ranks.
            share: factor of the sums on this rank: 1 on one rank and 0 on the others. All ranks must have a window, or none, since
                reading it waits for every rank.
        """
        self.clear()
        self.pause(-state["seconds"])
        self.waited = state["waited"]
        if state["sums"]:
            self._names = list(state["sums"])
            self._sums = torch.tensor(list(state["sums"].values()), dtype=torch.float64)
            self._sums = self._sums if share else torch.zeros_like(self._sums)

    def read(self, over_ranks: OverRanks | None = None) -> dict[str, tuple[float, float]]:
        """Return sum and count of everything added since the last read, over all ranks, and open a new window."""
        window = {name: (total, count) for name, (total, count) in self._read(over_ranks).items()}
        self.clear()
        return window

    @property
    def seconds(self) -> float:
        """Seconds since the window was opened, without pauses."""
        return time.perf_counter() - self._started

    def wait(self, seconds: float) -> None:
        """Add time that was spent waiting for data. It stays part of the window."""
        self.waited += seconds

    def pause(self, seconds: float) -> None:
        """Exclude time spent on something else, such as evaluating or saving."""
        self._started += seconds


def measured(
    loss: Tensor,
    terms: Mapping[str, Tensor],
    pairs: PairLogps,
    outputs: Any,
    batch: Batch,
    *,
    beta: float,
    counted: int,
    square_weight: float | None = None,
) -> dict[str, Fraction]:
    """Compute sums and counts of one micro-batch, by the names they are logged under.

    Args:
        loss: the mean over `pairs`, shape ().
        terms: the mean of each term of the loss, unweighted.
        pairs: log-probs of the pairs that count.
        outputs: values of TRL's fused head, each of shape (1, labelled positions).
        beta: scale of the rewards.
        counted: number of pairs that count. With 0, `pairs` holds one pair for its shapes, and all sums are 0.
        square_weight: weight of an SFT term that is averaged by square roots over the whole window. It is left out of ``loss``,
            and its sum is divided by the sum of the square roots.
    """
    count = len(pairs)
    result: dict[str, Fraction] = {"loss": (loss * count, count)}
    result |= {f"loss/{name}": (value * count, count) for name, value in terms.items()}
    if square_weight is not None:  # the term is the sum of nll / sqrt(n) over the sum of sqrt(n), of this batch
        roots = pairs.chosen_length.sqrt().sum()
        result |= {"loss": ((loss - square_weight * terms["sft"]) * count, count), "loss/sft": (terms["sft"] * roots, roots)}
    if pairs.ref_chosen is not None:
        chosen, rejected = beta * pairs.chosen_logratio, beta * pairs.rejected_logratio
        result |= {
            "rewards/chosen": (chosen.sum(), count),
            "rewards/rejected": (rejected.sum(), count),
            "rewards/margins": ((chosen - rejected).sum(), count),
            "rewards/accuracies": ((chosen > rejected).sum(), count),
        }

    def sums(values: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = batch.sums(values.detach().float())[:, :count]
        return chosen.sum(), rejected.sum()

    chosen_logits, rejected_logits = sums(outputs.mean_logits)
    chosen_tokens, rejected_tokens = pairs.chosen_tokens.sum(), pairs.rejected_tokens.sum()
    result |= {
        "logps/chosen": (pairs.chosen.sum(), count),
        "logps/rejected": (pairs.rejected.sum(), count),
        "completion_tokens/chosen": (chosen_tokens, count),
        "completion_tokens/rejected": (rejected_tokens, count),
        "logits/chosen": (chosen_logits, chosen_tokens),
        "logits/rejected": (rejected_logits, rejected_tokens),
        "mean_token_accuracy": (sums(outputs.is_top1)[0], chosen_tokens),
        "entropy": (sum(sums(outputs.entropy)), chosen_tokens + rejected_tokens),
        "tokens": (float(batch.tokens), count),
    }
    if batch.is_truncated is not None:
        result["completions_truncated"] = (batch.by_side(batch.is_truncated)[:, :count].sum(), 2 * count)
    if getattr(outputs, "aux_loss", None) is not None:
        result["aux_loss"] = (outputs.aux_loss * count, count)
    return result if counted else {name: (0.0, 0.0) for name in result}
