"""Fit and untie the rows of embeddings and output head for an adapter."""

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

PREFIX = "base_model.model."
NEW_ROWS = (
    "The rows of new tokens are not in the adapter's folder. If they were not trained, give the resized base with --base; or train "
    "again with modules_to_save=['embed_tokens', 'lm_head'] in the adapter's config."
)


def fit_rows(model: Any, adapter: PeftConfig, tensors: Mapping[str, Tensor], where: str) -> list[str]:
    """Resize the embeddings and head of a base, without adapter, to the rows its adapter was trained with, if that has them.

    `tensors` are the adapter's, by their names on disk; with embeddings and head if peft saved them (``save_embedding_layers``,
    ``modules_to_save``). Returns those of its names that are complete embedding and head matrices.

    Raises:
        ValueError: when a row missing from the base is neither in the folder's matrices nor among its trained tokens.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    places = {name: module for name, module in model.named_modules() if module in (embeddings, head)}
    stored = {f"{PREFIX}{place}{own}": module for place, module in places.items() for own in (".weight", ".base_layer.weight")}
    whole = {name: stored[name] for name in tensors if name in stored}
    indices = getattr(adapter, "trainable_token_indices", None) or getattr(adapter, "token_indices", None) or {}
    by_name = indices if isinstance(indices, dict) else {"embed_tokens": indices}  # a list refers to the embeddings
    tokens = {
        module: {index for name, own in by_name.items() if place.split(".")[-1] == name.split(".")[-1] for index in own}
        for place, module in places.items()
    }
    tied = head is not None and head.weight is embeddings.weight
    if tied:
        tokens[head] = tokens[embeddings]
    before = len(embeddings.weight)
    sizes = {len(tensors[name]) for name in whole} or {max(before, *(index + 1 for own in tokens.values() for index in own), 0)}
    if len(sizes) > 1:
        raise ValueError(f"Embeddings and output head in {where} differ in their rows: {sorted(sizes)}. Save the adapter again.")
    rows = sizes.pop()
    complete = set(whole.values())
    copied = getattr(adapter, "modules_to_save", None) and not getattr(adapter, "ensure_weight_tying", False)
    if tied and complete and not copied:  # tied: one matrix serves both
        complete = {embeddings, head}
    for name, module in (("embeddings", embeddings), ("output head", head)):
        if module is None or module in complete or tokens.get(module, set()) >= set(range(before, rows)):
            continue
        raise ValueError(f"The adapter in {where} was trained with {rows} rows of the {name}, the base has {before}. {NEW_ROWS}")
    if rows != before:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return list(whole)


def untie(model: Any) -> None:
    """Untie the output head from the embeddings if an adapter is on one of the two.

    Merged into the tied matrix, the update would change both. peft itself merges correctly what it trains in a separate matrix
    (``modules_to_save``) or for both at once (``trainable_token_indices``).
    """
    base = model.get_base_model()
    adapted = base.get_output_embeddings(), base.get_input_embeddings()
    if not any(isinstance(module, BaseTunerLayer) and not isinstance(module, TrainableTokensLayer) for module in adapted):
        return
    head, embeddings = (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in adapted)
    if head is not None and head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        mark_untied(base)


def mark_untied(model: Any) -> None:
    """Configure a model to be saved with an untied output head."""
    standard_names(model)  # those it was loaded with lack the head
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def standard_names(model: Any) -> None:
    """Configure a model to be saved under its standard names, not those that it was loaded from."""
    model._weight_conversions = None  # private: computed again when saving
