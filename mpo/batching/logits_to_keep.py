"""The LM head, and of packed rows the last decoder layer, compute only the positions that predict a labelled token.

Nothing reads the last layer's output at the other positions, only its keys and values. So in packed rows its queries begin at each
segment's first labelled node, and its query and output projections and its MLP, which work position by position, get the kept
positions alone. Their outputs elsewhere are 0, with a gradient of 0 as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mpo.batching.layout import LabelledTokens, Segments
from mpo.encoding.movable import Movable
from mpo.models.packable import find_text_model

# Not `logits_to_keep`: the outer forward of transformers' models has a parameter of that name, which it does not pass on to the
# backbone. It slices all rows alike; here every row keeps its own positions.
KEYWORD = "positions_to_keep"
PASSED_ON = "positions_of_last_layer"  # another name, since the text model within a backbone may be one that takes `KEYWORD` itself
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
"""The modules of a decoder layer and of its MLP, if nothing in them after the attention mixes, counts or samples positions."""


@dataclass(frozen=True, eq=False)
class LogitsToKeep(Movable):
    """The positions of a batch at which logits are computed.

    ``index`` (M,) int64: the positions in the flattened rows. ``width``: tokens of a row, without the virtual tokens that an
    adapter may prepend. ``segments``: of packed rows, those of the last layer (`mpo.batching.layout.PackedRows`).
    """

    index: Tensor
    width: int
    segments: Segments | None = None


def add_logits_to_keep(backbone: nn.Module) -> None:
    """Let `backbone(..., positions_to_keep=LogitsToKeep)` return the hidden states of these positions alone.

    The output has shape (1, M, hidden), and the LM head after it takes labels of shape (1, M). The hooks of the backbone, which is
    the model without its LM head (``base_model``), remove the keyword before its forward. Without it nothing changes.

    The last layer computes these positions alone if it is of the usual kind: no experts, whose router counts positions, no dropout,
    no tensor parallelism, not compiled; and if no hidden states are returned. Other hooks on this layer then see its output without
    what attention and MLP add elsewhere, and the dropout of an adapter in it draws numbers for these positions alone.
    """
    if getattr(backbone, "keeps_positions", False):
        return
    backbone.__dict__.update({"keeps_positions": True, KEYWORD: None})  # plain attributes, not modules or buffers
    backbone.register_forward_pre_hook(_take_keyword, with_kwargs=True)
    backbone.register_forward_hook(_keep_positions)
    layer = _plain_last_layer(backbone)
    if layer is not None and "narrowed" not in layer.__dict__:  # not as that of another backbone
        layer.self_attn.register_forward_pre_hook(_narrow_layer, with_kwargs=True)
        layer.register_forward_hook(_end_layer, always_call=True)
        state: dict[str, Any] = {}  # of one call of the layer; a copy of the model has its own
        for module in (layer, layer.self_attn, layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
            module.__dict__["narrowed"] = state
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
            module.register_forward_pre_hook(_select)
            module.register_forward_hook(_scatter)


def _plain_last_layer(backbone: nn.Module) -> Any:
    """The last decoder layer if all that follows its attention works position by position; None if that is not known."""
    text_model: Any = find_text_model(backbone)
    layers = getattr(text_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    names = [{name for name, _ in module.named_children()} for module in (text_model, layers[-1])]
    if names != [{"embed_tokens", "layers", "norm", "rotary_emb"}, LAYER]:
        return None
    layer: Any = layers[-1]
    parts = [{name for name, _ in module.named_children()} for module in (layer.mlp, layer.self_attn)]
    sharded = any(isinstance(parameter, DTensor) for parameter in layer.parameters())
    return layer if {"down_proj"} <= parts[0] <= MLP and {"q_proj", "o_proj"} <= parts[1] and not sharded else None


def _take_keyword(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = module.__dict__[KEYWORD] = kwargs.pop(KEYWORD, None)
    if positions is not None and kwargs.get("segments") is not None and not _returns_hidden_states(module, kwargs):
        text_model: Any = find_text_model(module)
        if "narrowed" in text_model.layers[-1].__dict__:  # still the last one
            kwargs[PASSED_ON] = positions  # as `segments` is, also when checkpointing computes the layer again
    return args, kwargs


def _returns_hidden_states(module: Any, kwargs: dict[str, Any]) -> bool:
    configs = (module.config, module.config.get_text_config())
    return bool(kwargs.get("output_hidden_states") or any(config.output_hidden_states for config in configs))


def _narrow_layer(attention: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    positions = kwargs.pop(PASSED_ON, None)
    narrows = not torch.compiler.is_compiling() and isinstance(positions, LogitsToKeep) and positions.segments is not None
    attention.narrowed["index"] = positions.index if narrows else None
    return args, {**kwargs, "segments": positions.segments} if narrows else kwargs


def _select(module: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
    if (index := module.narrowed.get("index")) is None:
        return None
    module.narrowed["shape"] = args[0].shape[:-1]
    return (args[0].flatten(0, -2).index_select(0, index).unsqueeze(0),)


def _scatter(module: Any, args: Any, output: Tensor) -> Tensor:
    if (index := module.narrowed.get("index")) is None:
        return output
    whole = output.new_zeros(module.narrowed["shape"].numel(), output.size(-1)).index_copy(0, index, output[0])
    return whole.view(*module.narrowed["shape"], -1)


def _keep_positions(module: nn.Module, args: Any, output: Any) -> Any:
    positions, module.__dict__[KEYWORD] = module.__dict__[KEYWORD], None
    if isinstance(positions, LogitsToKeep):
        hidden = output.last_hidden_state[:, -positions.width :]
        output.last_hidden_state = hidden.reshape(-1, hidden.size(-1)).index_select(0, positions.index).unsqueeze(0)
    return output


def _end_layer(layer: Any, args: Any, output: Any) -> None:
    """After the last layer, also when an error, or checkpointing that has all it needs, ended it early."""
    layer.narrowed.clear()


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
    return (
        LogitsToKeep(completion * width + place, width),
        input_ids[completion, place + 1].unsqueeze(0),
        LabelledTokens.of(torch.arange(len(completion), device=completion.device), labelled.sum(dim=1)),
    )
