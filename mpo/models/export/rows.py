"""Rows of embeddings and output head: those that an adapter's folder carries, and a matrix that the two share."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PREFIX = "base_model.model."


def fit_rows(model: Any, adapter: PeftConfig, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Give a base as many rows as the adapter was trained with, where its folder has them.

    Args:
        model: the base, before its adapter is put on.
        adapter: its config.
        tensors: of the adapter, by their names on disk; embeddings and head are among them when peft saved them
            (``save_embedding_layers``, ``modules_to_save``).
        where: they come from.

    Returns:
        the names, in `tensors`, of whole matrices of embeddings and head.

    Raises:
        ValueError: when a row that the base does not have is in neither the folder's matrices nor among its trained tokens.
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
        raise ValueError(f"The embeddings and the output head in {where} differ in their rows: {sorted(sizes)}.")
    rows = sizes.pop()
    held = set(whole.values())
    copied = getattr(adapter, "modules_to_save", None) and not getattr(adapter, "ensure_weight_tying", False)
    if tied and held and not copied:  # one matrix, so what is known of it is known of both
        held = {embeddings, head}
    for name, module in (("embeddings", embeddings), ("output head", head)):
        if module is None or module in held or tokens.get(module, set()) >= set(range(before, rows)):
            continue
        raise ValueError(
            f"The adapter in {where} was trained with {rows} rows of the {name}, the base has {before}, and the folder does not "
            "have the others. Train again with modules_to_save=['embed_tokens', 'lm_head'] in the adapter's config, or give the "
            "resized base with --base."
        )
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return list(whole)


def _trained_tokens(adapter: PeftConfig, places: Mapping[str, Any]) -> dict[Any, set[int]]:
    """Which rows an adapter replaces one by one, of each module; a list without a module's name is of the embeddings."""
    indices = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None) or {}
    named = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    return {
        module: {index for name, own in named.items() if place.split(".")[-1] == name.split(".")[-1] for index in own}
        for place, module in places.items()
    }


def untie(model: Any) -> None:
    """Give the output head a matrix of its own where it shares one with the embeddings and an adapter is on one of the two.

    Merged into the shared matrix the change would reach both. What peft trains in a matrix of its own (``modules_to_save``) or for
    both at once (``trainable_token_indices``), it merges right by itself.

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
    """Let a model be saved with an output head of its own."""
    model._weight_conversions = None  # private: names in its files are made anew; those it came with lack a head's
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer)


def _own(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
