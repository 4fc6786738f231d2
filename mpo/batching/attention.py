"""Attention for rows in which completions share their prompt (see `mpo.batching.layout`).

    use_packed_attention(model)
    output = model(input_ids=..., position_ids=..., segments=batch.segments, use_cache=False)   # and pixel_values
    model.generate(...)   # a forward without segments attends as before

The segments are passed as one keyword argument from the model's forward to its attention layers. On NVIDIA GPUs in bfloat16 or
float16 each layer calls a varlen kernel once; everywhere else it calls PyTorch's attention once per segment.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from mpo.batching.layout import Segments
from mpo.models.packable import find_text_model, why_not

# transformers matches on parts of these names: none may contain flash, sdpa, flex, paged or a slash. No mask function is
# registered under them: then transformers builds no mask at all (masking_utils._preprocess_mask_arguments, 5.17 to 5.23).
BACKENDS = {
    "auto": "shared_prefix",
    "segments": "shared_prefix_by_segment",
    "flash_attn_2": "shared_prefix_fa2",
    "flash_attn_3": "shared_prefix_fa3",
}
"""The backends of `use_packed_attention`, and their names in transformers' AttentionInterface."""


VARLEN_TAKES_GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from PyTorch 2.12 on


def use_packed_attention(model: nn.Module, backend: str = "auto") -> None:
    """Make the text model attend by segments; the attention of a vision tower does not change.

    A forward without segments (`generate`, padded rows) uses the model's usual attention, with its masks and cache. Keep that
    attention until after the backward pass: gradient checkpointing recomputes the layers there, and with another attention the
    gradients would be wrong.

    Args:
        model: a model that `why_not` accepts; may be wrapped (PEFT, DDP).
        backend: ``"auto"``; ``"segments"``, PyTorch's attention on one segment at a time on every device; or
            ``"flash_attn_2"``, ``"flash_attn_3"``.

    Raises:
        ValueError: for an unknown backend, one that is not installed, or an unsupported model.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}.")
    reason = why_not(model)
    if reason is not None:
        raise ValueError(f"Completions cannot share their prompt in this model: {reason}. Use padded rows.")
    check_backend(backend)
    text_model = find_text_model(model)
    assert text_model is not None
    name = text_model.config._attn_implementation
    if name not in BACKENDS.values():
        if _attend_as_before not in text_model._forward_pre_hooks.values():
            text_model.register_forward_pre_hook(_attend_as_before, with_kwargs=True)
            text_model.register_forward_hook(_attend_by_segments_again, always_call=True)
        text_model.usual_attention = name  # an attribute of the module, so that copies of the model have it too
    text_model.set_attn_implementation(BACKENDS[backend])


def _attend_as_before(text_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward without segments, restore the usual attention in the config: transformers makes the masks for it."""
    config: Any = text_model.config
    if kwargs.get("segments") is None and config._attn_implementation in BACKENDS.values():
        text_model.packed_attention = config._attn_implementation
        config._attn_implementation = text_model.usual_attention


def _attend_by_segments_again(text_model: nn.Module, *args: Any) -> None:
    name = text_model.__dict__.pop("packed_attention", None)
    if name is not None:
        config: Any = text_model.config
        config._attn_implementation = name


def check_backend(backend: str) -> None:
    """Refuse a backend whose package is not installed."""
    if backend in _PACKAGES:
        _flash_attention(backend)


def attends_by_segments(model: nn.Module) -> bool:
    """Whether `use_packed_attention` is on."""
    text_model = find_text_model(model)
    return text_model is not None and text_model.config._attn_implementation in BACKENDS.values()


@contextmanager
def packed_attention(*models: nn.Module, backend: str = "auto") -> Iterator[None]:
    """Make the text models attend by segments inside the context; on exit, restore their state. See `use_packed_attention`."""
    with ExitStack() as restored:
        for model in models:
            if not attends_by_segments(model):
                use_packed_attention(model, backend)
                text_model: Any = find_text_model(model)
                restored.callback(text_model.set_attn_implementation, text_model.usual_attention)
        yield


@contextmanager
def usual_attention(model: nn.Module) -> Iterator[None]:
    """Restore the attention from before `use_packed_attention` inside the context: for `generate` and padded rows."""
    with ExitStack() as restored:
        if attends_by_segments(model):
            text_model: Any = find_text_model(model)
            restored.callback(text_model.set_attn_implementation, text_model.config._attn_implementation)
            text_model.set_attn_implementation(getattr(text_model, "usual_attention", "sdpa"))
        yield


def kernel_for(device: torch.device | str, dtype: torch.dtype, head_dim: int = 128) -> str:
    """Describe the kernel that ``backend="auto"`` uses for packed rows, and why.

    Args:
        head_dim: channels per head; 64 to 128 in published InternVLs.

    >>> kernel_for("cpu", torch.bfloat16)
    "PyTorch's attention, one call per segment (its varlen kernel needs an NVIDIA GPU)"
    """
    missing = _against_varlen(torch.empty(0, 1, head_dim, dtype=dtype, device=device))
    if missing is None:
        return "PyTorch's varlen kernel, one call for all segments"
    return f"PyTorch's attention, one call per segment (its varlen kernel needs {missing})"


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
    """Compute attention by segments; called by transformers' attention layers, with arguments that must not change the attention.

    `query`, `key` and `value` have shape (1, heads, N, head_dim), the last two with key-value heads. Returns shape (1, N, heads,
    head_dim), 0 for nodes that are no queries; and no attention weights.
    """
    if segments is None:
        found = "The text model attends by segments, but this layer got none: it was called alone, or again for a backward pass"
        raise ValueError(f"{found}. Pass `segments=`, or run forward and backward pass inside `usual_attention(model)`.")
    if segments.query_index is None and not torch.compiler.is_compiling():  # a compiled check would recompile for every new length
        nodes = sum(queries for queries, _ in segments.lengths)
        if query.shape[0] != 1 or query.shape[2] != nodes or key.shape[2] != nodes:
            found = f"{query.shape[0]} rows with {query.shape[2]} queries and {key.shape[2]} keys"
            raise ValueError(f"Expected 1 row of {nodes} tokens; got {found}. Pass the segments of this batch, and no cache.")
    changed = sorted(name for name in ("softcap", "s_aux", "sliding_window", "position_bias") if kwargs.get(name) is not None)
    if dropout or changed or attention_mask is not None:
        what = ["dropout"] * bool(dropout) + changed + ["attention_mask"] * (attention_mask is not None)
        raise ValueError(f"{type(module).__name__} uses {', '.join(what)}, which attention by segments does not support.")

    # Autocast does not cover varlen kernels, and rotary embeddings or norms may have left queries and keys in float32.
    kind = query.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else value.dtype
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (N, heads, head_dim)
    nodes_shape = query.shape
    if segments.query_index is not None:
        query = query.index_select(0, segments.query_index)
    if segments.key_index is not None:
        key, value = key.index_select(0, segments.key_index), value.index_select(0, segments.key_index)
    if backend in _PACKAGES:
        output = _flash(query, key, value, segments, scaling, backend)
    elif backend == "auto" and varlen_fits(query):
        output = _varlen(query, key, value, segments, scaling)
    else:
        output = _by_segment(query, key, value, segments, scaling)
    if segments.query_index is not None:
        output = output.new_zeros(nodes_shape).index_copy(0, segments.query_index, output)
    return output.unsqueeze(0), None


for _backend, _name in BACKENDS.items():
    AttentionInterface.register(_name, partial(_attend, backend=_backend))


# Not compiled: the loop would be recompiled for every number and length of segments.
@torch.compiler.disable  # type: ignore[untyped-decorator, no-untyped-call, unused-ignore]
def _by_segment(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """Apply PyTorch's attention to one segment at a time; queries (N, heads, head_dim), keys and values (K, ...)."""
    shared = takes_groups(query) and query.shape[1] > key.shape[1]
    if not shared:
        key, value = _for_every_head(query, key, value)
    sizes_q, sizes_k = [queries for queries, _ in segments.lengths], [keys for _, keys in segments.lengths]
    parts = zip(*map(torch.split_with_sizes, (query, key, value), (sizes_q, sizes_k, sizes_k)), segments.masks(), strict=True)
    outputs = []
    for q, k, v, mask in parts:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        causal = mask is None and q.shape[2] > 1
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=shared)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def _for_every_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    group = query.shape[1] // key.shape[1]
    return (key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)) if group > 1 else (key, value)


def takes_groups(query: Tensor) -> bool:
    """Whether a fast kernel takes a mask together with enable_gqa; on GPUs only PyTorch's slowest one does."""
    return query.device.type == "cpu"


def varlen_fits(query: Tensor) -> bool:
    """Whether PyTorch's varlen kernel supports these queries, shape (N, heads, head_dim)."""
    return _against_varlen(query) is None


def _against_varlen(query: Tensor) -> str | None:
    """The requirement of PyTorch's varlen kernel that these queries do not meet; None when they meet all."""
    if not query.is_cuda:
        return "an NVIDIA GPU"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return "bfloat16 or float16"
    if query.shape[-1] % 8 or query.shape[-1] > 256:
        return "heads of 8, 16, 24, ..., 256 channels"
    return None if _has_varlen(query.device.index) else "an NVIDIA GPU from Ampere on"


@lru_cache
@torch.compiler.assume_constant_result  # type: ignore[misc, untyped-decorator, unused-ignore]
def _has_varlen(device: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None) -> Tensor:
    """Call PyTorch's varlen kernel once; shapes as in `_by_segment`.

    A window of (-1, 0) is causal from the bottom-right corner, but only with FlashAttention: cuDNN aligns packed segments at
    the top left. PyTorch therefore uses cuDNN for causal segments only when both offsets are the same tensor; here they never
    are.
    """
    options: dict[str, Any] = {"enable_gqa": True} if VARLEN_TAKES_GROUPS and query.shape[1] > key.shape[1] else {}
    if not options:
        key, value = _for_every_head(query, key, value)
    output = varlen_attn(query, key, value, *segments.offsets(), scale=scaling, window_size=(-1, 0), **options)
    assert isinstance(output, Tensor)  # a tuple only with return_aux
    return output


def _flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, backend: str) -> Tensor:
    # Causal from the bottom-right corner, since flash-attn 2.1.
    output = _flash_attention(backend)(query, key, value, *segments.offsets(), softmax_scale=scaling, causal=True)
    attended: Tensor = output[0] if isinstance(output, tuple) else output  # some builds of flash-attn 3 add the log-sum-exp
    return attended


_PACKAGES = {
    "flash_attn_2": ("flash_attn", "pip install 'mpo-trainer[flash]'"),
    "flash_attn_3": ("flash_attn_interface", "flash-attention's folder hopper/, for H100 and later"),
}
"""Of a backend the package, and how to install it."""


@lru_cache
def _flash_attention(backend: str) -> Callable[..., Any]:
    package, install = _PACKAGES[backend]
    try:
        function: Callable[..., Any] = importlib.import_module(package).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:
        found = f"packed_attention={backend!r} needs the package {package}, which cannot be imported here ({error})"
        advice = f"Install it ({install}), or leave packed_attention at 'auto': PyTorch has its own varlen kernel."
        raise ValueError(f"{found}. {advice}") from error
    return function
