"""Stop a run whose loss or gradients are not finite, before anything is saved and without synchronizing with the device."""

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.optim import Optimizer

from mpo.training.metrics import OverRanks

NEVER = torch.iinfo(torch.int64).max


class FiniteGuard:
    """Check a window of steps. From the first loss or gradient norm that is not finite, no step is applied.

    Results stay on the device until `check` reads them with one transfer.

    Args:
        over_ranks: function that sums a tensor over all ranks, or None with one rank.
    """

    def __init__(self, over_ranks: OverRanks | None = None) -> None:
        self._over_ranks = over_ranks
        self._batches: list[tuple[int, Sequence[str]]] = []  # step and record names of each micro-batch
        self._first: list[Tensor | None] = [None, None]  # first micro-batches with a loss, and with gradients, not finite

    def see_loss(self, step: int, records: Sequence[str], loss: Tensor) -> None:
        """Record the loss of a micro-batch, a scalar, of an optimizer step, counted from 1."""
        self._batches.append((step, records))
        self._see(0, loss)

    def see_gradients(self, norm: Tensor | float) -> None:
        """Record the gradient norm of the step that the last micro-batch ends."""
        self._see(1, torch.as_tensor(norm))

    def _see(self, kind: int, value: Tensor) -> None:
        place = torch.where(torch.isfinite(value.detach()), NEVER, len(self._batches) - 1)
        first = self._first[kind]
        self._first[kind] = place if first is None else torch.minimum(first, place.to(first.device))

    def is_bad(self) -> Tensor:
        """Return whether anything was not finite since the last `check`, on any rank: a boolean scalar on the device."""
        first = torch.stack([value for value in self._first if value is not None]).min()
        bad = first != NEVER
        return bad if self._over_ranks is None else self._over_ranks(bad.float()) > 0

    def gate(self, optimizer: Optimizer, bad: Tensor, *, on_device: bool = True) -> None:
        """Prevent `optimizer`'s next step from changing anything if `bad`, a boolean scalar.

        Fused optimizers decide on the device, unless a GradScaler, which uses the same attribute, excludes it (`on_device`). For
        the others one number is read per step, and their gradients are set to None.
        """
        if on_device and all(group.get("fused") for group in optimizer.param_groups):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            optimizer.zero_grad(set_to_none=True)

    def check(self) -> None:
        """Read the results, and open a new window. Every rank must call it.

        Raises FloatingPointError naming the step and its records, on every rank.
        """
        if not self._batches or not self.is_bad():
            self.clear()
            return
        firsts = [NEVER if value is None else int(value) for value in self._first]
        place = min(firsts)
        found = None
        if place != NEVER:
            step, records = self._batches[place]
            # A bad loss belongs to its micro-batch; bad gradients can come from any micro-batch of the step.
            names = records if firsts[0] == place else [name for s, batch in self._batches if s == step for name in batch]
            found = (step, "loss" if firsts[0] == place else "gradient norm", names)
        self.clear()
        reports = sorted(report for report in gather_object([found]) if report is not None)
        step = reports[0][0]
        kind = "loss" if any(what == "loss" for s, what, _ in reports if s == step) else "gradient norm"
        names = [name for s, what, batch in reports if (s, what) == (step, kind) for name in batch]
        raise FloatingPointError(
            f"The {kind} of step {step} is not finite. This step and later ones were not applied, and nothing was saved. "
            f"Its records: {', '.join(names[:20])}{f' and {len(names) - 20} more' if len(names) > 20 else ''}. "
            "Inspect these records, lower the learning rate, use bf16 or float32 instead of fp16, or resume from an earlier "
            "checkpoint."
        )

    def clear(self) -> None:
        """Drop the results."""
        self._batches.clear()
        self._first = [None, None]
