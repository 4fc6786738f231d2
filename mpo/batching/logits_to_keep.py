"""The LM head computes logits only at the positions that predict a labelled token, on every device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpo.batching.layout import LabelledTokens
from mpo.encoding.movable import Movable

# Not `logits_to_keep`: the outer forward of transformers' models has a parameter of that name, which it does not pass on to the
# backbone. It slices all rows alike; here every row keeps its own positions.
KEYWORD = "positions_to_keep"


@dataclass(frozen=True, eq=False)
class LogitsToKeep(Movable):
    """The positions of a batch at which logits are computed.

    ``index`` (M,) int64: the positions in the flattened rows. ``width``: tokens of a row, without the virtual tokens that an
    adapter may prepend.
    """

    index: Tensor
    width: int


def add_logits_to_keep(backbone: nn.Module) -> None:
    """Let `backbone(..., positions_to_keep=LogitsToKeep)` return the hidden states of these positions alone.

    The output has shape (1, M, hidden), and the LM head after it takes labels of shape (1, M). The backbone's hooks remove the
    keyword before its forward. Without the keyword nothing changes.

    Args:
        backbone: the model without its LM head (``base_model`` in transformers); changed in place.
    """
    if getattr(backbone, "keeps_positions", False):
        return
    backbone.__dict__.update({"keeps_positions": True, KEYWORD: None})  # plain attributes, not modules or buffers
    backbone.register_forward_pre_hook(_take_keyword, with_kwargs=True)
    backbone.register_forward_hook(_keep_positions)


def _take_keyword(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    module.__dict__[KEYWORD] = kwargs.pop(KEYWORD, None)
    return args, kwargs


def _keep_positions(module: nn.Module, args: Any, output: Any) -> Any:
    positions, module.__dict__[KEYWORD] = module.__dict__[KEYWORD], None
    if isinstance(positions, LogitsToKeep):
        hidden = output.last_hidden_state[:, -positions.width :]
        output.last_hidden_state = hidden.reshape(-1, hidden.size(-1)).index_select(0, positions.index).unsqueeze(0)
    return output


def label_padded_rows(input_ids: Tensor, completion_mask: Tensor) -> tuple[LogitsToKeep, Tensor, LabelledTokens]:
    """Labels of padded rows, in the form that the LM head uses.

    Args:
        input_ids: shape (2P, T), the chosen rows, then the rejected ones.
        completion_mask: shape (2P, T), nonzero for labelled tokens. A row's first token is never labelled: nothing predicts it.

    Returns:
        the M positions to keep; the label of each, shape (1, M); and the M tokens of the 2P completions.

    >>> kept, labels, tokens = label_padded_rows(torch.tensor([[5, 6, 7], [5, 8, 0]]), torch.tensor([[0, 1, 1], [0, 1, 0]]))
    >>> kept.index, labels, tokens.lengths
    (tensor([0, 1, 3]), tensor([[6, 7, 8]]), tensor([2, 1]))
    """
    labelled = completion_mask[:, 1:] != 0
    completion, place = labelled.nonzero(as_tuple=True)
    width = input_ids.size(1)
    lengths = labelled.sum(dim=1)
    ordinal = torch.arange(len(completion), device=completion.device) - (lengths.cumsum(0) - lengths)[completion]
    return (
        LogitsToKeep(completion * width + place, width),
        input_ids[completion, place + 1].unsqueeze(0),
        LabelledTokens(torch.arange(len(completion), device=completion.device), completion, ordinal, lengths),
    )
