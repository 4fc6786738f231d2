"""Check whether a model can attend by segments (`mpo.batching.attention`)."""

import functools
import inspect
from typing import Any

from torch import nn
from transformers import PreTrainedModel


def find_text_model(model: nn.Module) -> PreTrainedModel | None:
    """The decoder of a causal or vision-language model, wrapped or not; ``None`` if there is none."""
    outer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    decoder = None if outer is None else outer.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else None


def fixed_context(model: nn.Module) -> int | None:
    """The sequence length, in tokens, up to which rotary frequencies are fixed; ``None`` if they always are.

    Dynamic NTK and LongRoPE choose the frequencies of a batch by its largest position.
    """
    limits = []
    module: Any
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
            if not isinstance(kind, str) or not ("dynamic" in kind or kind == "longrope"):
                continue
            parameters = module.config.rope_parameters if layer_type is None else module.config.rope_parameters[layer_type]
            original = parameters.get("original_max_position_embeddings") if kind == "longrope" else None
            limits.append(int(original or module.original_max_seq_len))
    return min(limits, default=None)


def why_not(model: nn.Module) -> str | None:
    """Why a model does not support rows in which completions share their prompt; ``None`` when it does.

    Decided by the model's modules and config, not by its name; a doubtful model is not supported.
    """
    text_model = find_text_model(model)
    if text_model is None:
        return "transformers finds no text decoder in it"
    outer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return _wrapper_trouble(model, outer, text_model) or _config_trouble(text_model.config) or _layer_trouble(text_model)


def _wrapper_trouble(model: nn.Module, outer: PreTrainedModel, text_model: PreTrainedModel) -> str | None:
    if getattr(outer.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    adapters = [config for module in model.modules() for config in (getattr(module, "peft_config", None) or {}).values()]
    if any(getattr(config, "is_prompt_learning", False) for config in adapters):
        return "its adapter puts virtual tokens before the prompt"
    if not text_model._can_set_attn_implementation():
        return f"{type(text_model).__name__} does not use transformers' AttentionInterface"
    around = [module for module in outer.modules() if isinstance(module, PreTrainedModel) and text_model in module.modules()]
    for module in around:
        if not _passes_keywords_on(module):
            return f"{type(module).__name__} does not pass keyword arguments on to its layers"
    if outer.config is text_model.config:
        return None
    # An image model that computes its own masks or positions needs them; others leave both to a plain text model.
    for module in around:
        if module is text_model:
            continue
        source = _source(inspect.getmodule(_own_class(module)))
        if source is None or _own_class(module).__module__ == _own_class(text_model).__module__:
            return f"{type(text_model).__name__} is not a plain text model"
        masks = "attention masks"
        for sign, what in (("get_rope_index", "positions"), ("token_type_ids", masks), ("causal_mask", masks)):
            if sign in source:
                return f"{type(module).__name__} computes its own {what}"
    return None


def _config_trouble(config: Any) -> str | None:
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layer_types != {"full_attention"}:
        return f"it has layers of type {', '.join(sorted(layer_types - {'full_attention'}))}"
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "mrope_section" in str(rope):
        return "its rotary positions have several dimensions"
    for name, what in (
        ("sliding_window", "attends in a sliding window"),
        ("attention_chunk_size", "attends in chunks"),
        ("attn_logit_softcapping", "caps its attention logits"),
        ("kv_lora_rank", "has values of another width than its keys"),
        ("attention_dropout", "has attention dropout"),
    ):
        value = getattr(config, name, None)
        if value and not (name == "sliding_window" and getattr(config, "use_sliding_window", True) is False):
            return f"it {what} ({name} = {value})"
    if not getattr(config, "is_causal", True):
        return "it is not causal"
    return None


def _layer_trouble(text_model: PreTrainedModel) -> str | None:
    layers = getattr(text_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(text_model, "rotary_emb"):
        return f"{type(text_model).__name__} is not a stack of layers with rotary positions"
    for number, layer in enumerate(layers):
        layer = getattr(layer, "_orig_mod", layer)  # compiled layer by layer
        attentions = [module for module in layer.modules() if hasattr(module, "num_key_value_groups")]
        if len(attentions) != 1:
            return f"layer {number} has {len(attentions)} attention modules of the usual kind, not 1"
        attention = attentions[0]
        copied = getattr(attention, "config", text_model.config) is not text_model.config  # by peft, or to upscale a model
        for wrong, what in (
            (copied, "has its own config, so it would keep its usual attention"),
            (not getattr(attention, "is_causal", False), "is not causal"),
            (getattr(attention, "sliding_window", None), "attends in a sliding window"),
            (hasattr(attention, "sinks"), "has attention sinks"),
            (getattr(attention, "attention_dropout", 0), "has attention dropout"),
        ):
            if wrong:
                return f"layer {number} {what}"
        if not _passes_keywords_on(attention) or not _passes_keywords_on(layer):
            return f"{type(layer).__name__} does not pass keyword arguments on to its attention"
    return None


def _passes_keywords_on(module: nn.Module) -> bool:
    """Whether a module's forward accepts any keyword argument and passes them on (some only accept them)."""
    forward = _own_class(module).forward
    names = [name for name, parameter in inspect.signature(forward).parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    source = _source(forward)
    return source is not None and any(source.count(f"**{name}") > 1 for name in names)


def _own_class(module: nn.Module) -> Any:
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed"))


@functools.cache  # parsing takes milliseconds, for the same few classes again and again
def _source(what: Any) -> str | None:
    try:
        return inspect.getsource(what)
    except (OSError, TypeError):
        return None
