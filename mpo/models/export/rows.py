"""Fit and untie the rows of embeddings and output head for an adapter."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PREFIX = "base_model.model."


def fit_rows(model: Any, adapter: PeftConfig, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Resize a base's embeddings and head to the rows that the adapter was trained with, if its folder has them.

    Args:
        model: the base, without its adapter.
        adapter: config of the adapter.
        tensors: tensors of the adapter, by their names on disk; with embeddings and head if peft saved them
            (``save_embedding_layers``, ``modules_to_save``).
        where: their origin, for messages.

    Returns:
        the names in `tensors` of complete embedding and head matrices.

    Raises:
        ValueError: when a row missing from the base is neither in the folder's matrices nor among its trained tokens.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    places = {name: module for name, module in model.named_modules() if module in (embeddings, head)}
    stored = {f"{PREFIX}{place}{own}": module for place, module in places.items() for own in (".weight", ".base_layer.weight")}
    whole = {name: stored[name] for name in tensors if name in stored}
    tokens = _trained_tokens(adapter, places)
    if tied:
        tokens[head] = tokens[embeddings]
    before = len(embeddings.weight)
    sizes = {len(tensors[name]) for name in whole} or {max(before, *(index + 1 for own in tokens.values() for index in own), 0)}
    if len(sizes) > 1:
        raise ValueError(
            f"The embeddings and the output head in {where} differ in their number of rows: {sorted(sizes)}. Expected the same "
            "number; save the adapter again."
        )
    rows = sizes.pop()
    complete = set(whole.values())
    copied = getattr(adapter, "modules_to_save", None) and not getattr(adapter, "ensure_weight_tying", False)
    if tied and complete and not copied:  # tied: one matrix serves both
        complete = {embeddings, head}
    for name, module in (("embeddings", embeddings), ("output head", head)):
        if module is None or module in complete or tokens.get(module, set()) >= set(range(before, rows)):
            continue
        raise ValueError(
            f"The adapter in {where} was trained with {rows} rows of the {name}, the base has {before}, and the folder lacks "
            "the new rows. Train again with modules_to_save=['embed_tokens', 'lm_head'] in the adapter's config, or give the "
            "resized base with --base."
        )
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return list(whole)


def _trained_tokens(adapter: PeftConfig, places: Mapping[str, Any]) -> dict[Any, set[int]]:
    """The rows that an adapter trains, by module; a list without module names refers to the embeddings."""
    indices = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None) or {}
    named = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    return {
        module: {index for name, own in named.items() if place.split(".")[-1] == name.split(".")[-1] for index in own}
        for place, module in places.items()
    }


def untie(model: Any) -> None:
    """Untie the output head from the embeddings if an adapter is on one of the two.

    Merged into the tied matrix, the update would change both. peft itself merges correctly what it trains in a separate matrix
    (``modules_to_save``) or for both at once (``trainable_token_indices``).

    Args:
        model: a `PeftModel`.
    """
    base = model.get_base_model()
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    if (
        head is None
        or not any(_is_adapted(module) for module in (head, embeddings))
        or _own(head).weight is not _own(embeddings).weight
    ):
        return
    with torch.no_grad():
        _own(head).weight = nn.Parameter(_own(head).weight.clone(), requires_grad=False)
    mark_untied(base)


def mark_untied(model: Any) -> None:
    """Configure a model to be saved with an untied output head."""
    model._weight_conversions = None  # private: recompute the names on disk; those it was loaded with lack the head
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)


def _own(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
