"""PairLogps, the input of every loss, and PairLoss, the base class of every loss."""

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)  # == of tensors has no single truth value
class PairLogps:
    """Log-probabilities of pairs of completions, all of shape (pairs,).

    Args:
        chosen: log pi(y_c|x), summed over the tokens of the chosen completion; float32 (or float64).
        rejected: log pi(y_r|x), likewise.
        ref_chosen: log pi_0(y_c|x), under the reference; None if no loss needs one.
        ref_rejected: log pi_0(y_r|x), likewise.
        chosen_tokens: |y_c|, the number of summed tokens.
        rejected_tokens: |y_r|, likewise.
        weight: factor of each pair's loss in a `Mixture` (WPO, arXiv 2406.11827); None: all 1.
        sft_chosen: log pi(y_c|x) with all tokens at weight 1, if `chosen` has other weights (LD-DPO); None: `chosen`.
        mean_sqrt_tokens: scalar, the mean of sqrt(|y_c|) over the pairs of the whole optimiser step, for
            `SFT(average="square")`; None: over these pairs.

    Raises:
        ValueError: naming a field that is not a tensor, not of shape (pairs,), or not of the common dtype.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None
    ref_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    weight: Tensor | None = None
    sft_chosen: Tensor | None = None
    mean_sqrt_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and "None" in str(field.type):
                continue
            if not isinstance(value, Tensor):
                raise ValueError(f"PairLogps.{field.name} must be a tensor; got {type(value).__name__}.")
            scalar = field.name == "mean_sqrt_tokens"
            shape = () if scalar else (len(self),)
            if value.shape != shape:
                reason = "a scalar" if scalar else "one value per pair"
                raise ValueError(f"PairLogps.{field.name} must have shape {shape}, {reason}; got {tuple(value.shape)}.")
            if value.device != self.chosen.device:
                raise ValueError(
                    f"PairLogps.{field.name} must be on {self.chosen.device}, as `chosen`; got {value.device}. Move it there."
                )
            if field.name in ("chosen_tokens", "rejected_tokens"):
                if value.dtype == torch.bool or value.is_complex():
                    raise ValueError(f"PairLogps.{field.name} must be numbers of tokens; got {value.dtype}. Sum masks over tokens.")
                continue
            dtype = self.chosen.dtype
            if dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"PairLogps.chosen must be float32 (or float64); got {dtype}. Sum token log-probs in float32: in lower "
                    "precision the rounding error of a long completion's log-prob can exceed 1."
                )
            if value.dtype != dtype:
                expected = str(dtype).removeprefix("torch.")
                raise ValueError(f"PairLogps.{field.name} must be {expected}, as `chosen`; got {value.dtype}. Convert one.")
        if (self.ref_chosen is None) != (self.ref_rejected is None):
            missing = "ref_chosen" if self.ref_chosen is None else "ref_rejected"
            raise ValueError(f"PairLogps.{missing} is missing: give both reference log-probs or neither.")

    def __len__(self) -> int:
        if not isinstance(self.chosen, Tensor) or self.chosen.dim() != 1 or self.chosen.numel() == 0:
            raise ValueError(f"PairLogps.chosen must be a tensor of shape (pairs,) with at least one pair; got {self.chosen!r}.")
        return self.chosen.numel()

    def first(self, count: int) -> "PairLogps":
        """Select the first `count` pairs."""
        return replace(
            self,
            **{
                field.name: value[:count]
                for field in fields(self)
                if isinstance(value := getattr(self, field.name), Tensor) and value.dim()
            },
        )

    @property
    def reference(self) -> tuple[Tensor, Tensor]:
        """The reference's log-probs of the chosen and the rejected completions.

        Raises:
            ValueError: when there are none.
        """
        if self.ref_chosen is None or self.ref_rejected is None:
            raise ValueError("This loss needs reference log-probs, but PairLogps.ref_chosen and ref_rejected are None.")
        return self.ref_chosen, self.ref_rejected

    @property
    def chosen_logratio(self) -> Tensor:
        """Log pi(y_c|x) - log pi_0(y_c|x), shape (pairs,)."""
        return self.chosen - self.reference[0]

    @property
    def rejected_logratio(self) -> Tensor:
        """Log pi(y_r|x) - log pi_0(y_r|x), shape (pairs,)."""
        return self.rejected - self.reference[1]

    @property
    def chosen_length(self) -> Tensor:
        """|y_c| in the dtype of the log-probs, shape (pairs,); 1 for a completion truncated to no tokens, whose sum is 0."""
        return self.chosen_tokens.clamp(min=1).to(self.chosen.dtype)

    @property
    def rejected_length(self) -> Tensor:
        """|y_r|, likewise."""
        return self.rejected_tokens.clamp(min=1).to(self.rejected.dtype)

    @property
    def whole_chosen(self) -> Tensor:
        """Log pi(y_c|x) with all tokens at weight 1, shape (pairs,)."""
        return self.chosen if self.sft_chosen is None else self.sft_chosen


LOSSES: dict[str, type["PairLoss"]] = {}
"""All losses, by name: TRL's, ``cdpo`` and ``orpo``, and those of the user's own."""


SETTINGS = ("beta", "divergence", "label_smoothing", "tau", "reward_shift", "average")
"""What `Mixture.from_trl` can give the constructor of a loss."""


class PairLoss(nn.Module):
    """Base class of losses. Called on a `PairLogps` it returns one value per pair, shape (pairs,); their mean is the loss.

    Attributes:
        name: TRL's name, if TRL has the loss.
        needs_reference: whether it uses reference log-probs.
        scope: ``"pair"`` if a pair's value depends on that pair only; ``"batch"`` if the definition sorts or averages over the
            batch, so that splitting the batch changes the loss.
        takes: what its constructor gets from `Mixture.from_trl`, some of `SETTINGS`.
        takes_weight: whether each value belongs to one pair, so that `PairLogps.weight` can multiply it.

    A class with a name of its own is in `LOSSES`.

    Raises:
        ValueError: for a class with the name of another one, or one that is no text, and for `takes` that are none of `SETTINGS`.
    """

    name: ClassVar[str]
    needs_reference: ClassVar[bool] = True
    takes: ClassVar[tuple[str, ...]] = ()
    takes_weight: ClassVar[bool] = True
    scope: Literal["pair", "batch"] = "pair"

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if not isinstance(cls.takes, tuple) or {*cls.takes} - {*SETTINGS}:
            raise ValueError(
                f"Expected {cls.__qualname__}.takes to be a tuple of some of {', '.join(SETTINGS)}; got {cls.takes!r}."
            )
        if "name" in vars(cls):
            if not isinstance(cls.name, str) or not cls.name:
                raise ValueError(f"Expected {cls.__qualname__}.name to be a text; got {cls.name!r}.")
            known = LOSSES.setdefault(cls.name, cls)
            if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{cls.name!r} is the name of {known.__module__}.{known.__qualname__}. Give the loss another one.")
            LOSSES[cls.name] = cls  # defined again, as in a notebook

    def forward(self, pairs: PairLogps) -> Tensor:
        """Compute the loss of each pair, shape (pairs,)."""
        raise ValueError(f"{type(self).__qualname__} has no forward. Define one that returns the loss of each pair.")

    def extra_repr(self) -> str:
        """Format the hyper-parameters for `repr`."""
        plain = {name: value for name, value in vars(self).items() if isinstance(value, (int, float, str))}
        return ", ".join(f"{name}={value!r}" for name, value in plain.items() if not name.startswith("_") and name != "training")


class BetaLoss(PairLoss):
    """A loss with beta, the scale of the rewards r = beta (log pi(y|x) - log pi_0(y|x))."""

    takes: ClassVar[tuple[str, ...]] = ("beta",)

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = positive("beta", beta)

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """The rewards r_c and r_r, each of shape (pairs,)."""
        return self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio


def positive(name: str, value: float) -> float:
    """Return a parameter, after checking that it is above zero and finite."""
    if isinstance(value, (bool, str)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be above 0 and finite; got {value!r}.")
    return value
