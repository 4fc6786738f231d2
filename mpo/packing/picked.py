"""Only the positions that predict an answer's token meet the LM head, on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpo.packing.layout import ScoredTokens


@dataclass(frozen=True, eq=False)
class Picked:
    """Positions of a batch.

    ``index`` (M,) int64: positions counted row after row. ``width``: tokens of a row; whatever an adapter puts in front of them
    does not count.
    """

    index: Tensor
    width: int

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Picked:
        """A copy on a device; accelerate and the Trainer call this."""
        return Picked(self.index.to(device, non_blocking=non_blocking), self.width)

    def pin_memory(self) -> Picked:
        """A copy in pinned memory; data loaders call this."""
        return Picked(self.index.pin_memory(), self.width)


def add_picking(backbone: nn.Module) -> None:
    """Let `backbone(..., picked=Picked)` return the hidden states of these positions alone, as shape (1, M, hidden).

    The LM head after it is then given (1, M) labels. The keyword goes no further than the backbone's own hooks, and without it
    nothing changes.
    """
    if getattr(backbone, "picks", False):
        return
    backbone.__dict__.update(picks=True, picked=None)  # plain attributes, no modules or buffers
    backbone.register_forward_pre_hook(_take_keyword, with_kwargs=True)
    backbone.register_forward_hook(_pick)


def _take_keyword(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    module.__dict__["picked"] = kwargs.pop("picked", None)
    return args, kwargs


def _pick(module: nn.Module, args: Any, output: Any) -> Any:
    picked, module.__dict__["picked"] = module.__dict__["picked"], None
    if isinstance(picked, Picked):
        hidden = output.last_hidden_state[:, -picked.width :]
        output.last_hidden_state = hidden.reshape(-1, hidden.size(-1)).index_select(0, picked.index).unsqueeze(0)
    return output


def pick_scored(input_ids: Tensor, completion_mask: Tensor) -> dict[str, Any]:
    """What the LM head needs to know of padded rows.

    Args:
        input_ids: shape (2P, T), the chosen rows, then the rejected ones.
        completion_mask: shape (2P, T), nonzero where a token is scored. A row's first token never is: nothing predicts it.

    Returns:
        ``picked`` (M positions), ``shift_labels`` (1, M), ``scored``: the M tokens of the 2P answers.

    >>> pick = pick_scored(torch.tensor([[5, 6, 7], [5, 8, 0]]), torch.tensor([[0, 1, 1], [0, 1, 0]]))
    >>> pick["picked"].index, pick["shift_labels"], pick["scored"].lengths
    (tensor([0, 1, 3]), tensor([[6, 7, 8]]), tensor([2, 1]))
    """
    scored = completion_mask[:, 1:] != 0
    answer, place = scored.nonzero(as_tuple=True)
    width = input_ids.size(1)
    lengths = scored.sum(dim=1)
    ordinal = torch.arange(len(answer), device=answer.device) - (lengths.cumsum(0) - lengths)[answer]
    return {
        "picked": Picked(answer * width + place, width),
        "shift_labels": input_ids[answer, place + 1].unsqueeze(0),
        "scored": ScoredTokens(torch.arange(len(answer), device=answer.device), answer, ordinal, lengths),
    }
