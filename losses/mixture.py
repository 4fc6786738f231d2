"""Mixture: a weighted sum of losses that reports every term."""

import difflib
import inspect
import math
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpo.losses.divergence import Divergence
from mpo.losses.generation import SFT
from mpo.losses.pairs import LOSSES, PairLogps, PairLoss
from mpo.losses.quality import BCO, RewardShift


@dataclass(frozen=True)
class MixtureOutput:
    """The result of a mixture.

    Attributes:
        loss: scalar, the weighted sum of the terms.
        terms: each loss's name and its unweighted mean over the pairs, a detached scalar.
        per_pair: shape (pairs,), the weighted sum of the losses' values; its mean is `loss`.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    per_pair: Tensor


class Mixture(nn.Module):
    """A weighted sum of losses.

    >>> from mpo.losses import BCO, DPO, SFT
    >>> mixture = Mixture([(0.8, DPO(beta=0.1)), (0.2, BCO(beta=0.1)), (1.0, SFT())])
    >>> mixture
    Mixture(0.8 sigmoid + 0.2 bco_pair + 1 sft)
    >>> sums, tokens = torch.tensor([-8.0]), torch.tensor([4.0])
    >>> output = mixture(PairLogps(sums, sums, sums, sums, tokens, tokens))
    >>> round(output.loss.item(), 4)  # 0.8 ln 2 + 0.2 * 2 ln 2 + 8 / 4
    2.8318

    Args:
        weighted_losses: weights and losses.

    Raises:
        ValueError: for no losses, two losses of the same name, and weights that are negative, not finite or all zero.
    """

    def __init__(self, weighted_losses: Sequence[tuple[float, PairLoss]]) -> None:
        super().__init__()
        if not weighted_losses:
            raise ValueError("A mixture needs at least one loss; got none.")
        for weight, loss in weighted_losses:
            if not isinstance(weight, (int, float)) or not isinstance(loss, PairLoss):
                raise ValueError(f"Expected (weight, loss) with a number and a PairLoss; got ({weight!r}, {loss!r}).")
            if not hasattr(loss, "name"):
                raise ValueError(f"{type(loss).__qualname__} has no name. Give the class one, under which its values are reported.")
        self.weights = [float(weight) for weight, _ in weighted_losses]
        self.losses = nn.ModuleList([loss for _, loss in weighted_losses])
        names = self.names
        for name, weight in zip(names, self.weights, strict=True):
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"The weight of {name!r} must be 0 or more and finite; got {weight}.")
            if names.count(name) > 1:
                raise ValueError(f"The loss {name!r} is in the mixture twice. Give it once, with the sum of the weights.")
        if not any(self.weights):
            raise ValueError(f"All weights are 0, so there is nothing to train: {', '.join(names)}.")

    @classmethod
    def from_trl(
        cls,
        loss_type: str | Sequence[str],
        loss_weights: Sequence[float] | None = None,
        *,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        f_divergence_type: str = "reverse_kl",
        f_alpha_divergence_coef: float = 0.5,
        discopop_tau: float = 0.05,
        reward_shift: str = "running_mean",
        sft_average: str = "completion",
    ) -> "Mixture":
        """Create a mixture from the arguments of TRL's DPOConfig.

        Args:
            loss_type: names, see `LOSSES`, or where a loss of one's own is, such as ``my_losses.SimPO``.
            loss_weights: one weight per loss; 1.0 each by default.
            beta: beta of all losses with this parameter.
            label_smoothing: label smoothing of all losses with this parameter.
            f_divergence_type: divergence of all losses that use differences of scores.
            f_alpha_divergence_coef: alpha of the alpha divergence.
            discopop_tau: tau of DiscoPOP.
            reward_shift: reward shift of BCO.
            sft_average: average of SFT.

        Raises:
            ValueError: for unknown names (with the closest valid one), a wrong number of weights, and settings that have no effect
                on the mixture's losses.
        """
        names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        weights = [1.0] * len(names) if loss_weights is None else list(loss_weights)
        if len(weights) != len(names):
            raise ValueError(f"loss_weights has {len(weights)} numbers for the {len(names)} losses {names}. Give one per loss.")
        settings = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "divergence": Divergence(f_divergence_type, f_alpha_divergence_coef),
            "tau": discopop_tau,
            "reward_shift": reward_shift,
            "average": sft_average,
        }
        kinds = [_kind_of(name) for name in names]
        if label_smoothing and not any("label_smoothing" in kind.takes for kind in kinds):
            having = [name for name, kind in LOSSES.items() if "label_smoothing" in kind.takes]
            raise ValueError(
                f"label_smoothing={label_smoothing} has no effect on {', '.join(names)}. The losses that have it are "
                f"{', '.join(having)}; DPO with label smoothing is 'cdpo'."
            )
        if f_divergence_type != "reverse_kl":
            for kind in kinds:
                if "divergence" not in kind.takes and kind is not SFT:  # TRL allows one beside SFT, on which it has no effect
                    raise ValueError(
                        f"f_divergence_type={f_divergence_type!r} is not defined for {kind.name!r}: the divergence's normaliser "
                        "cancels only in differences of scores. Use 'reverse_kl'."
                    )
            if names == ["sft"]:
                raise ValueError(f"f_divergence_type={f_divergence_type!r} has no effect on sft alone. Leave it out.")
        if f_alpha_divergence_coef != 0.5 and f_divergence_type != "alpha_divergence":
            raise ValueError(
                f"f_alpha_divergence_coef={f_alpha_divergence_coef} has no effect with f_divergence_type={f_divergence_type!r}. "
                "Leave it out, or use 'alpha_divergence'."
            )
        if discopop_tau != 0.05 and not any("tau" in kind.takes for kind in kinds):
            raise ValueError(f"discopop_tau={discopop_tau} has no effect on {', '.join(names)}. Leave it out, or add 'discopop'.")
        losses = [_made(kind, settings) for kind in kinds]
        if lost := [loss.name for loss in losses if not isinstance(loss, BCO) and loss.state_dict()]:
            raise ValueError(
                f"{', '.join(lost)} has parameters or buffers, which no optimizer trains and no checkpoint holds. Make constants "
                "plain attributes, or buffers with persistent=False."
            )
        return cls(list(zip(weights, losses, strict=True)))

    @property
    def names(self) -> list[str]:
        """Names of the losses, in order."""
        return [loss.name for loss in self._all()]

    @property
    def needs_reference(self) -> bool:
        """Whether any loss reads reference log-probs."""
        return any(loss.needs_reference for loss in self._all())

    @property
    def sorting(self) -> list[str]:
        """Names of the losses that sort the batch, so that pairs cannot have weights."""
        return [loss.name for loss in self._all() if not loss.takes_weight]

    @property
    def reward_shift(self) -> RewardShift | None:
        """BCO's delta; None without BCO or without a shift."""
        return next(iter(self.reward_shifts), None)

    @property
    def reward_shifts(self) -> list[RewardShift]:
        """The deltas of BCO and of losses that are classes of it, in order."""
        return [loss.shift for loss in self._all() if isinstance(loss, BCO) and loss.shift is not None]

    def forward(self, pairs: PairLogps) -> MixtureOutput:
        """Evaluate all losses on the pairs; see `MixtureOutput`.

        Raises:
            ValueError: for pairs with weights when a loss sorts the batch, so that its values no longer belong to pairs; and for a
                loss that does not return one value per pair.
        """
        if pairs.weight is not None and self.sorting:
            raise ValueError(f"PairLogps.weight is undefined for {', '.join(self.sorting)}, which sorts the batch. Leave one out.")
        per_pair = torch.zeros_like(pairs.chosen)
        terms = {}
        for weight, loss in zip(self.weights, self._all(), strict=True):
            values = loss(pairs)
            if not isinstance(values, Tensor) or values.shape != pairs.chosen.shape:
                got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(f"Loss {loss.name!r} must return a value per pair, shape {tuple(pairs.chosen.shape)}; got {got}.")
            values = values if pairs.weight is None else values * pairs.weight
            per_pair = per_pair + weight * values
            terms[loss.name] = values.detach().mean()
        return MixtureOutput(per_pair.mean(), terms, per_pair)

    def _all(self) -> list[PairLoss]:
        return [loss for loss in self.losses if isinstance(loss, PairLoss)]

    def __repr__(self) -> str:
        return f"Mixture({' + '.join(f'{w:g} {name}' for w, name in zip(self.weights, self.names, strict=True))})"


def _kind_of(name: str) -> type[PairLoss]:
    """The class of a loss, or an error with the closest name."""
    if name in LOSSES:
        return LOSSES[name]
    if "." in str(name):
        try:
            kind = pkgutil.resolve_name(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"Loss {name!r} is not found: {error}. Its module must be installed, or in PYTHONPATH.") from error
        if isinstance(kind, type) and issubclass(kind, PairLoss):
            return kind
        raise ValueError(f"Expected {name!r} to be a subclass of mpo.losses.PairLoss; it is {kind!r}.")
    # Also by class name: 'dpo' means DPO, which TRL calls sigmoid, and not cdpo.
    spelled = {kind.__name__.lower(): known for known, kind in LOSSES.items()} | {known: known for known in LOSSES}
    close = difflib.get_close_matches(str(name).lower(), spelled, n=1, cutoff=0.4)
    hint = f" Did you mean {spelled[close[0]]!r}?" if close else ""
    raise ValueError(
        f"Unknown loss {name!r}.{hint} Use one of {', '.join(LOSSES)}; or one of your own as MODULE.CLASS, or by its name once its "
        "module is imported."
    )


def _made(kind: type[PairLoss], settings: dict[str, object]) -> PairLoss:
    taken = {name: settings[name] for name in kind.takes}
    try:
        inspect.signature(kind).bind(**taken)
    except TypeError as error:
        raise ValueError(f"The constructor of {kind.__qualname__} does not fit its takes={kind.takes}: {error}.") from None
    return kind(**taken)
