"""Attention for rows in which answers share their prompt (see `mpo.packing.layout`).

    use_packed_attention(model)
    output = model(input_ids=..., position_ids=..., segments=batch.segments, use_cache=False)   # and pixel_values
    with usual_attention(model):
        model.generate(...)

The segments travel as one keyword argument from the model's forward to its attention layers. On NVIDIA GPUs in bfloat16 or
float16 each layer makes one call of a varlen kernel; anywhere else one call of PyTorch's attention per segment.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from mpo.packing.layout import Segments

# transformers matches on parts of these names: none may contain flash, sdpa, flex, paged or a slash. No mask function is
# registered under them: then transformers builds no mask at all (masking_utils._preprocess_mask_arguments, 5.17 to 5.23).
BACKENDS = {
    "auto": "shared_prefix",
    "segments": "shared_prefix_by_segment",
    "flash_attn_2": "shared_prefix_fa2",
    "flash_attn_3": "shared_prefix_fa3",
}
"""What `use_packed_attention` takes, and how transformers knows it."""


VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from PyTorch 2.12 on


def use_packed_attention(model: nn.Module, backend: str = "auto") -> None:
    """Make the text model attend by segments from now on; a vision tower keeps its own attention.

    It has to stay so until after the backward pass: gradient checkpointing computes the layers again there, and with another
    attention the gradients would be wrong.

    Args:
        model: a model that `why_not` has nothing against; may be wrapped (PEFT, DDP).
        backend: ``"auto"``; ``"segments"``, PyTorch's attention on one segment after the other on every device; or
            ``"flash_attn_2"``, ``"flash_attn_3"``.

    Raises:
        ValueError: for an unknown backend, one that is not installed, or a model it does not fit.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    reason = why_not(model)
    if reason is not None:
        raise ValueError(f"Answers cannot share their prompt in this model: {reason}. Use padded rows.")
    if backend.startswith("flash_attn"):
        _flash_attention(backend)
    text_model = find_text_model(model)
    assert text_model is not None
    name = text_model.config._attn_implementation
    if name not in BACKENDS.values():
        text_model.usual_attention = name  # on the module, so that copies of the model have it too
    text_model.set_attn_implementation(BACKENDS[backend])


def attends_by_segments(model: nn.Module) -> bool:
    """Whether `use_packed_attention` is on."""
    text_model = find_text_model(model)
    return text_model is not None and text_model.config._attn_implementation in BACKENDS.values()


@contextmanager
def packed_attention(*models: nn.Module, backend: str = "auto") -> Iterator[None]:
    """Within it the text models attend by segments; those that did so before go on behind it. See `use_packed_attention`."""
    switched = []
    for model in models:
        if not attends_by_segments(model):
            use_packed_attention(model, backend)
            switched.append(find_text_model(model))
    try:
        yield
    finally:
        for text_model in switched:
            if text_model is not None:
                text_model.set_attn_implementation(text_model.usual_attention)


@contextmanager
def usual_attention(model: nn.Module) -> Iterator[None]:
    """Within it the model attends as it did before `use_packed_attention`: for `generate` and padded rows."""
    text_model = find_text_model(model)
    name = None if text_model is None else text_model.config._attn_implementation
    if text_model is None or name not in BACKENDS.values():
        yield
        return
    text_model.set_attn_implementation(getattr(text_model, "usual_attention", "sdpa"))
    try:
        yield
    finally:
        text_model.set_attn_implementation(name)


def find_text_model(model: nn.Module) -> PreTrainedModel | None:
    """The decoder inside a causal or vision-language model, wrapped or not; ``None`` where there is none."""
    outer = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    decoder = None if outer is None else outer.get_decoder()
    return decoder if isinstance(decoder, PreTrainedModel) else None


def why_not(model: nn.Module) -> str | None:
    """Why a model cannot take rows in which answers share their prompt; ``None`` when it can.

    Decides by what the model is made of, not by its name, and against it where that leaves a doubt.
    """
    text_model = find_text_model(model)
    if text_model is None:
        return "it has no text decoder that transformers knows"
    outer = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return _wrapper_trouble(model, outer, text_model) or _config_trouble(text_model.config) or _layer_trouble(text_model)


def _wrapper_trouble(model: nn.Module, outer: PreTrainedModel, text_model: PreTrainedModel) -> str | None:
    if getattr(outer.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    adapters = [config for module in model.modules() for config in (getattr(module, "peft_config", None) or {}).values()]
    if any(getattr(config, "is_prompt_learning", False) for config in adapters):
        return "its adapter puts virtual tokens before the prompt"
    if not text_model._can_set_attn_implementation():
        return f"{type(text_model).__name__} does not take its attention from transformers' AttentionInterface"
    around = [module for module in outer.modules() if isinstance(module, PreTrainedModel) and text_model in module.modules()]
    for module in around:
        if not _passes_keywords_on(module):
            return f"{type(module).__name__} does not pass keyword arguments on to its layers"
    if outer.config is text_model.config:
        return None
    # A picture model that makes masks or positions of its own needs them; one around a plain text model leaves both to it.
    for module in around:
        if module is text_model:
            continue
        source = _source(inspect.getmodule(_own_class(module)))
        if source is None or _own_class(module).__module__ == _own_class(text_model).__module__:
            return f"{type(text_model).__name__} is no plain text model"
        for sign, what in (
            ("get_rope_index", "positions"),
            ("token_type_ids", "attention masks"),
            ("causal_mask", "attention masks"),
        ):
            if sign in source:
                return f"{type(module).__name__} makes {what} of its own"
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
        if not getattr(attention, "is_causal", False):
            return f"layer {number} is not causal"
        if getattr(attention, "sliding_window", None):
            return f"layer {number} attends in a sliding window"
        if hasattr(attention, "sinks"):
            return f"layer {number} has attention sinks"
        if getattr(attention, "attention_dropout", 0):
            return f"layer {number} has attention dropout"
        if not _passes_keywords_on(attention) or not _passes_keywords_on(layer):
            return f"{type(layer).__name__} does not pass keyword arguments on to its attention"
    return None


def _passes_keywords_on(module: nn.Module) -> bool:
    """Whether its forward takes any keyword argument and hands them to what it calls (some only take them)."""
    forward = _own_class(module).forward
    names = [name for name, parameter in inspect.signature(forward).parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
    source = _source(forward)
    return source is not None and any(source.count(f"**{name}") > 1 for name in names)


def _own_class(module: nn.Module) -> Any:
    """The class that the model's author wrote: FSDP2 puts one of its own in front."""
    return next(cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.distributed"))


def _source(what: Any) -> str | None:
    try:
        return inspect.getsource(what)
    except (OSError, TypeError):
        return None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    *,
    backend: str,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention layers call.

    Args:
        module: the attention layer.
        query: shape (1, heads, N, head_dim).
        key: shape (1, key-value heads, N, head_dim).
        value: shape (1, key-value heads, N, head_dim).
        attention_mask: transformers builds none for this attention.
        scaling: of the logits.
        dropout: must be 0.
        segments: of the batch, as given to the model's forward.
        backend: see `use_packed_attention`.
        kwargs: what else the layer says; must not change the attention.

    Returns:
        shape (1, N, heads, head_dim), and no attention weights.
    """
    if segments is None:
        raise ValueError(
            "The text model attends by segments (use_packed_attention), but its forward got none. Pass `segments=`, or run "
            "this call within `usual_attention(model)`."
        )
    if not torch.compiler.is_compiling():  # compiled code would ask again for every new length
        nodes = sum(queries for queries, _ in segments.lengths)
        if query.shape[0] != 1 or query.shape[2] != nodes or key.shape[2] != nodes:
            raise ValueError(
                f"The segments are those of 1 row of {nodes} tokens, but the layer got {query.shape[0]} rows with "
                f"{query.shape[2]} queries and {key.shape[2]} keys. Pass the segments of this batch, and no cache."
            )
    changed = sorted(name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if kwargs.get(name) is not None)
    if dropout or changed or attention_mask is not None:
        what = ["dropout"] * bool(dropout) + changed + ["attention_mask"] * (attention_mask is not None)
        raise ValueError(f"{type(module).__name__} wants {', '.join(what)}, which attention by segments does not do.")

    # Autocast does not know varlen kernels, and rotary embeddings or norms may have left queries and keys in float32.
    kind = query.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else value.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (N, heads, head_dim)
    if segments.key_index is not None:
        key, value = key.index_select(0, segments.key_index), value.index_select(0, segments.key_index)
    if backend.startswith("flash_attn"):
        output = _flash(query, key, value, segments, scaling, backend)
    elif backend == "auto" and _varlen_fits(query):
        output = _varlen(query, key, value, segments, scaling)
    else:
        output = _by_segment_uncompiled(query, key, value, segments, scaling)
    return output.unsqueeze(0), None


for _backend, _name in BACKENDS.items():
    AttentionInterface.register(_name, partial(_attend, backend=_backend))


def _by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """PyTorch's attention on one segment after the other; queries (N, heads, head_dim), keys and values (K, ...)."""
    group = query.shape[1] // key.shape[1]
    if group > 1:  # not enable_gqa: with a mask only PyTorch's slowest kernel takes it on GPUs
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    sizes_q, sizes_k = [queries for queries, _ in segments.lengths], [keys for _, keys in segments.lengths]
    parts = zip(*map(torch.split_with_sizes, (query, key, value), (sizes_q, sizes_k, sizes_k)), segments.masks(), strict=True)
    outputs = []
    for q, k, v, mask in parts:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        causal = mask is None and q.shape[2] > 1
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


# Not compiled: its loop would be compiled anew for every number and length of segments.
_by_segment_uncompiled: Callable[..., Tensor] = torch.compiler.disable(_by_segment)  # type: ignore[no-untyped-call]


def _varlen_fits(query: Tensor) -> bool:
    """Whether PyTorch's varlen kernel takes these queries: half precision on an NVIDIA GPU from Ampere on."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and _has_varlen(query.device.index)
    )


@lru_cache
@torch.compiler.assume_constant_result  # type: ignore[misc, untyped-decorator, unused-ignore]
def _has_varlen(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """One call of PyTorch's varlen kernel; shapes as in `_by_segment`.

    A window of (-1, 0) is causal from the bottom-right corner, but only with FlashAttention: cuDNN aligns packed segments at
    the top left. PyTorch knows, and takes cuDNN for causal segments only when both offsets are one and the same tensor; here
    they never are.
    """
    options: dict[str, Any] = {}
    group = query.shape[1] // key.shape[1]
    if group > 1 and VARLEN_TAKES_GROUPS:
        options["enable_gqa"] = True
    elif group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    output = varlen_attn(
        query,
        key,
        value,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_q,
        segments.max_k,
        scale=scaling,
        window_size=(-1, 0),
        **options,
    )
    assert isinstance(output, Tensor)  # a tuple only with return_aux
    return output


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, backend: str) -> Tensor:
    """One call of the flash-attn package's varlen kernel; shapes as in `_by_segment`."""
    output = _flash_attention(backend)(
        query,
        key,
        value,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_q,
        segments.max_k,
        softmax_scale=scaling,
        causal=True,  # from the bottom-right corner, since flash-attn 2.1
    )
    attended: Tensor = output[0] if isinstance(output, tuple) else output  # some builds of flash-attn 3 add the log-sum-exp
    return attended


@lru_cache
def _flash_attention(backend: str) -> Callable[..., Any]:
    """The varlen function of the flash-attn package.

    Raises:
        ValueError: when it is not installed.
    """
    package = {"flash_attn_2": "flash_attn", "flash_attn_3": "flash_attn_interface"}[backend]
    try:
        function: Callable[..., Any] = importlib.import_module(package).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"backend={backend!r} needs the package {package}, which cannot be imported here ({error}). Install it, or leave "
            "backend at 'auto': PyTorch brings a varlen kernel of its own."
        ) from error
    return function
